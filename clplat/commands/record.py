"""`clplat record`: trains SAC in an environment, and makes data sets of what it met and of what it does there.

    random   uniform actions                      replay   all that SAC met in training, the last episode broken off
    medium   SAC at the evaluation nearest to a third of the way from random to expert
    expert   SAC at the end of its training

Policies act as in training, by samples. References in each set: mean returns of random actions, and of the expert's
best guess (its policy's mode). The run for medium is the training run once more, cut off there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clplat.commands.arguments import Parser
from clplat.config.resolve import resolve
from clplat.config.settings import Config
from clplat.errors import UserError
from clplat.files import to_json

if TYPE_CHECKING:
    from clplat.run.recording import Episode
    from clplat.strategy import Strategy

TAKES_KEYS = True
KINDS = ("random", "medium", "replay", "expert")
STEPS, EVALUATIONS, MEDIUM = 20_000, 20, 1 / 3
_PLACES = ("name", "output", "data_root", "tracking")  # keys of a configuration that change no figure


def configure(parser: Parser) -> None:
    parser.usage = "clplat record ENV [--steps N] [--seed N] [--name NAME] [--key value ...]"
    parser.add_argument("env", metavar="ENV", help="gymnasium's id, such as Pendulum-v1")
    steps = f"of training, and of each set of data at least (default: {STEPS})"
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=steps)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default: 0)")
    parser.add_argument("--name", help="of the data in offline_rl/ of the data root (default: ENV/sac-STEPS-SEED)")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, only the results")


def help_text(own: list[str], keys: list[str]) -> str:
    """Keys of SAC's training."""
    from clplat.commands.keys import keys_help

    return "\n" + keys_help({"strategy": "sac", "stream": "rl", "backbone": "actor_critic"})


def main(args: argparse.Namespace) -> int:
    from clplat.run import checkpoint
    from clplat.run.recording import checked, facts_of, offline_root

    config = _training(args)
    name = args.name or f"{args.env.replace(':', '/')}/sac-{args.steps}-{args.seed}"
    if not re.fullmatch(r"\w[-\w]*(/\w[-\w]*)*", name):
        raise UserError(f"--name: {name!r} (valid: letters, digits, - and _, in parts between /)")
    root = offline_root(config.data_root)
    work, sets = root / ".recording" / name, {kind: root / name / f"{kind}-v0" for kind in KINDS}
    for folder in sets.values():
        if (known := facts_of(folder)) is not None:
            _check_same(known.get("clplat_config"), config, folder)
    if (missing := [kind for kind in KINDS if not sets[kind].exists()]) == []:
        print(f"all there already, nothing was done: {root / name}")
    else:
        checked(config.stream.options)
        work.mkdir(parents=True, exist_ok=True)
        held = checkpoint.lock(work)
        try:
            checkpoint.clean(work)
            _record(config, work, root, name, missing, args.quiet)
        finally:
            held.close()
    for kind, folder in sets.items():
        facts = facts_of(folder) or {}
        print(f"{kind:<8}{facts['total_episodes']:>6} episodes {facts['total_steps']:>8} steps   "
              f"mean return {facts['mean_return']:>9.2f}   {name}/{kind}-v0")  # fmt: skip
    print(f"references: random {facts['ref_min_score']:.2f}, expert {facts['ref_max_score']:.2f}; read them with "
          f"--stream rl --stream.env {args.env} --stream.data {name}/replay-v0")  # fmt: skip
    return 0


def _training(args: argparse.Namespace) -> Config:
    """The configuration of SAC's run."""
    if args.steps < 1:
        raise UserError(f"--steps: {args.steps} is out of range (valid: ≥ 1)")
    base = {
        "stream": {"name": "rl", "env": args.env, "env_steps": args.steps},
        "backbone": "actor_critic", "seed": args.seed, "name": "record",
        "strategy": {"name": "sac", "memory": args.steps, "random_steps": min(1000, args.steps // 10)},
        "loop": {"eval_every": max(1, args.steps // EVALUATIONS), "representation": False},
        "fabric": {"threads": 1}, "tracking": {"enabled": False},
    }  # fmt: skip
    config = resolve(args.keys, base)
    stream, plain = config.stream.options, resolve(config=base).stream.options
    faults = [f"strategy: {config.strategy.name}, but record trains sac"] * (config.strategy.name != "sac")
    faults += [f"stream: {config.stream.name}, but record acts in rl"] * (config.stream.name != "rl")
    if not faults:
        own = [k for k in stream if stream[k] != plain[k] and k != "env_options"]
        faults += [f"stream.{k}: {stream[k]!r} has no meaning here (valid: --steps, stream.env_options)" for k in own]
        if config.strategy.options["memory"] < args.steps:
            faults.append(f"strategy.memory: {config.strategy.options['memory']} loses part of the replay data (valid: "
                          f"≥ {args.steps}, the steps)")  # fmt: skip
    if faults:
        raise UserError(*faults)
    return config


def _record(config: Config, work: Path, root: Path, name: str, missing: list[str], quiet: bool) -> None:
    """Train, then write the sets that are missing."""
    from clplat.api import load
    from clplat.run.recording import checked, mean_return, met, play, trained_on, uniform, write

    gym, steps = checked(config.stream.options), config.stream.options["env_steps"]

    def episodes(kind: str, act: Callable[[Any], Any]) -> list[Episode]:
        with _progress(kind, steps, quiet) as tell:
            return play(gym, act, steps, len(KINDS) * config.seed + KINDS.index(kind), tell)

    train = _run(config, work / "train", quiet)
    expert, (evaluations, rows) = load(train), trained_on(train)
    chance = episodes("random", uniform(gym))
    returns = mean_return(chance), mean_return(episodes("expert", lambda o: expert.act(o, False)))
    if returns[0] >= returns[1]:
        raise UserError(
            f"record: SAC has learned nothing in {steps} steps: its mean return is {returns[1]:.2f}, that of random "
            f"actions {returns[0]:.2f} (valid: more --steps, or other --strategy keys; training is kept in {work})"
        )
    wanted = returns[0] + MEDIUM * (returns[1] - returns[0])
    at = min(evaluations, key=lambda e: abs(e[1] - wanted))[0]
    stream = dataclasses.replace(config.stream, options={**config.stream.options, "env_steps": at})
    made: dict[str, tuple[str, Callable[[], list[Episode]]]] = {
        "random": ("uniform actions", lambda: chance),
        "replay": (f"all that SAC met in {steps} steps", lambda: met(rows, gym)),
        "expert": (f"samples of SAC's policy after {steps} steps", lambda: episodes("expert", _samples(expert))),
        "medium": (f"samples of SAC's policy after {at} of {steps} steps", lambda: episodes("medium", _samples(
            load(_run(dataclasses.replace(config, stream=stream), work / f"medium-{at}", quiet))))),
    }  # fmt: skip
    plain = {k: v for k, v in json.loads(to_json(config.to_dict())).items() if k not in _PLACES}
    for kind, (about, find) in made.items():
        if kind in missing:
            found = find()
            facts: dict[str, Any] = {
                "returns": returns,
                "algorithm": "random" if kind == "random" else "SAC",
                "description": about,
            }
            facts |= {"mean_return": mean_return(found), "clplat_config": plain}
            write(root, f"{name}/{kind}-v0", gym, found, facts, scratch=work)


def _samples(learner: Strategy) -> Callable[[Any], Any]:
    return lambda observation: learner.act(observation, True)


def _run(config: Config, folder: Path, quiet: bool) -> Path:
    """The folder of a run that is complete: as found, gone on with, or begun."""
    from clplat.api import resume, run_config

    if (folder / "config.yaml").is_file():
        _check_same(resolve(config=folder / "config.yaml").to_dict(), config, folder)
        summary = folder / "summary.json"
        if summary.is_file() and json.loads(summary.read_text()).get("status") == "complete":
            return folder
        resume(folder, quiet=quiet)
    else:
        run_config(config, run_dir=folder, quiet=quiet)
    return folder


def _check_same(before: Any, config: Config, folder: Path) -> None:
    """Refuse what was recorded from another configuration, or from none that is known."""
    from clplat.run.summary import changes

    now = json.loads(to_json(config.to_dict()))
    changed = changes({**before, **{k: now[k] for k in _PLACES}}, config) if isinstance(before, dict) else "unknown"
    if changed:
        valid = "valid: another --name, or remove it"
        raise UserError(f"record: {folder} is of another configuration: {changed} ({valid})")


@contextmanager
def _progress(title: str, steps: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar with the time that is left; off a terminal nothing, since a set takes little beside the training."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr), transient=True, disable=quiet or not sys.stderr.isatty()) as bar:
        task = bar.add_task(f"{title}: {steps} steps", total=steps)
        yield lambda taken: bar.update(task, completed=taken)
