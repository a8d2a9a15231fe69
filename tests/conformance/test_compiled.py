"""Every strategy with passes that torch compiles (`fabric.compile`), or why it is refused; `make support` asks.

The backend is `aot_eager`: it traces and joins passes as the one that makes kernels does, and computes them as torch
does otherwise.
"""

import pytest
import torch

from clplat.config import discovery
from clplat.config.settings import Config, FabricSettings, Part
from clplat.run import compiling
from clplat.testing import Subject
from clplat.testing.subject import State

NAMES = [name for name, e in discovery.entries("strategies").items() if e.qualname.startswith("clplat.")]
COMPILED = Config(*[Part("tiny")] * 3, fabric=FabricSettings(compile=True))


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.support
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_compiled_passes_end_where_plain_ones_do(name, seen, monkeypatch):
    mine = Subject(name)
    stream = mine.stream()
    strategy = mine.build(stream)
    if faults := compiling.faults(COMPILED, strategy, stream):
        return seen(name, "compile", faults[0])
    monkeypatch.setattr(compiling, "OPTIONS", {"backend": "aot_eager", "dynamic": True})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trial = mine.trial(strategy, stream)
    trial.compiled = True
    found = mine.finish(trial).state
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
    plain = mine.straight.state
    assert State(plain.plain, found.tensors).differences(plain, 1e-5) == []
    return seen(name, "compile")
