"""A budget of floating-point operations for each experience (`loop.max_flops`), and the steps that it buys.

Source   memory-adjusted FLOPs (MAFs), by which FoMo-in-Flux gives every method the same compute: Roth et al., "A
         Practitioner's Guide to Continual Multimodal Pretraining", NeurIPS 2024, arXiv:2408.14471.
    MAF = F · M / M_full        steps = ⌊B / MAF⌋
         F: FLOPs of an optimizer step, over all processes; M, M_full: peak memory in training, by this method and by
         full fine-tuning; M / M_full is `loop.memory_ratio`, B is `loop.max_flops`.
Differs  F is that of the second step of each experience, as in `train_flops`, so what `begin` and `end` compute (EWC's
         Fisher information) is free; their table has a step of EWC at 99 times one of fine-tuning.
"""

from __future__ import annotations

from clplat.config.settings import Config, LoopSettings
from clplat.errors import UserError
from clplat.strategy import Strategy

LEAST = 2  # steps that are taken before it is known what one costs


def steps_bought(loop: LoopSettings, flops: float) -> int:
    """Steps that an experience may take by its budget, which there is.

    Args:
        flops: of one batch, over all processes, > 0.

    >>> steps_bought(LoopSettings(max_flops=63394.7585 * 1420, memory_ratio=37.58 / 46.59), 57254.6)
    1949
    """
    assert loop.max_flops is not None
    return int(loop.max_flops / (flops * loop.accumulate * loop.memory_ratio) + 1e-9)  # n steps of F are n, not n − 1


def faults(config: Config, strategy: Strategy) -> list[str]:
    """The fault of a learning rate that would have to know how many steps there will be."""
    budget, key = config.loop.max_flops, "warmup" if strategy.schedule == "constant" else "schedule"
    if budget is None or (key == "warmup" and not strategy.warmup):
        return []
    return [
        f"loop.max_flops: {budget:g} ends an experience at a step that strategy.{key} would have to know before the "
        "first (valid: null, with the steps as loop.max_steps; or a constant rate)"
    ]


def check(loop: LoopSettings, flops: float, name: str) -> None:
    """Refuse a budget that can't be kept in experience `name`, a batch of which costs `flops` over all processes.

    Raises:
        UserError: it buys fewer steps than have been taken by now, or steps cost nothing that is counted.
    """
    if not flops:
        raise UserError(
            f"loop.max_flops: {loop.max_flops:g}, but no FLOPs are counted in a step of {name} (valid: null)"
        )
    bought = steps_bought(loop, flops)
    if bought < LEAST:
        least = LEAST * flops * loop.accumulate * loop.memory_ratio
        raise UserError(
            f"loop.max_flops: {loop.max_flops:g} buys {bought} steps of {name} (valid: ≥ {least:g}, which is what "
            f"{LEAST} cost; or null)"
        )
