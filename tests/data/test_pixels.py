"""Images as observations: given by the environment, or pictures of it; in memory, encoder, checkpoint and learner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clplat
from clplat.data.environments import Maker
from clplat.data.pixels import Pictures, layout_of, scaled
from clplat.data.transitions import unpack
from clplat.errors import UserError
from clplat.run import checkpoint

gymnasium = pytest.importorskip("gymnasium", reason="needs the extra rl")
Box = gymnasium.spaces.Box


class Images(gymnasium.Env):
    """An image of bytes (16, 18, 3) whose first channel tells the step; 9 steps an episode."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    observation_space = Box(0, 255, (16, 18, 3), np.uint8)
    action_space = Box(-1, 1, (2,))

    def __init__(self, render_mode: str | None = None, side: int = 16) -> None:
        self.render_mode, self.at = render_mode, 0
        self.observation_space = Box(0, 255, (side, side + 2, 3), np.uint8)

    def render(self) -> np.ndarray:
        image = np.zeros(self.observation_space.shape, np.uint8)
        image[..., 0], image[0, 0, 1] = 20 * self.at, 255
        return image

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.at = 0
        return self.render(), {}

    def step(self, action: Any) -> Any:
        self.at += 1
        return self.render(), 1.0, False, self.at == 9, {}


@pytest.fixture
def config(tmp_path: Path) -> Any:
    gymnasium.register("Images-v0", Images)
    yield {
        "stream": {"name": "rl", "env": "Images-v0", "env_steps": 12},
        "backbone": {"name": "actor_critic", "actor_hidden": [4], "critic_hidden": [4], "encoder": "cnn",
                     "encoder_width": 4, "features": 6},
        "strategy": {"name": "sac", "batch": 4, "memory": 50},
        "loop": {"eval_episodes": 1, "representation": False},
        "tracking": {"enabled": False},
        "output": str(tmp_path / "runs"),
    }  # fmt: skip
    del gymnasium.registry["Images-v0"]


@pytest.mark.parametrize(("shape", "layout"), [((16, 18, 3), "last"), ((3, 16, 18), "first"), ((12, 84, 84), "first")])
def test_channels_are_the_shorter_axis(shape: Any, layout: str) -> None:
    assert layout_of("x", Box(0, 255, shape, np.uint8)) == layout
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = images.transpose(2, 0, 1) if layout == "last" else images
    assert np.array_equal(scaled(images, layout) * np.float32(255), expected.astype(np.float32) / 255 * np.float32(255))


@pytest.mark.parametrize(
    "space", [Box(0, 255, (8, 8, 8), np.uint8), Box(-1, 1, (3, 8, 8)), Box(0, 255, (8, 3, 8), np.uint8)]
)
def test_what_may_be_no_image_is_refused(space: Any) -> None:
    with pytest.raises(UserError, match=r"stream.env: x has observations of .* \(valid: vectors, or images of bytes"):
        layout_of("x", space)


def test_what_the_environment_shows_reaches_memory_channels_first_in_unit_range(config: Any) -> None:
    run = clplat.run(config, quiet=True).run_dir
    state, _ = checkpoint.load_newest(run / "checkpoints")
    assert state["stream"]["input_shape"] in ([3, 16, 18], (3, 16, 18))
    t = unpack(state["strategy"]["memory.stored.rows"][:12], 2)
    seen = t.observation.reshape(12, 3, 16, 18)
    at = torch.tensor([*range(9), 0, 1, 2])
    assert torch.equal(seen[:, 0], (20 * at / 255).float()[:, None, None].expand(12, 16, 18))
    assert torch.equal(seen[:, 1].flatten(1).nonzero(), torch.stack([torch.arange(12), torch.zeros(12)], 1).long())
    assert torch.equal(t.next_observation.reshape(12, 3, 16, 18)[:, 0, 0, 0], (20 * (at + 1) / 255).float())
    learner = clplat.load(run)
    raw = Images().reset()[0]
    prepared = torch.from_numpy(scaled(raw, "last"))
    assert np.array_equal(learner(raw), learner(prepared))
    with pytest.raises(UserError, match=r"images \(3, 16, 18\) \(valid: \(16x18x3\)"):
        learner(raw.transpose(2, 0, 1))


def test_pictures_are_stacked_shrunk_and_repeated_at_first() -> None:
    shown = Pictures(2)
    picture = np.zeros((4, 8, 3), np.uint8)
    picture[:2, :4, 2] = 255
    seen = shown.add(picture, first=True)
    assert seen.shape == (9, 2, 2)
    assert seen[2].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert np.array_equal(seen[:3], seen[6:])
    later = shown.add(np.zeros_like(picture), first=False)
    assert [float(later[k].sum()) for k in (2, 5, 8)] == [1.0, 1.0, 0.0]


def test_pictures_of_an_environment_are_observed_and_saved_with_it(config: Any) -> None:
    first, second = Maker("Images-v0", pixels=4)(), Maker("Images-v0", pixels=4)()
    assert first.shape == (9, 4, 4)
    first.reset(seed=0), second.reset(seed=0)
    for _ in range(3):
        first.step([0.0, 0.0])
    second.restore(first.state())
    a, b = first.step([0.0, 0.0])[0], second.step([0.0, 0.0])[0]
    assert np.array_equal(a, b)
    assert a[::3, 3, 3].tolist() == pytest.approx([40 / 255, 60 / 255, 80 / 255])
    config["stream"] |= {"pixels": 8}
    config["backbone"] |= {"encoder": "vit"}
    clplat.run(config, quiet=True)


@pytest.mark.parametrize(
    ("stream", "backbone", "said"),
    [
        ({}, {"encoder": "none"}, "backbone.encoder: 'none' .*observations are images"),
        ({"env": "Pendulum-v1"}, {}, "takes images"),
        ({"data": "pendulum_expert.npz"}, {}, "stream.data: .*recorded images are not read"),
        ({"sequence": [{}, {"env_options": {"side": 20}}]}, {}, r"\(3, 16, 18\).*\(3, 20, 22\).* differ"),
        ({"pixels": -1}, {}, "stream.pixels: -1"),
    ],
    ids=["encoder", "vector", "data", "sizes", "pixels"],
)
def test_what_does_not_fit_is_refused_in_one_line(
    config: Any, stream: Any, backbone: Any, said: str, tmp_path: Path
) -> None:
    if "data" in stream:
        keys = ("observations", "next_observations")
        arrays = {k: np.zeros((4, 864)) for k in keys} | {"actions": np.zeros((4, 2)), "rewards": np.zeros(4)}
        np.savez(tmp_path / "d.npz", terminals=np.zeros(4, bool), timeouts=np.arange(4) == 3, **arrays)
        stream = {"data": str(tmp_path / "d.npz")}
    config["stream"] |= stream
    config["backbone"] |= backbone
    with pytest.raises(UserError, match=said) as caught:
        clplat.run(config, quiet=True)
    assert len(str(caught.value).splitlines()) == 1
