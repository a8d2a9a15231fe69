"""Predictions of adapt experiences, kept in the run's folder so that any error can be recomputed from it.

`predictions/<experience>.safetensors` holds, in the stream's order: `predictions` (n, C) as the strategy gave them,
`labels` (n, ...) where there are any, and `rows` (n,) of the samples in the data set.
"""

from __future__ import annotations

import torch
from safetensors.torch import save
from torch import Tensor

from clplat.errors import UserError
from clplat.files import write_atomic
from clplat.run.state import RunState
from clplat.stream import Experience


def keep(run: RunState, positions: Tensor, predictions: Tensor, labels: Tensor | None) -> None:
    """Take this process's part of a batch: predictions (B, C) of the samples at `positions` (B,) of the experience."""
    part = {"positions": positions, "predictions": predictions.detach(), "rows": run.strategy.rows}
    part |= {} if labels is None else {"labels": labels}
    run.predictions.append({name: t.to("cpu", copy=True) for name, t in part.items()})


def held(run: RunState) -> dict[str, Tensor]:
    """What this process has kept of the current experience, in one piece: for checkpoints."""
    parts = run.predictions
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
    run.predictions = [whole] if parts else []
    return whole


def write(run: RunState, experience: Experience) -> None:
    """Write what all processes have kept of `experience`, and forget it; a collective call.

    Raises:
        UserError: it can't be written; the run can be resumed.
    """
    parts: list[dict[str, Tensor]] = [held(run)]
    if run.world_size > 1:
        parts = [{} for _ in range(run.world_size)]
        torch.distributed.all_gather_object(parts, held(run))
    run.predictions = []
    parts = [part for part in parts if part]
    if run.rank != 0 or run.log.run_dir is None or not parts:
        return
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = whole.pop("positions").argsort()
    path = run.log.run_dir / "predictions" / f"{experience.index:04d}.safetensors"
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, save({name: t[order].contiguous() for name, t in whole.items()}))
    except OSError as error:
        raise UserError(f"output: could not write {path}: {error.strerror}; the run can be resumed") from error
