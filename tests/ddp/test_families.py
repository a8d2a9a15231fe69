"""What looks at a batch as a whole, or at what is padded in it, on two processes against one: on models that know their
classes by words, and an encoder of texts."""

from __future__ import annotations

from functools import partial

import pytest
from families import OnFamily

from clplat.testing.checks_of_processes import compare, in_processes

REPLAY = ("er", "derpp", "ilora", "agem", "lwf")  # of what is drawn alike: CLIP's classes that compete
ASKED = {
    "clip": (*REPLAY, "naive", "vr_lwf", "loramoe", "moram"),
    "encoder": ("ilora", "loramoe", "coact", "l2p"),
    "llama": ("ilora", "loramoe", "moram"),
    "t5": ("ilora", "loramoe", "moram"),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ASKED)
def test_two_processes_end_where_one_does(family: str) -> None:
    make = partial(OnFamily, family=family)
    found = in_processes(list(ASKED[family]), make)
    for name in ASKED[family]:
        compare(make(name), found[name])
