"""What can't be run on sharded weights is refused before anything runs, in a line that says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sharded import IMAGES, config, texts

from clplat.config.resolve import resolve
from clplat.errors import UserError
from clplat.run.build import build
from clplat.run.sharding import average_gradients
from clplat.strategies.er import ER
from clplat.strategies.ewc import EWC
from clplat.strategy import why_not_sharded


def refused(folder: Path, given: dict[str, Any], **more: Any) -> str:
    with pytest.raises(UserError) as raised:
        build(resolve(config=config(folder, given, fabric={"devices": 2, "strategy": "fsdp"}), **more))
    return "\n".join(raised.value.faults)


@pytest.mark.parametrize(("key", "value", "line"), [
    ("strategy", "agem", "fabric.strategy: fsdp, but AGEM can't learn by sharded weights: it projects whole gradients"),
    ("strategy", "salun", "it ranks single weights by whole gradients (valid: ddp)"),
    ("backbone", "mlp", "but backbone mlp is not sharded (valid: language_model, text_encoder, vit, clip)"),
    ("merge", "lines", "merge: lines changes whole weights, but fabric.strategy is fsdp (valid: none)"),
    ("loop.diagnostics", ["intruder_dimensions"], "loop.diagnostics: they are of whole weights"),
    ("stream", "corruptions", "the stream has experiences of kind adapt (valid: learn, forget)"),
    ("stream", "unlearning", "audit.relearn_steps: 50, taken on a copy of whole weights, but fabric.strategy is fsdp"),
])  # fmt: skip
def test_what_reads_whole_weights_is_refused(tmp_path: Path, key: str, value: Any, line: str) -> None:
    given = {**IMAGES, "strategy": "naive"} | ({"strategy": value} if key == "strategy" else {})
    assert line in refused(tmp_path, given, **{key: value})


def test_passes_that_depend_on_the_texts_of_a_process_are_refused(tmp_path: Path) -> None:
    found = refused(tmp_path, {**texts(tmp_path, name="language_model"), "strategy": "derpp"})
    assert "DERpp scores all classes in training" in found


def test_gradients_that_one_process_lacks_count_as_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes the other has gradients (None, 4, 6), this one (2, None, 8); neither one of the last."""

    def add(tensor: torch.Tensor) -> None:
        others = [0, 1, 1, 0] if tensor.dtype == torch.int32 else [0.0, 4.0, 6.0]
        tensor += torch.tensor(others, dtype=tensor.dtype)

    monkeypatch.setattr(torch.distributed, "all_reduce", add)
    own = [torch.nn.Parameter(torch.zeros(1)) for _ in range(4)]
    own[0].grad, own[2].grad = torch.tensor([2.0]), torch.tensor([8.0])
    average_gradients(own, 2)
    assert [p.grad if p.grad is None else p.grad.item() for p in own] == [1.0, 2.0, 7.0, None]


def test_that_it_was_seen_is_not_inherited_and_a_reason_is() -> None:
    assert not why_not_sharded(ER)
    assert why_not_sharded(type("Mine", (ER,), {})) == 'it does not say that it was seen to (unshardable = "")'
    assert why_not_sharded(type("Mine", (EWC,), {})) == why_not_sharded(EWC) != ""
