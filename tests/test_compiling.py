"""Compiled passes: the numbers of a plain run, whatever grows or watches, and a line where torch can't compile."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from on_device import HERE
from sharded import IMAGES, config, ended, on_processes, stubbed_too
from torch import nn

import clplat
from clplat.backbones.cnn import cnn
from clplat.backbones.vit import vit_micro
from clplat.config.resolve import resolve
from clplat.config.settings import FabricSettings
from clplat.errors import UserError
from clplat.run import compiling
from clplat.run.build import build
from clplat.run.compiling import compile_passes, parts

STUBBED = {"dynamic": True, "backend": "eager"}  # traces and guards as ever, and compiles nothing
COMPILED = {"fabric": {"compile": True}}
AGENT = {"stream": {"name": f"{HERE}:Tiny", "kinds": "interact"}, "backbone": "actor_critic"}
CPU = torch.device("cpu")
# Which torch asks for itself, and hides unless warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def limits() -> Any:
    """Nothing is compiled yet, and torch's limits are its own again afterwards."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "OPTIONS", STUBBED)


def close(found: dict[str, Any], expected: dict[str, Any], within: float) -> None:
    assert found["strategy"].keys() == expected["strategy"].keys()
    for key, value in expected["strategy"].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found["strategy"][key], value, atol=within, rtol=0, equal_nan=True, msg=key)
    assert found["record"]["matrix"] == expected["record"]["matrix"]
    assert found["record"]["cost"]["train_flops"] == expected["record"]["cost"]["train_flops"] > 0


def test_heads_that_grow_make_nothing_anew_and_many_structures_do_not_end_it(tmp_path: Path, stubbed: None) -> None:
    stream = {"name": "digits", "experiences": 10}
    given = config(tmp_path, {**IMAGES, "stream": stream, "strategy": "naive"}, **COMPILED)
    clplat.run(given, quiet=True, loop={**given["loop"], "max_steps": 1, "stop_after": 10})
    assert graphs() == 3  # of the trial, and of both blocks in training and in evaluation
    before, inputs = graphs(), torch.ones(2, 3)
    for count in range(1, 13):
        backbone: Any = vit_micro((1, 8, 8), dim=16, heads=2)
        backbone.net.blocks = nn.Sequential(*(nn.Sequential(*(nn.Linear(3, 3) for _ in range(count))),))
        compile_passes(backbone)
        backbone.blocks[0](inputs)
    assert graphs() == before + 12


def test_hooks_see_a_pass_and_copies_are_not_compiled(stubbed: None) -> None:
    torch.manual_seed(0)
    backbone = vit_micro((1, 8, 8), dim=16, heads=2)
    expected, names = copy.deepcopy(backbone), list(backbone.state_dict())
    compile_passes(backbone)
    inputs, seen = torch.randn(3, 1, 8, 8), list[torch.Tensor]()
    assert torch.equal(backbone(inputs), expected(inputs))
    assert graphs() == 1
    handle = backbone.net.blocks[1].mlp.register_forward_hook(lambda *given: seen.append(given[2]))
    backbone(inputs)
    handle.remove()
    backbone(inputs)
    assert [s.shape for s in seen] == [(3, 16, 16)]
    again = copy.deepcopy(backbone)
    assert all(block._compiled_call_impl is None for block in again.blocks)
    assert list(backbone.state_dict()) == list(again.state_dict()) == names
    with torch.no_grad():
        backbone.net.blocks[0].attn.qkv.weight.zero_()
    assert torch.equal(again(inputs), expected(inputs))
    assert not torch.equal(backbone(inputs), expected(inputs))
    assert graphs() == 1


def test_of_a_backbone_that_convolves_or_has_no_blocks_all_is_compiled() -> None:
    convolving, transforming = cnn((1, 8, 8), width=2), vit_micro((1, 8, 8), dim=16, heads=2)
    assert parts(convolving) == [convolving]
    assert parts(transforming) == transforming.blocks
    transforming.net.blocks = nn.Sequential()
    assert parts(transforming) == [transforming]


@pytest.mark.parametrize(("given", "line"), [
    ({"fabric": {"strategy": "fsdp"}}, "fabric.strategy is fsdp"),
    ({"loop": {"activation_checkpointing": True}}, "loop.activation_checkpointing computes passes again"),
    ({"backbone": {"name": "frozen", "base": "mlp"}}, "backbone frozen has no passes to train"),
    ({"strategy": {"name": "l2p", "blocks": 1}}, "L2P makes the passes of its model in a way of its own"),
    ({"strategy": "hnet"}, "HNet makes the passes of its model in a way of its own"),
    ({**AGENT, "strategy": "bc"}, "an agent asks its networks one by one"),
])  # fmt: skip
def test_what_can_not_be_compiled_is_refused(tmp_path: Path, given: dict[str, Any], line: str) -> None:
    more = {**given, "fabric": {"compile": True} | given.get("fabric", {})}
    with pytest.raises(UserError) as raised:
        build(resolve(config=config(tmp_path, {**IMAGES, "strategy": "naive"}, **more)))
    assert any(f.startswith(f"fabric.compile: true, but {line}") for f in raised.value.faults)


def test_where_nothing_can_be_compiled_it_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> None:
        raise RuntimeError("no Triton here")

    monkeypatch.setattr(compiling, "OPTIONS", {"backend": missing})
    line = r"^fabric\.compile: true, but torch can't compile for cpu here: RuntimeError: no Triton here \(valid"
    with pytest.raises(UserError, match=line):
        clplat.run(config(tmp_path, {**IMAGES, "strategy": "naive"}, **COMPILED), quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_compiled_kernels_end_where_a_plain_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor, "compile_threads", 1)  # its pool would stay
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert "no-such-compiler" in compiling.check(CPU)[0]
    torch._dynamo.reset()
    if why := compiling.check(CPU):
        pytest.skip(why[0])
    backbone = IMAGES["backbone"] | {"depth": 1}
    given = {**IMAGES, "backbone": backbone, "strategy": "naive", "loop": {"max_steps": 3, "stop_after": 1}}
    torch._dynamo.utils.counters.clear()
    for name, more in (("plain", {}), ("compiled", COMPILED)):
        clplat.run(config(tmp_path / name, given, **more), quiet=True)
        assert (graphs() > 0) == (name == "compiled")
    found, expected = (ended(tmp_path / name) for name in ("compiled", "plain"))
    weights = {k: v for k, v in expected["strategy"].items() if k.endswith("weight")}
    assert any(not torch.equal(found["strategy"][k], v) for k, v in weights.items())  # rounded elsewhere
    close(found, expected, 1e-5)


@pytest.mark.slow
def test_two_processes_compile_and_end_where_plain_ones_do(tmp_path: Path) -> None:
    given, ddp = {**IMAGES, "strategy": {"name": "er", "memory": 30, "replay_batch": 4}}, {"devices": 2}
    jobs = [
        {"config": config(tmp_path / name, given, fabric=ddp | more)}
        for name, more in (("plain", {}), ("compiled", {"compile": True}))
    ]
    on_processes(jobs, FabricSettings(accelerator="cpu", devices=2), stubbed_too)
    close(ended(tmp_path / "compiled"), ended(tmp_path / "plain"), 0.0)
