"""Shipped experiments, with the data at hand: what they ask for is still allowed."""

from __future__ import annotations

import pytest

from clplat.config.resolve import expand, experiments
from clplat.errors import MissingError, UserError
from clplat.run.build import build


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of environments that are out of date, as published
@pytest.mark.parametrize("name", list(experiments()))
def test_a_shipped_experiment_is_allowed(name: str) -> None:
    """Each arm is built with one seed, up to its data, weights or environments where they are not here."""
    missing, built = "", 0
    arms = {config.name: config for config in expand([], name)}
    for config in arms.values():
        try:
            build(config)
            built += 1
        except MissingError as error:
            missing = str(error)
        except UserError as error:
            if "clplat[robotics]" not in str(error):  # an extra for environments of its own
                raise
            missing = str(error)
    if not built:
        pytest.skip(missing)
