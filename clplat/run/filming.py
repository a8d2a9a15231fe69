"""Frames of evaluation episodes: what the policy does at the hand-over and at the end, as strips of pictures.

Files are `frames/<experience>-before.png` and `-after.png` of the run's folder: the first evaluation episode, its
frames evenly spaced from the first to the last, side by side.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from clplat.errors import ClplatError, UserError
from clplat.files import write_atomic
from clplat.run.state import RunState
from clplat.strategy import evaluating
from clplat.stream import Experience, Kind, Stream

HEIGHT = 128  # of a frame in a strip, in pixels


def faults(stream: Stream, frames: int) -> list[str]:
    """Why `loop.eval_frames` can't be had of this stream; asks each environment for a picture."""
    acting = [e for e in stream if e.kind is Kind.INTERACT]
    if not frames:
        return []
    if not acting:
        return ["loop.eval_frames: the stream has no interact experience (valid: 0)"]
    found = []
    for e in acting:
        maker: Any = e.environment
        if not hasattr(maker, "rendered"):
            found.append(f"loop.eval_frames: the environment of {e.name} can't be rendered (valid: 0)")
            continue
        try:
            environment = maker.rendered()
            environment.reset(seed=0)
            environment.render()
            environment.close()
        except ClplatError as error:
            found += error.faults
    return list(dict.fromkeys(found))


def film(run: RunState, experience: Experience, seed: int, when: str) -> None:
    """Write the strip of the episode that begins from `seed`; nothing without `loop.eval_frames` or a run's folder."""
    folder = run.log.run_dir
    if not run.loop.eval_frames or folder is None:
        return
    maker: Any = experience.environment
    length, _ = _play(run, maker(), seed)  # first without pictures, which cost more than the steps
    at = np.linspace(0, length, min(run.loop.eval_frames, length + 1)).round().astype(int)
    environment = maker.rendered()
    _, pictures = _play(run, environment, seed, at.tolist())
    environment.close()
    (folder / "frames").mkdir(exist_ok=True)
    write_atomic(folder / "frames" / f"{experience.index}-{when}.png", strip(pictures))


def _play(run: RunState, environment: Any, seed: int, at: Sequence[int] = ()) -> tuple[int, list[np.ndarray]]:
    """One greedy episode: its length, and pictures of it before the steps `at`."""
    pictures: list[np.ndarray] = []
    with evaluating(run.strategy), torch.no_grad(), torch.random.fork_rng():
        observation, _ = environment.reset(seed=seed)
        step, done = 0, False
        while True:
            if step in at:
                pictures.append(environment.render())
            if done:
                return step, pictures
            observation, _, terminated, truncated, _ = environment.step(run.strategy.act(observation, False))
            step, done = step + 1, bool(terminated or truncated)


def strip(pictures: list[np.ndarray]) -> bytes:
    """Pictures (H, W, 3) of bytes side by side as PNG, `HEIGHT` pixels high.

    Raises:
        UserError: what was rendered is none.
    """
    from PIL import Image

    scaled = []
    for picture in pictures:
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise UserError(f"loop.eval_frames: rendered {picture.dtype} {picture.shape} (valid: bytes (H, W, 3))")
        image = Image.fromarray(picture)
        scaled.append(image.resize((max(1, round(image.width * HEIGHT / image.height)), HEIGHT)))
    whole = Image.new("RGB", (sum(s.width for s in scaled) + 2 * (len(scaled) - 1), HEIGHT), "white")
    left = 0
    for image in scaled:
        whole.paste(image, (left, 0))
        left += image.width + 2
    target = io.BytesIO()
    whole.quantize(64).save(target, format="PNG", optimize=True)
    return target.getvalue()
