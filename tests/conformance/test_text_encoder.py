"""Every strategy that learns or forgets conforms on an encoder of texts; any other one is built or says why not."""

from contextlib import suppress
from functools import partial

import pytest
import torch
from rings import ELSEWHERE

from clplat.backbones.heads import Growing
from clplat.backbones.text_encoder import TextEncoder, text_encoder
from clplat.config import discovery
from clplat.errors import UserError
from clplat.run.build import seed_everything
from clplat.testing import CHECKS, Subject, judge
from clplat.testing.checks_of_state import resume
from clplat.testing.streams import CLASSES, TinyStream

ENTRIES = {n: e for n, e in discovery.entries("strategies").items() if e.qualname.startswith("clplat.")}
OF_IMAGES = {"vr_lwf", "self_distillation_fpt"}  # they ask for an image tower, or for patches of images
WRITING = {n for n in ENTRIES if Subject(n).cls.needs_text}  # they ask for a model that writes
ASKED = sorted(n for n, e in ENTRIES.items() if set(e.kinds) <= {"learn", "forget"} and n not in OF_IMAGES | WRITING)
FAST = ("acil", "er", "gs_lora", "lora")
LEVELS = 12
# A random direction, to which `rmu` steers a network that has learned next to nothing, may be that of the class.
NOT_ASKED = {"rmu": {"erasure"}}
midway = partial(resume, once=True)  # every other place to stop is tried on the suite's own networks


class Quantised(TextEncoder):
    """Reads each number of an input (B, 3, 4, 4) as one of a few tokens; every fourth sample loses its last ones."""

    def features(self, inputs):
        ids = torch.bucketize(inputs.flatten(1), torch.linspace(-2, 2, LEVELS - 1)) + 3  # (B, 48)
        ids = ids.masked_fill((torch.arange(48) >= 44) & (ids[:, :1] % 4 == 0), -1)
        return super().features(torch.stack([ids, ids], 1))


def small(shape):
    return Quantised(text_encoder((2, 48), dim=8, depth=2, heads=2, vocabulary=LEVELS + 3).net, 48)


def subject(name):
    """A strategy that the suite builds on the encoder, not on the first of its own backbones."""
    found = Subject(name)
    found.__dict__["backbone"] = small
    if name == "ewc":  # its default diverges here: the squared gradients of an encoder are large
        own = found.options
        found.__dict__["options"] = lambda processes=1: own(processes) | {"penalty": 1.0}
    return found


def test_none_is_left_out():
    assert len(ASKED) >= 22


@pytest.mark.support
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ASKED])
def test_conforms(name, seen):
    mine = subject(name)
    asked = [check for check in CHECKS if check not in ELSEWHERE | NOT_ASKED.get(name, set())]
    results = [judge(mine, check, midway if check == "resume" else None) for check in asked]
    assert not [f"{r.name}: {r.message}" for r in results if r.status == "failed"]
    assert sum(r.status == "passed" for r in results) >= 6
    seen(name, "text_encoder")


@pytest.mark.parametrize("name", sorted(set(ENTRIES) - set(ASKED)))
def test_others_are_built_or_refused_in_a_line(name):
    mine = Subject(name)
    stream = TinyStream(mine.cls.kinds)
    if stream.answers is not None:
        pytest.skip("acts, and has no classes")
    seed_everything(0)
    model = small(stream.input_shape).assemble(Growing(8, CLASSES), None)
    with suppress(UserError):  # anything else is a traceback
        mine.cls(model=model, **mine.options())
