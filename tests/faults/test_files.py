"""Every file of a run's folder empty, cut in half, with one byte flipped, and missing; then everything that reads it.

Each ends in one line (a `UserError`) or in what the whole folder gives.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed import mixed_config

import clplat
from clplat.errors import UserError
from clplat.report.erasure import write_erasure
from clplat.report.write import report_command
from clplat.run import checkpoint

FILES = (
    "config.yaml", "summary.json", "metrics.jsonl", "ledger.json", "requests.json", "seal.json",
    "checkpoints/new/state.json", "checkpoints/new/tensors.safetensors", "checkpoints/old/state.json",
    "audit/002/original.json", "audit/002/original.safetensors", "audit/002/unlearned.json",
    "audit/002/unlearned.safetensors",
)  # fmt: skip


def empty(path: Path) -> None:
    path.write_bytes(b"")


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    """The last digit becomes another one: what is left is as well-formed as it was."""
    content = bytearray(path.read_bytes())
    at = max((i for i, byte in enumerate(content) if chr(byte).isdigit()), default=len(content) // 2)
    content[at] ^= 1
    path.write_bytes(bytes(content))


def missing(path: Path) -> None:
    path.unlink()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a request made after its end."""
    folder = tmp_path_factory.mktemp("whole")
    stream = {"name": "unlearning", "base": "digits", "base_options": {"experiences": 2}, "requests": ["class:3"]}
    strategy = {"name": "gradient_ascent", "lr": 0.05}
    config = mixed_config(folder) | {"strategy": strategy, "stream": stream, "head": "linear"}
    config["loop"] |= {"max_steps": 12, "eval_every": None, "representation": False}
    config["audit"] = {"samples": 20, "relearn_steps": 2}
    run_dir = clplat.run(config, quiet=True).run_dir
    clplat.forget(run_dir, "class:1")
    return run_dir


def resumed(run_dir: Path) -> Any:
    result = clplat.resume(run_dir, quiet=True)
    return result.metrics, result.accuracy_matrix, loaded(run_dir)


def loaded(run_dir: Path) -> Any:
    return {k: v.tolist() for k, v in clplat.load(run_dir).state_dict().items() if isinstance(v, torch.Tensor)}


def reported(run_dir: Path) -> Any:
    write_erasure(run_dir)
    found = json.loads((run_dir / "erasure.json").read_text())
    _, text = report_command([run_dir], run_dir / "out")
    return text, [{k: r[k] for k in ("name", "ids") if k in r} for r in found["requests"]]


def erased(run_dir: Path) -> Any:
    clplat.forget(run_dir, "class:2")
    return loaded(run_dir)


ACTIONS = (resumed, loaded, reported, erased)


@pytest.fixture(scope="module")
def expected(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = {}
    for action in ACTIONS:
        copy = tmp_path_factory.mktemp(action.__name__) / "run"
        shutil.copytree(whole, copy)
        found[action.__name__] = action(copy)
    return found


def file_of(run_dir: Path, name: str) -> Path:
    old, new = sorted((run_dir / "checkpoints").iterdir())
    return run_dir / name.replace("checkpoints/new", f"checkpoints/{new.name}").replace(
        "checkpoints/old", f"checkpoints/{old.name}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("damage", [empty, half, flipped, missing])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_or_changes_nothing(
    whole: Path, expected: dict[str, Any], tmp_path: Path, name: str, damage: Callable[[Path], None],
    action: Callable[[Path], Any],
) -> None:  # fmt: skip
    shutil.copytree(whole, tmp_path / "run")
    damage(file_of(tmp_path / "run", name))
    found, faults = None, ()
    try:
        found = action(tmp_path / "run")
    except UserError as error:
        faults = error.faults
    assert found == expected[action.__name__] if not faults else all("\n" not in f and len(f) < 400 for f in faults)


@pytest.mark.parametrize("damage", [empty, half, flipped, missing])
def test_a_report_shows_no_number_of_a_damaged_summary(
    whole: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    damage(tmp_path / "run" / "summary.json")
    with pytest.raises(UserError, match=r"summary\.json"):
        reported(tmp_path / "run")


def test_a_log_shorter_than_its_checkpoints_is_refused_and_not_filled_up(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    half(run_dir / "metrics.jsonl")
    before = (run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl has \d+ bytes, \d+ were written"):
        clplat.resume(run_dir, quiet=True)
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_a_log_that_only_the_earlier_checkpoint_fits_is_gone_on_with_from_there(
    whole: Path, expected: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    old, new = (json.loads(json.loads((p / "state.json").read_text())["state"])["items"]["metrics_offset"]
                for p in sorted((run_dir / "checkpoints").iterdir()))  # fmt: skip
    assert old < new
    path = run_dir / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: (old + new) // 2])
    assert resumed(run_dir) == expected["resumed"]
    assert "is passed over: metrics.jsonl has" in capsys.readouterr().err


def test_a_configuration_changed_by_hand_is_named(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    (run_dir / "seal.json").unlink()  # as a killed run leaves it
    path = run_dir / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.05", "lr: 0.5"))
    with pytest.raises(UserError, match=r"strategy\.lr: 0\.05 → 0\.5"):
        clplat.resume(run_dir, quiet=True)
    with pytest.raises(UserError, match=r"strategy\.lr: 0\.05 → 0\.5"):
        clplat.load(run_dir)


def test_requests_that_are_gone_are_missed(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    (run_dir / "seal.json").unlink()
    (run_dir / "requests.json").unlink()
    with pytest.raises(UserError, match=r"had 4 experiences, its stream has 3: put requests\.json"):
        clplat.resume(run_dir, quiet=True)


@pytest.mark.parametrize("state", [[1, 2], {"progress": 3}, "text", {"progress": {}, "strategy": [], "stream": {}}])
def test_a_forged_checkpoint_is_refused_in_one_line(whole: Path, tmp_path: Path, state: Any) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    checkpoint.save(run_dir / "checkpoints", 1, state)
    for action in (loaded, erased):
        with pytest.raises(UserError):
            action(run_dir)


def test_a_state_nested_beyond_reason_is_damage(whole: Path, tmp_path: Path) -> None:
    import hashlib

    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    for path in (run_dir / "checkpoints").iterdir():
        outer = json.loads((path / "state.json").read_text())
        outer["state"] = '{"$dict":"str","items":{"a":' + "[" * 100_000 + "]" * 100_000 + "}}"
        outer["state_sha256"] = hashlib.sha256(outer["state"].encode()).hexdigest()
        (path / "state.json").write_text(json.dumps(outer))
    with pytest.raises(UserError, match="damaged"):
        clplat.load(run_dir)
    (run_dir / "seal.json").unlink()
    (run_dir / "summary.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(UserError, match="cannot be read"):
        report_command([run_dir], run_dir / "out")


def test_checkpoints_that_are_links_are_not_followed(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    shutil.move(run_dir / "checkpoints", tmp_path / "elsewhere")
    (run_dir / "checkpoints").symlink_to(tmp_path / "elsewhere")
    for action in (loaded, resumed, erased):
        with pytest.raises(UserError, match="is a link"):
            action(run_dir)


def test_an_audit_may_be_deleted_when_it_has_served(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "audit")
    reported(run_dir)
    assert "not audited" in (run_dir / "erasure.json").read_text()
