"""Runs on weights that two CPU processes share out against the same runs on one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded import ADAPTERS, IMAGES, REPLAY, SHARDED, alone, config, ended, on_processes, pictures, texts

from clplat.config.settings import FabricSettings
from clplat.run import checkpoint

pytestmark = pytest.mark.slow
SGD = {"lr": 0.1}
FSDP = {"devices": 2, "strategy": "fsdp"}
REQUEST = {"name": "unlearning", "requests": [{"erase": "class:0", "after": 0}]}
PLAIN, REPLAYED, ADAPTED = ["naive", "joint", "cumulative"], ["er", "er_ace", "derpp"], ["lora", "olora"]
FAMILIES = ["language_model", "text_encoder", "clip"]
NARROW = ["bf16-mixed", "bf16-true"]
MORE, FEWER = ["1 to 2", "1 to 2 parts"], ["2 to 1", "2 to 1 parts"]
AGAIN = ["er", "derpp", "lora", "clip"]  # the other strategies take the steps of one of these


def cases(folder: Path) -> dict[str, Any]:
    words, classes = texts(folder, name="language_model"), texts(folder, name="text_encoder")
    return {
        **{name: {**IMAGES, "strategy": {"name": name, **SGD}} for name in PLAIN},
        **{name: {**IMAGES, "strategy": {"name": name, **SGD, **REPLAY}} for name in REPLAYED},
        **{name: {**words, "strategy": {"name": name, **ADAPTERS}} for name in ADAPTED},
        "language_model": {**words, "strategy": {"name": "naive", **SGD}},
        "text_encoder": {**classes, "strategy": {"name": "er", **SGD, **REPLAY}},
        "clip": {**pictures(folder), "strategy": {"name": "naive", "lr": 0.01}},
        "naive": {**IMAGES, "strategy": {"name": "naive", **SGD}, "loop": {"representation": True}},
        "gs_lora": {
            **IMAGES,
            "stream": REQUEST,
            "strategy": {"name": "gs_lora", **SGD, "forget_optimizer": "sgd"},
            "audit": {"relearn_steps": 0, "samples": 40},
        },
        "apart": {**IMAGES, "strategy": {"name": f"{SHARDED}:Apart", **SGD}},
    }


def narrow(precision: str) -> dict[str, Any]:
    return {**IMAGES, "strategy": {"name": "naive", **SGD}, "fabric": {"precision": precision}}


def halved(given: dict[str, Any]) -> dict[str, Any]:
    """The same run on two processes: what is counted by process is half."""
    strategy = given["strategy"]
    own = {"replay_batch": strategy["replay_batch"] // 2} if "replay_batch" in strategy else {}
    return {"strategy": strategy | own, "loop": given.get("loop", {}) | {"batch_size": 3}, "fabric": FSDP}


def stopped(folder: Path, told: Path, **loop: Any) -> dict[str, Any]:
    """A run that is stopped in its fourth step, unless the file is there, with moments of Adam on its way."""
    strategy = {"name": f"{SHARDED}:Stopped", "told": str(told), "optimizer": "adamw", "lr": 0.01, **REPLAY}
    loop = {"max_steps": 6, "accumulate": 1, **loop}
    return config(folder, {**IMAGES, "loop": loop, "strategy": strategy}, fabric=FSDP)


def halted(folder: Path, name: str) -> dict[str, Any]:
    """A run that is stopped so, with SGD's momentum on its way, which other processes go on with."""
    strategy = {"name": f"{SHARDED}:Halted", "told": str(folder / f"{name} told"), "momentum": 0.9, **SGD}
    loop = {"max_steps": 6, "accumulate": 1, "batch_size": 3, "checkpoint_sharded": "parts" in name}
    return config(folder / name, {**IMAGES, "loop": loop, "strategy": strategy}, fabric=FSDP)


def left(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    return [{"config": halted(folder, name), "left": True} for name in names]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of all runs, by name: on one process, and on two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    given = cases(one)
    jobs: list[dict[str, Any]] = [{"config": config(two / n, case, **halved(case))} for n, case in given.items()]
    jobs.append({"config": stopped(two / "resumed", two / "told"), "resume": True})
    parts = stopped(two / "parts", two / "told too", checkpoint_sharded=True)
    jobs += [{"config": parts, "resume": True}, {"config": stopped(two / "straight", two / "told")}]
    again = {"activation_checkpointing": True}
    both = halved(given["lora"]) | {"loop": {"batch_size": 3} | again}
    jobs.append({"config": config(two / "again", given["lora"], **both)})
    jobs += [{"config": config(two / p, narrow(p), fabric=FSDP, loop={"batch_size": 3})} for p in NARROW]
    grown = [{"config": halted(two, name)} for name in MORE]
    on_processes(grown, FabricSettings(accelerator="cpu", devices=1, strategy="fsdp"), alone)
    jobs += left(two, MORE) + [{"config": halted(two, name)} for name in (*FEWER, "unhalted")]
    (two / "unhalted told").touch()
    on_processes(jobs, FabricSettings(accelerator="cpu", devices=2, strategy="fsdp"))
    on_processes(left(two, FEWER), FabricSettings(accelerator="cpu", devices=1, strategy="fsdp"), alone)
    plain = [{"config": config(one / name, case)} for name, case in given.items()]
    # What each process rounds for itself, one process rounds in turn.
    plain += [{"config": config(one / p, narrow(p), loop={"batch_size": 3, "accumulate": 4})} for p in NARROW]
    on_processes(plain + [{"config": config(one / "again" / n, given[n], loop=again)} for n in AGAIN])
    return one, two


@pytest.mark.parametrize("name", [*PLAIN, *REPLAYED, *ADAPTED, *FAMILIES, "gs_lora", "apart"])
def test_sharded_weights_end_where_one_process_does(runs: tuple[Path, Path], name: str) -> None:
    expected, found = (ended(folder / name) for folder in runs)
    assert expected["strategy"].keys() == found["strategy"].keys()
    for key, value in expected["strategy"].items():
        if not isinstance(value, torch.Tensor):
            continue
        if value.is_floating_point():
            torch.testing.assert_close(found["strategy"][key], value, atol=1e-5, rtol=0, equal_nan=True, msg=key)
        else:
            assert torch.equal(found["strategy"][key], value), key
    assert len(found["record"]["matrix"]) == len(expected["record"]["matrix"]) == 3
    for mine, other in zip(found["record"]["representation"], expected["record"]["representation"], strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    for key in ("trainable_parameters", "stored_bytes"):
        assert found["record"]["cost"][key] == expected["record"]["cost"][key]


@pytest.mark.parametrize("model", ["original", "unlearned"])
def test_the_audit_of_a_request_is_that_of_one_process(runs: tuple[Path, Path], model: str) -> None:
    def audited(folder: Path) -> dict[str, Any]:
        (numbers,) = (folder / "gs_lora").rglob(f"audit/001/{model}.json")
        return json.loads(numbers.read_text())

    expected, found = (audited(folder) for folder in runs)
    assert expected["aggregates"]["accuracy_erased"] is not None
    assert len(found.pop("model_sha256")) == len(expected.pop("model_sha256")) == 64
    mine, other = ({k: v for k, v in f.pop("aggregates").items() if isinstance(v, float)} for f in (found, expected))
    assert mine == pytest.approx(other, abs=1e-4)
    assert found == expected


@pytest.mark.parametrize(("precision", "within"), [("bf16-mixed", 1e-5), ("bf16-true", 2**-7)])
def test_in_fewer_bits_sharded_weights_end_where_one_process_does(
    runs: tuple[Path, Path], precision: str, within: float
) -> None:
    """Weights of 8 bits are rounded in each step, and their gradients before they are summed."""
    expected, found = (ended(folder / precision)["strategy"] for folder in runs)
    wide = ended(runs[0] / "naive")["strategy"]
    assert expected.keys() == found.keys() == wide.keys()
    weights = {key: value for key, value in expected.items() if key.endswith("weight")}
    for key, value in weights.items():
        torch.testing.assert_close(found[key], value, atol=within, rtol=within, msg=key)
    assert any((found[key].float() - wide[key]).abs().max() > 3e-5 for key in weights)


@pytest.mark.parametrize("name", [*MORE, *FEWER])
def test_a_run_on_sharded_weights_goes_on_with_another_number_of_processes(runs: tuple[Path, Path], name: str) -> None:
    found, straight = ended(runs[1] / name), ended(runs[1] / "unhalted")
    assert found["saves"] > straight["saves"]
    assert len(found["processes"]) == (2 if name in MORE else 1)
    for key, value in straight["strategy"].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found["strategy"][key], value, atol=1e-5, rtol=0, equal_nan=True, msg=key)


@pytest.mark.parametrize("name", AGAIN)
def test_passes_that_are_computed_again_learn_the_same(runs: tuple[Path, Path], name: str) -> None:
    same(ended(runs[0] / "again" / name), ended(runs[0] / name))


def test_sharded_weights_and_passes_computed_again_go_together(runs: tuple[Path, Path]) -> None:
    same(ended(runs[1] / "again"), ended(runs[1] / "lora"))


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """To the last bit."""
    assert found["record"]["matrix"] == expected["record"]["matrix"]
    for key, value in expected["strategy"].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found["strategy"][key], value, atol=0, rtol=0, equal_nan=True, msg=key)


def test_blocks_are_brought_together_one_by_one(runs: tuple[Path, Path]) -> None:
    (metrics,) = (runs[1] / "apart").rglob("metrics.jsonl")
    lines = [json.loads(line)["metrics"] for line in metrics.read_text().splitlines()]
    assert {line["strategy/parts"] for line in lines if "strategy/parts" in line} == {3.0}  # two blocks, and the rest


@pytest.mark.parametrize("name", ["resumed", "parts"])
def test_a_run_on_sharded_weights_resumes_exactly(runs: tuple[Path, Path], name: str) -> None:
    """From a checkpoint of the whole state, and from one of each process's part, which this process reads, too."""
    resumed, straight = ended(runs[1] / name), ended(runs[1] / "straight")
    assert (runs[1] / "told").is_file()
    assert resumed["saves"] > straight["saves"]  # it did stop
    same(resumed, straight)


def test_a_part_of_a_checkpoint_that_is_damaged_is_noticed(runs: tuple[Path, Path], tmp_path: Path) -> None:
    (checkpoints,) = (runs[1] / "parts").rglob("checkpoints")
    shutil.copytree(checkpoints, tmp_path / "checkpoints")
    before, newest = sorted((tmp_path / "checkpoints").iterdir())
    assert sorted(f.name for f in newest.iterdir()) == [
        "part-00000.safetensors", "part-00001.safetensors", "state.json", "tensors.safetensors"
    ]  # fmt: skip
    content = bytearray((newest / "part-00001.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "part-00001.safetensors").write_bytes(content)
    state, notes = checkpoint.load_newest(tmp_path / "checkpoints")
    assert "part-00001.safetensors does not match its checksum" in notes[0]
    assert state is not None
    assert state["saves"] < ended(runs[1] / "parts")["saves"]
    shutil.rmtree(before)
    (newest / "part-00001.safetensors").unlink()
    assert checkpoint.load_newest(tmp_path / "checkpoints")[0] is None
