"""Intruder dimensions and tuning contribution: invariants in float64, and their place in a run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clplat.adapters.effective import effective_weights
from clplat.adapters.lora import LoRA
from clplat.backbones.heads import Growing
from clplat.backbones.language_model import language_model
from clplat.backbones.mlp import mlp
from clplat.backbones.vit import vit_micro
from clplat.metrics.tuning import intruder_dimensions, tuning_contribution
from clplat.run.diagnosing import Diagnostics
from clplat.run.saving import restore, snapshot
from clplat.strategies.naive import Naive


def spread(rows: int = 24, columns: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix with singular values 1 to 2, far apart, and its singular vectors."""
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64))
    return u * torch.linspace(2, 1, columns, dtype=torch.float64) @ v.mT, u, v


def test_a_matrix_has_no_intruder_in_itself() -> None:
    matrix, u, v = spread()
    assert intruder_dimensions(matrix, matrix) == 0
    assert intruder_dimensions(matrix, -3 * matrix) == 0  # signs of vectors count for nothing
    assert intruder_dimensions(matrix, u.flip(1) * torch.linspace(2, 1, 16, dtype=torch.float64) @ v.mT) == 0  # order


def test_a_strong_direction_across_all_others_is_one() -> None:
    matrix, u, v = spread()
    across = u.mean(1) * 4  # of length 1: its overlap with each direction is 1/4
    changed = torch.outer(across, v[:, 0])
    assert intruder_dimensions(matrix, matrix + 100 * changed) == 1
    assert intruder_dimensions(matrix, matrix + 1e-4 * changed) == 0
    assert intruder_dimensions(matrix, matrix + 100 * changed, threshold=0.2) == 0


def test_at_most_as_many_as_are_looked_at_and_more_with_a_higher_threshold() -> None:
    matrix, _, _ = spread()
    turned = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64))[0] @ matrix
    found = [intruder_dimensions(matrix, turned, top, eps) for top in (2, 10) for eps in (0.3, 0.6, 1.0)]
    assert found[:3] == sorted(found[:3])
    assert found[3:] == sorted(found[3:])
    assert all(a <= b for a, b in zip(found[:3], found[3:], strict=True))
    assert found[2] == 2
    assert found[5] == 10


def test_directions_that_are_arbitrary_are_no_intruders() -> None:
    """All singular values of an orthogonal matrix are 1: a change of 1e-9 turns its vectors by anything."""
    torch.manual_seed(0)
    matrix = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    assert intruder_dimensions(matrix, matrix + 1e-9 * torch.randn(12, 12, dtype=torch.float64)) == 0
    thin = torch.zeros(6, 4, dtype=torch.float64)
    thin[0, 0] = 1.0
    assert intruder_dimensions(thin, thin) == 0  # three directions without a singular value


class Block(nn.Module):
    """x + W x, as (states, anything)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        return hidden_states + hidden_states @ self.weight.mT, None


def stack(blocks: list[Block], x: Tensor) -> list[Tensor]:
    states = [x]
    for block in blocks:
        states.append(block(hidden_states=states[-1])[0])
    return states


def test_tuning_contribution_is_split_along_the_tuned_states() -> None:
    torch.manual_seed(0)
    old = [Block(torch.randn(3, 3, dtype=torch.float64)) for _ in range(2)]
    new = [Block(b.weight.detach() + 0.3 * torch.randn(3, 3, dtype=torch.float64)) for b in old]
    x, last = torch.randn(4, 5, 3, dtype=torch.float64), torch.tensor([4, 0, 2, 3])
    found = tuning_contribution(new, old, lambda: stack(new, x), last)
    at = (torch.arange(4), last)
    states = [s[at].detach() for s in stack(new, x)]
    trained = sum(s @ b.weight.detach().mT for s, b in zip(states, old, strict=False))
    tuned = sum(s @ (b.weight - a.weight).detach().mT for s, a, b in zip(states, old, new, strict=False))
    torch.testing.assert_close(states[0] + trained + tuned, states[-1])
    expected = tuned.abs().sum(1) / (tuned.abs().sum(1) + trained.abs().sum(1))
    torch.testing.assert_close(found, expected)
    assert not new[0]._forward_hooks


def test_tuning_contribution_at_its_limits() -> None:
    torch.manual_seed(0)
    old = [Block(torch.randn(3, 3, dtype=torch.float64)) for _ in range(2)]
    same, none = copy.deepcopy(old), [Block(torch.zeros(3, 3, dtype=torch.float64)) for _ in range(2)]
    x, last = torch.randn(2, 4, 3, dtype=torch.float64), torch.tensor([1, 3])
    for tuned, origin, value in ((old, same, 0.0), (old, none, 1.0), (none, copy.deepcopy(none), 0.0)):
        assert tuning_contribution(tuned, origin, lambda tuned=tuned: stack(tuned, x), last).tolist() == [value] * 2


def test_weights_are_those_with_the_adapters_in_use() -> None:
    backbone = mlp((3,), hidden=[4, 4])
    adapters = LoRA(backbone, "ffn", rank=2, alpha=6.0)
    plain = effective_weights(backbone)
    adapters.add("a")
    adapters.use("a", train="a")
    for _, up in adapters.factors("a").values():
        nn.init.normal_(up)
    found = effective_weights(backbone)
    assert plain is not None
    assert found is not None
    for name, change in adapters.delta("a").items():
        torch.testing.assert_close(found[name], plain[name] + change.detach())
    adapters.use()
    torch.testing.assert_close(effective_weights(backbone), plain)


def test_a_fused_projection_is_three_matrices() -> None:
    found = effective_weights(vit_micro((1, 8, 8), patch_size=4, dim=8, depth=1, heads=2))
    assert found is not None
    assert {tuple(m.shape) for n, m in found.items() if ".qkv." in n} == {(8, 8)}
    assert sum(".qkv." in n for n in found) == 3


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_language_model_is_compared_with_itself_as_the_run_began(family: str) -> None:
    torch.manual_seed(0)
    backbone = language_model((2, 6), family=family, dim=8, depth=2, heads=2, vocabulary=20)
    strategy = Naive(model=backbone.assemble(None, None))
    diagnostics = Diagnostics(["tuning_contribution"], strategy)
    inputs = torch.randint(3, 20, (5, 2, 6))
    inputs[2, :, 4:] = -1  # a shorter text
    before = diagnostics.measure(strategy, inputs)["tuning_contribution"]
    assert before == (0.0 if family == "llama" else None)  # an encoder-decoder has two streams
    if family == "llama":
        with torch.no_grad():
            for parameter in backbone.blocks[1].parameters():
                parameter.mul_(1.5)
        whole = diagnostics.measure(strategy, inputs)["tuning_contribution"]
        each = [diagnostics.measure(strategy, row[None])["tuning_contribution"] for row in inputs]
        assert whole == pytest.approx(sum(each) / 5, rel=1e-4)  # type: ignore[arg-type]  # padding counts for nothing
        assert 0 < whole < 1


def test_intruders_of_an_experience_are_against_the_weights_it_began_with() -> None:
    torch.manual_seed(0)
    backbone = vit_micro((1, 8, 8), patch_size=4, dim=16, depth=1, heads=2)
    strategy = Naive(model=backbone.assemble(Growing(16, 2), None))
    diagnostics = Diagnostics(["intruder_dimensions"], strategy)
    names = "intruder_dimensions", "new_intruder_dimensions"
    with torch.no_grad():
        backbone.blocks[0].mlp.fc1.weight += 9 * torch.randn(64, 1) @ torch.randn(1, 16)
    first, second = (diagnostics.measure(strategy, None) for _ in range(2))
    assert first[names[0]] == first[names[1]] == second[names[0]] != 0
    assert second[names[1]] == 0  # nothing was learned between


IMAGES: dict[str, Any] = {
    "stream": {"name": "digits", "experiences": 2},
    "strategy": {"name": "lora", "where": "ffn", "lr": 0.5},
    "backbone": {"name": "mlp", "hidden": [12, 12]},
    "loop": {"batch_size": 16, "max_steps": 3, "eval_samples": 20, "representation": False,
             "diagnostics": ["intruder_dimensions", "tuning_contribution"]},
    "tracking": {"enabled": False},
}  # fmt: skip


def test_a_run_measures_what_is_asked_for_and_a_resumed_one_against_the_same_weights(make_runner: Any) -> None:
    from clplat.run.summary import summary

    straight = make_runner(of=IMAGES)
    straight.run()
    rows = straight.record.representation
    assert [r["tuning_contribution"] for r in rows] == [None, None]  # no language model
    assert rows[0]["intruder_dimensions"] == rows[0]["new_intruder_dimensions"]
    held = make_runner(of=IMAGES | {"loop": IMAGES["loop"] | {"stop_after": 1}})
    held.run()
    state = snapshot(held)
    second = make_runner(of=IMAGES)
    with torch.no_grad():
        for value in second.diagnostics.origin.parameters():
            value.zero_()  # as if the weights it began with could not be made again
    restore(second, state)
    second.run()
    assert second.record.representation == rows
    from clplat.config.resolve import resolve

    told = summary(resolve(config=IMAGES), straight.record, "complete")
    assert told["representation"]["intruder_dimensions"] == [r["intruder_dimensions"] for r in rows]
    assert "no meaning for this network" in told["why_null"]["representation.tuning_contribution"]
