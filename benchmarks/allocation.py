"""A step of EfficientNet-Lite0 on 16 images of 224 pixels in a process that keeps its memory, and in one that does not.

Both are processes of their own, as the C library's ways can't be put back; processor time, the system's included.
"""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.startup import environment
from benchmarks.timing import Row, paired

LIMIT = 0.9
STEPS = """
import json, resource, sys
import timm, torch
from clplat.run.allocation import keep_freed

if sys.argv[1] == "kept":
    assert keep_freed()
size, steps = int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(0)
net = timm.create_model("tf_efficientnet_lite0", num_classes=10)
optimizer = torch.optim.SGD(net.parameters(), 0.01)
images, labels = torch.rand(16, 3, size, size), torch.arange(16) % 10

def step():
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(net(images), labels).backward()
    optimizer.step()

def spent():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

step()
before = spent()
for _ in range(steps):
    step()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
print(json.dumps({"seconds": (spent() - before) / steps, "MB": peak}))
"""


def cost(how: str, quick: bool) -> dict[str, float]:
    command = [sys.executable, "-c", STEPS, how, *(("32", "1") if quick else ("224", "5"))]
    return json.loads(subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout)


def rows(quick: bool = False) -> list[Row]:
    """Time of a step, and the process's peak memory."""
    pairs = [(cost("kept", quick), cost("given back", quick)) for _ in range(1 if quick else 5)]
    times, peaks = ([[pair[side][key] for pair in pairs] for side in (0, 1)] for key in ("seconds", "MB"))
    return [
        paired("step, EfficientNet-Lite0, freed memory kept", "s", *times, "ratio", None if quick else LIMIT),
        paired("peak memory of it", "MB", *peaks, "difference"),
    ]
