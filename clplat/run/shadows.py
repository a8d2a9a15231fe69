"""U-LiRA's shadow models: the run repeated with other samples in the place of those that its last request erased.

Candidates are erased samples and as many that the run never saw (held out, of the same classes where there are any), at
most `audit.samples` of each. Each shadow model starts from another seed, learns the run's data with half of the
candidates in the place of the erased ones, is asked to erase this half, and is scored on all candidates. What the
attack finds is written to `RUN_DIR/audit/<index>/lira.json` (`clplat.metrics.lira` says how it is computed).

A shadow model costs what the run costs up to the request. Nothing of it is kept.
"""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clplat.config.settings import Config
from clplat.erasure import late
from clplat.erasure.audit import audit
from clplat.erasure.audit.sets import SETS, Piece, draw, sets_of
from clplat.erasure.ledger import parse_id, same_source
from clplat.errors import DivergedError, UserError
from clplat.files import to_json, write_atomic
from clplat.lightning import Fabric
from clplat.metrics import lira, membership
from clplat.run.build import build_strategy, build_stream, new_record
from clplat.run.loop import Runner
from clplat.run.runlog import RunLog
from clplat.stream import Data, Experience, Kind, Stream

FILE = "lira.json"


def faults(config: Config, stream: Stream) -> list[str]:
    """Why shadow models can't be made of a run; empty where they can, or none are asked for."""
    if not (count := config.audit.shadows):
        return []
    data = [d for e in stream for d in (e.train, e.test, e.valid) if d is not None]
    why = {
        "the stream holds no request to forget": all(e.kind is not Kind.FORGET for e in stream),
        "audit.enabled is false": not config.audit.enabled,
        "loop.stop_after ends the run early": config.loop.stop_after is not None,
        "the run starts from another's weights (start.run), which have seen the samples": config.start.run is not None,
        "of several processes each would make its own": config.fabric.devices * config.fabric.num_nodes > 1,
        "the stream has experiences to act in": any(e.kind is Kind.INTERACT for e in stream),
        "the stream tells the task at test time": stream.task_known,
        "the stream's answers are free text": any(d.labels is not None and d.labels.ndim > 1 for d in data),
        "the stream's inputs are not in memory": any(not isinstance(d.inputs, Tensor) for d in data),
    }
    return [f"audit.shadows: {count}, but {reason} (valid: 0)" for reason, holds in why.items() if holds]


@dataclass(frozen=True)
class Candidates:
    """Samples that the attack tells apart.

    Args:
        inputs: (n, ...) as stored, the erased ones first.
        labels: (n,).
        rows: (m,) of the erased ones in the data set of the request.
        homes: (n − m,) index of the learn experience that a sample never seen would have been learned in.
        target: model → φ (n,) of the model attacked, before ("original") and after ("unlearned") the request.
        of: what those never seen are.
    """

    inputs: Tensor
    labels: Tensor
    rows: Tensor
    homes: Tensor
    target: dict[str, np.ndarray]
    of: str


def attack(config: Config, run_dir: Path, fabric: Fabric) -> None:
    """Train the shadow models that `audit.shadows` asks for, and write what the attack on the last request finds."""
    started, stream = time.perf_counter(), build_stream(config)
    late.extend(stream, run_dir)
    index = max(e.index for e in stream if e.kind is Kind.FORGET)
    folder = audit.audit_dir(run_dir, index)
    if (folder / FILE).is_file():
        return  # of a run that is gone on with when it was complete
    print(f"clplat: audit.shadows: {config.audit.shadows} models are trained for it now", file=sys.stderr, flush=True)
    found: dict[str, Any] = {"shadows": config.audit.shadows}
    chosen = candidates(config, stream, index, folder)
    if isinstance(chosen, str):
        found["why"] = chosen
    else:
        had = lira.halves(len(chosen.labels), config.audit.shadows, config.seed)
        erased = np.arange(len(chosen.labels)) < len(chosen.rows)
        try:
            streams = [shadow_stream(stream, index, chosen, mask) for mask in had]
            scored = [_shadow(config, s, index, chosen, config.seed + 1 + k, fabric) for k, s in enumerate(streams)]
            for model in ("original", "unlearned"):
                found[model] = lira.u_lira(chosen.target[model], np.stack([s[model] for s in scored]), had, erased)
            found |= {"erased": int(erased.sum()), "unseen": int((~erased).sum()), "of": chosen.of}
        except (DivergedError, UserError) as error:  # of a shadow model: the run itself is done
            found["why"] = f"a shadow model could not be made ({error.faults[0]})"
    write_atomic(folder / FILE, to_json(found | {"seconds": time.perf_counter() - started}, indent=1))


def candidates(config: Config, stream: Stream, index: int, folder: Path) -> Candidates | str:
    """The candidates of the request at `index`, with the scores that its audit left in `folder`; or why it has none."""
    from safetensors.numpy import load_file

    scores = {m: load_file(folder / f"{m}.safetensors") for m in ("original", "unlearned")}
    where, of = membership.unseen_rows(scores["unlearned"])
    if where is None or not membership.scored(scores["unlearned"], "erased"):
        return "its predictions are no class scores, or no sample that it never saw is left"
    part, base = config.loop.evaluate_on, stream[index].train
    assert base is not None
    sets = sets_of(stream.experiences, index, part)
    drawn = {s: draw(sets[s], config.audit.samples, SETS.index(s)) for s in ("erased", where[0])}
    flat = [(p, int(row)) for p in drawn[where[0]] for row in p.data.row_ids()]
    rng, never = np.random.default_rng(config.seed), np.flatnonzero(where[1])
    rows = drawn["erased"][0].data.row_ids()
    count = min(len(rows), len(never))
    mine, others = (np.sort(rng.permutation(v)[:count]) for v in (np.arange(len(rows)), never))
    found = [(flat[k], _home(stream, index, flat[k][0], flat[k][1], part)) for k in others]
    if any(p.data.world is not base.world for (p, _), _ in found):
        return "the samples that it never saw are in another guise than the erased ones"
    at = rows[torch.from_numpy(mine)]
    inputs = torch.cat([base.inputs[at], torch.stack([p.data.inputs[row] for (p, row), _ in found])])
    labels = torch.cat([_labels(base)[at], torch.stack([_labels(p.data)[row] for (p, row), _ in found])])
    target = {}
    for model, known in scores.items():
        pairs = (("erased", mine), (where[0], others))
        target[model] = np.concatenate(
            [membership.logit_confidences(known[f"{s}.logits"][k], known[f"{s}.labels"][k]) for s, k in pairs]
        )
    return Candidates(inputs, labels, at, torch.tensor([home for _, home in found]), target, str(of))


def _labels(data: Data) -> Tensor:
    assert data.labels is not None
    return data.labels


def _home(stream: Stream, index: int, piece: Piece, row: int, part: str) -> int:
    """The first learn experience that a held-out sample goes with."""
    for e in stream.experiences[:index]:
        held = getattr(e, part)
        if e.kind is Kind.LEARN and held is not None and same_source(held, piece.data) and row in held.row_ids():
            return e.index
    return next(e.index for e in stream if e.kind is Kind.LEARN)


def shadow_stream(stream: Stream, index: int, chosen: Candidates, has: np.ndarray) -> Stream:
    """The stream up to the request at `index`, with the candidates `has` (n,) bool in the place of the erased ones.

    They are learned where the sample stood that they stand for, or would have stood, and the request names them. No
    sample is held out: shadow models are scored on the candidates alone.
    """
    base, mask, m = stream[index].train, torch.from_numpy(has), len(chosen.rows)
    assert base is not None
    assert isinstance(base.inputs, Tensor)  # `faults` refuses others
    inputs, labels = torch.cat([base.inputs, chosen.inputs[m:]]), torch.cat([_labels(base), chosen.labels[m:]])
    gone, new = chosen.rows[~mask[:m]], len(base.inputs) + torch.arange(len(chosen.labels) - m)

    def changed(e: Experience) -> Experience:
        e = replace(e, test=None, valid=None)
        if e.train is None or not same_source(e.train, base):
            return e
        rows = e.train.row_ids()
        joins = chosen.homes == e.index if e.kind is Kind.LEARN else torch.full((len(new),), e.index == index)
        rows = torch.cat([rows[~torch.isin(rows, gone)], new[joins & mask[m:]]])
        request = e.request
        if e.kind is Kind.FORGET and (parse_id(request[0]) or ("", ""))[0] != "class":
            request = tuple(f"sample:{row}" for row in rows.tolist())
        return replace(e, train=Data(inputs, labels, rows, base.world), request=request)

    found = copy.copy(stream)
    found.experiences = tuple(changed(e) for e in stream.experiences[: index + 1])
    return found


def _shadow(
    config: Config, stream: Stream, index: int, chosen: Candidates, seed: int, fabric: Fabric
) -> dict[str, np.ndarray]:
    """φ (n,) of all candidates, of one shadow model before the requests and after the last."""
    first = index
    while first and stream[first - 1].kind is Kind.FORGET:
        first -= 1
    strategy = build_strategy(config, stream.input_shape, stream.num_classes, seed=seed, answers=stream.answers)
    loop = replace(config.loop, eval_every=None, checkpoint_every=None, checkpoint_seconds=None, representation=False)
    runner = Runner(strategy, stream, loop, fabric, seed, RunLog(None, time.perf_counter()), new_record(stream))
    runner.compiled = config.fabric.compile
    subject = audit.Subject(strategy, runner.stream, config.audit, "test", loop.eval_batch_size, fabric.device,
                            fabric.autocast, 0, 1, None)  # fmt: skip
    base = stream[index].train
    assert base is not None
    data = Data(chosen.inputs, chosen.labels, None, base.world).to(fabric.device)
    found: dict[str, np.ndarray] = {}
    for model, until in (("original", first), ("unlearned", index + 1)):
        runner.loop = replace(loop, stop_after=until)
        runner.run()
        logits = audit.logits_of(subject, data, stream[index].task)
        found[model] = membership.logit_confidences(logits.numpy(), chosen.labels.cpu().numpy())
    return found
