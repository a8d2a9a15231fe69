"""`clplat new`: a strategy or a stream in one file, which runs and passes `clplat check`, to change it."""

from __future__ import annotations

import argparse
import importlib.util
import keyword
import re
from pathlib import Path

from clplat.commands.arguments import Parser
from clplat.config import discovery
from clplat.errors import UserError
from clplat.files import write_atomic

KINDS = {"strategy": "strategies", "stream": "streams"}


def configure(parser: Parser) -> None:
    parser.add_argument("kind", choices=tuple(KINDS), metavar="KIND", help="strategy or stream")
    parser.add_argument("name", metavar="NAME", help="of the file NAME.py, written here: lower case, as in my_method")


def main(args: argparse.Namespace) -> int:
    name, kind = args.name, args.kind
    file = Path(f"{name}.py")
    refuse(name, kind, file)
    cls = "".join(part.capitalize() for part in name.split("_"))
    text = (STRATEGY if kind == "strategy" else STREAM).replace("my_name", name).replace("MyName", cls)
    write_atomic(file, text.encode())
    print(file)
    print(f"check it:  clplat check {file}")
    print(f"run it:    clplat run {'--strategy' if kind == 'strategy' else '--strategy er --stream'} {file}")
    return 0


def refuse(name: str, kind: str, file: Path) -> None:
    """Raise UserError where NAME.py can't be written, or would be taken for something else."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(
            f"new: '{name}' is no name for a file of Python (valid: lower case, digits and _, as my_method)"
        )
    if file.exists() or file.is_symlink():
        raise UserError(f"new: {file} is there already, and is not overwritten (valid: another name, or move it away)")
    if name in discovery.entries(KINDS[kind]):
        raise UserError(f"new: '{name}' is a {kind} already (valid: another name; see clplat list {KINDS[kind]})")
    if importlib.util.find_spec(name) is not None:
        raise UserError(f"new: a file {file} here would hide Python's module '{name}' (valid: another name)")


STRATEGY = '''"""my_name: fine-tuning that is pulled back to the weights with which an experience began. To be changed.

Source   Li, Grandvalet, Davoine, "Explicit Inductive Bias for Transfer Learning", ICML 2018, arXiv:1802.01483 (L2-SP).
    loss = CE(f(x; θ), y) + λ / 2 · ‖θ − θ*‖²        θ* the weights before the experience
Differs  θ* is taken anew before each experience, and holds for the head too.
"""

from clplat import Kind, PerParameter, Strategy, require, trainable


class MyName(Strategy):
    """Fine-tuning with an anchor. B samples of a batch.

    Args:
        strength: λ ≥ 0, of the pull; 0 makes this `naive`.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:1802.01483"

    def __init__(self, *, strength: float = 0.01, **base):
        super().__init__(**base)
        require("strength", strength, strength >= 0, "≥ 0")
        self.strength, self.anchor = strength, PerParameter(self.model)  # saved with the strategy

    def grow(self, experience):
        super().grow(experience)  # the head's new rows
        self.anchor.grow(self.model)

    def begin(self, experience):
        named = trainable(self.model)  # what the user froze stays out
        for weight, held in zip(named.values(), self.anchor.of(named), strict=True):
            held.copy_(weight.detach())

    def training_step(self, batch, batch_idx):
        x, y = batch  # (B, ...), (B,)
        named = trainable(self.model)
        pull = sum((w - held).square().sum() for w, held in zip(named.values(), self.anchor.of(named), strict=True))
        return self.mean_loss(x, y) + self.strength / 2 * pull
'''

STREAM = '''"""my_name: clouds of points, a class each, a few classes at a time. To be changed: `read` your own data."""

import torch

from clplat import UserError
from clplat.data.scenarios import ScenarioStream, Source


def read(name, per_class, spread):
    """Inputs (N, 8) and labels (N,) of six classes; drawn from a generator of their own, never from a global one."""
    centres = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed({"train": 1, "test": 2}[name])
    labels = torch.arange(6).repeat_interleave(per_class)
    return centres[labels] + spread * torch.randn(len(labels), 8, generator=noise), labels


class MyName(ScenarioStream):
    """Six clouds of points in eight dimensions.

    Args:
        seed: of everything drawn; null takes the run's seed.
        data_root: folder of data sets, not needed here.
        per_class: samples of each class, to learn from and held out, ≥ 1.
        spread: deviation of the points around the middle of their class, > 0.
    """

    def __init__(self, *, seed=None, data_root=None, per_class: int = 50, spread: float = 0.5, **scenario):
        if per_class < 1:
            raise UserError(f"stream.per_class: {per_class} is out of range (valid: ≥ 1)")
        if spread <= 0:
            raise UserError(f"stream.spread: {spread} is out of range (valid: > 0)")
        source = Source(read("train", per_class, spread), read("test", per_class, spread))
        super().__init__(source, seed=seed, **scenario)  # experiences, class_order …
'''
