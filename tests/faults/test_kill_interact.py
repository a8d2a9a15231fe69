"""Killed while it acts, a run goes on with every transition once, and ends as if it had not been killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from killing import killed, whole
from test_interaction import assert_same, config, outcome
from thorough import halved


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("straight")
    return outcome(whole(written(folder), folder))


def written(folder: Path) -> str:
    path = folder / "acting.yaml"
    path.write_text(yaml.safe_dump(config(folder)))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"),
    halved([("explore", 20), ("evaluate", 290), ("explore", 130), ("evaluate", 900), ("explore", 215)]),
)
def test_killed_while_acting_it_resumes_exactly(kind: str, count: int, straight: Any, tmp_path: Path) -> None:
    """Before the first update, after it, in the second episode, in episodes of evaluation."""
    assert_same(outcome(killed(written(tmp_path), tmp_path, kind, count)), straight)
