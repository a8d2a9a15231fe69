"""Fixtures of tests of streams."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from texts import write_sets

import clplat
from clplat.errors import Interrupted
from clplat.run.loop import Runner


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> None:
    """An empty cache, and no data root."""
    monkeypatch.setenv("CLPLAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CLPLAT_DATA", raising=False)


@pytest.fixture
def sets(tmp_path) -> Path:
    """Two tasks to choose in, which share a label, and one of free text with two right answers a sample."""
    return write_sets(tmp_path / "sets")


@pytest.fixture
def cut(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Runs a configuration and stops it in experience 1, after so many steps; gives the run's folder."""
    original = Runner._between_steps

    def run(config: dict[str, Any], steps: int) -> Path:
        def interrupt(self, experience):
            self.stop_requested = self.progress.experience == 1 and self.progress.steps == steps
            original(self, experience)

        with monkeypatch.context() as patch:
            patch.setattr(Runner, "_between_steps", interrupt)
            with pytest.raises(Interrupted):
                clplat.run({**config, "output": str(tmp_path / "cut")}, quiet=True)
        (folder,) = (tmp_path / "cut").glob("*/*")
        return folder

    return run
