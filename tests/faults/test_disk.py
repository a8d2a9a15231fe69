"""A full disk and damaged checkpoints: one clear line, and the last good state is still there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mixed import mixed_config

import clplat
from clplat.errors import UserError
from clplat.run import checkpoint


@pytest.fixture
def straight(tmp_path: Path) -> Any:
    return clplat.run(mixed_config(tmp_path / "straight"), quiet=True, **{"loop.checkpoint_every": 4})


@pytest.fixture
def fill_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let so many more flushes succeed, then none: what a full disk does to a writer."""

    def arrange(left: int) -> None:
        real, count = os.fsync, iter(range(left))

        def full(handle: int) -> None:
            if next(count, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(handle)

        monkeypatch.setattr(os, "fsync", full)

    return arrange


@pytest.mark.parametrize("left", [9, 20, 41])
def test_disk_full_while_writing(
    left: int, straight: Any, fill_disk: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(left)
    with pytest.raises(UserError, match=r"could not write .*No space left on device; the run can be resumed"):
        clplat.run(mixed_config(tmp_path / "full"), quiet=True, **{"loop.checkpoint_every": 4})
    monkeypatch.undo()
    (run_dir,) = (tmp_path / "full" / "mixed").iterdir()
    assert not list(run_dir.rglob("*.part"))
    state, notes = checkpoint.load_newest(run_dir / "checkpoints")
    assert state is not None
    assert not notes
    resumed = clplat.resume(run_dir, quiet=True)
    assert resumed.accuracy_matrix == straight.accuracy_matrix
    assert resumed.metrics == straight.metrics


def test_damaged_newest_checkpoint_falls_back_and_says_so(straight: Any, capsys: pytest.CaptureFixture[str]) -> None:
    newest = sorted((straight.run_dir / "checkpoints").iterdir())[-1]
    (newest / "tensors.safetensors").write_bytes((newest / "tensors.safetensors").read_bytes()[:-100])
    resumed = clplat.resume(straight.run_dir, quiet=True)
    assert f"{newest.name} is damaged" in capsys.readouterr().err  # quiet or not
    assert resumed.accuracy_matrix == straight.accuracy_matrix
    assert resumed.metrics == straight.metrics


def test_all_checkpoints_damaged_starts_over_and_says_so(straight: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (straight.run_dir / "checkpoints").iterdir():
        (path / "state.json").write_text("{")
    resumed = clplat.resume(straight.run_dir, quiet=True)
    assert "no whole checkpoint is left: starting from the beginning" in capsys.readouterr().err
    assert resumed.accuracy_matrix == straight.accuracy_matrix


def test_loading_a_run_without_a_whole_checkpoint(straight: Any) -> None:
    for path in (straight.run_dir / "checkpoints").iterdir():
        (path / "state.json").write_text("{")
    with pytest.raises(UserError, match="does not hold its last checkpoint whole") as caught:
        clplat.load(straight.run_dir)
    assert len(caught.value.faults) == 1 + checkpoint.KEEP
    with pytest.raises(UserError, match="is no run directory"):
        clplat.load(straight.run_dir / "nowhere")
