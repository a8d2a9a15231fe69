"""Frames of evaluation episodes: kept where asked for, and refused before anything runs where there are none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import clplat
from clplat.errors import UserError
from clplat.run.filming import HEIGHT, strip

gymnasium = pytest.importorskip("gymnasium", reason="needs the extra rl")
LENGTH = 20


class Counter(gymnasium.Env):
    """A picture's shade tells how many steps were taken."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode, self.at = render_mode, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.at = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self.at += 1
        return np.zeros(2, np.float32), 1.0, False, self.at == LENGTH, {}

    def render(self) -> np.ndarray:
        return np.full((64, 64, 3), 10 * self.at, np.uint8)


class Dark(Counter):
    metadata = {"render_modes": []}  # noqa: RUF012


@pytest.fixture
def config(tmp_path: Path) -> Any:
    for cls in (Counter, Dark):
        gymnasium.register(f"{cls.__name__}-v0", cls)
    yield {
        "stream": {"name": "rl", "env": "Counter-v0", "env_steps": 30, "returns": [0, 20]},
        "backbone": {"name": "actor_critic", "actor_hidden": [4], "critic_hidden": [4]},
        "strategy": {"name": "sac", "batch": 4},
        "loop": {"eval_episodes": 1, "eval_frames": 3, "representation": False},
        "tracking": {"enabled": False},
        "output": str(tmp_path / "runs"),
    }
    for cls in (Counter, Dark):
        del gymnasium.registry[f"{cls.__name__}-v0"]


def test_frames_go_from_the_first_to_the_last_and_stand_in_the_report(config: Any) -> None:
    run = clplat.run(config, quiet=True).run_dir
    assert sorted(f.name for f in (run / "frames").iterdir()) == ["0-after.png", "0-before.png"]
    picture = np.asarray(Image.open(run / "frames" / "0-before.png").convert("RGB"))
    assert picture.shape == (HEIGHT, 3 * HEIGHT + 2 * 2, 3)
    shades = [int(picture[60, k * (HEIGHT + 2) + 60, 0]) for k in range(3)]
    assert shades == [0, 100, 200]  # steps 0, 10 and 20
    page = (run / "report.html").read_text()
    assert len(re.findall(r'<img alt="[^"]{20,}" src="data:image/png;base64,', page)) == 2
    assert "img-src data:" in page


def test_none_are_kept_unless_asked_for(config: Any) -> None:
    config["loop"]["eval_frames"] = 0
    run = clplat.run(config, quiet=True).run_dir
    assert not (run / "frames").exists()
    assert "img-src" not in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("stream", "said"),
    [({"env": "Dark-v0"}, "Dark-v0 draws no pictures"), ({"name": "digits"}, "has no interact experience")],
)
def test_what_draws_nothing_is_refused_before_anything_runs(config: Any, stream: Any, said: str) -> None:
    if "name" in stream:
        config |= {"stream": stream, "backbone": {"name": "mlp"}, "strategy": {"name": "naive"}}
    config["stream"] |= stream
    with pytest.raises(UserError, match=rf"loop\.eval_frames: .*{said}"):
        clplat.run(config, quiet=True)
    assert not Path(config["output"]).exists()


def test_what_is_rendered_must_be_a_picture() -> None:
    with pytest.raises(UserError, match=r"rendered float64 \(4, 4\)"):
        strip([np.zeros((4, 4))])
