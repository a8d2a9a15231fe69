"""Which of the moments to kill a run at `.ci/run` tries, and which `make faults` alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def halved(moments: Iterable[Any]) -> list[Any]:
    """Arguments of `pytest.mark.parametrize`: every second one is left to `make faults`, which tries all."""
    return [
        pytest.param(*(m if isinstance(m, tuple) else (m,)), marks=[pytest.mark.thorough] * (place % 2))
        for place, m in enumerate(moments)
    ]
