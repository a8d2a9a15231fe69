"""Where a run stands, counted so that a resumed run goes on from there exactly."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """Where a run stands. All counts are of finished things."""

    experience: int = 0  # the current one
    begun: bool = False  # grow and begin have run for it
    trained: bool = False  # its steps and `end` are done
    epoch: int = 0
    batch: int = 0  # of the epoch, or of the adapt stream
    steps: int = 0  # optimizer steps (or turns of a learner without gradients) in this experience
    gradient_steps: int = 0  # optimizer steps alone, in this experience
    total_steps: int = 0  # over the whole run
    episode: int = 0  # of an interact experience: begun
    env_step: int = 0  # taken in its environment
    measured_first_row: bool = False  # the evaluation before any training
