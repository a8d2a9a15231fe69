"""Starting from another run's weights, and what the loop owes to requests and test data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import clplat
from clplat.cli import main
from clplat.errors import UserError
from clplat.run import checkpoint
from clplat.run.step import total_steps
from clplat.stream import Data, Experience, Kind, Stream

SMALL: dict[str, Any] = {
    "stream": {"name": "digits", "experiences": 2, "scenario": "class"}, "backbone": {"name": "mlp", "hidden": [8]},
    "head": "linear", "strategy": "naive", "tracking": {"enabled": False}, "loop": {"max_steps": 4},
}  # fmt: skip


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "source.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"output": "elsewhere", "seed": 5} | changes))
    return path


def weights(run_dir: Path) -> dict[str, Tensor]:
    state, _ = checkpoint.load_newest(run_dir / "checkpoints")
    assert state is not None
    return state["strategy"]


def begun(tmp_path: Path, run: Path, **start: Any) -> Path:
    """A run that starts from `run` and does not move."""
    loop = {"max_epochs": 0, "batch_size": 32}
    config = SMALL | {"output": str(tmp_path), "start": {"run": str(run), **start}, "loop": loop, "seed": 1}
    return Path(clplat.run(config, quiet=True).run_dir)


def test_weights_are_those_of_the_run_and_the_head_only_when_asked(tmp_path: Path) -> None:
    source = Path(clplat.run(SMALL, output=str(tmp_path), seed=5, quiet=True).run_dir)
    for head in (False, True):
        found, given = weights(begun(tmp_path, source, head=head)), weights(source)
        for name, value in given.items():
            if name.startswith("model.backbone."):
                assert torch.equal(found[name], value), name
        assert torch.equal(found["model.head.weight"], given["model.head.weight"]) == head


def test_a_configuration_is_run_once_with_its_own_seed(tmp_path: Path) -> None:
    source = written(tmp_path)
    one = begun(tmp_path, source)
    made = list((tmp_path / "start").iterdir())
    assert len(made) == 1
    stamp = (made[0] / "summary.json").stat().st_mtime_ns
    two = begun(tmp_path, source)
    assert (made[0] / "summary.json").stat().st_mtime_ns == stamp
    kept = {n: t for n, t in weights(made[0]).items() if n.startswith("model.backbone.")}
    assert all(torch.equal(weights(run)[n], t) for run in (one, two) for n, t in kept.items())
    written(tmp_path, seed=6)
    begun(tmp_path, source)
    assert len(list((tmp_path / "start").iterdir())) == 2


def test_a_cut_start_is_gone_on_with(tmp_path: Path) -> None:
    source = written(tmp_path)
    begun(tmp_path, source)
    made = next((tmp_path / "start").iterdir())
    whole = weights(made)
    (made / "summary.json").unlink()
    begun(tmp_path, source)
    assert all(torch.equal(weights(made)[n], t) for n, t in whole.items())


def test_a_dry_run_makes_no_start(tmp_path: Path) -> None:
    config = SMALL | {"output": str(tmp_path / "out"), "start": {"run": str(written(tmp_path))}}
    clplat.run(config, dry_run=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changes", "says"), [
    ({"start.run": "no_such"}, "start.run: no_such: config: 'no_such' is neither a file nor an experiment"),
    ({"start.head": True}, "start.head: true, but start.run names no run"),
    ({"loop.max_epochs": 0}, "loop.max_epochs: 0 is out of range (valid: ≥ 1, or 0 with start.run)"),
    ({"loop.forget_epochs": 0}, "loop.forget_epochs: 0 is out of range (valid: ≥ 1)"),
])  # fmt: skip
def test_mistakes_are_one_line(
    tmp_path: Path, changes: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, output=str(tmp_path / "out"))
    flags = [t for k, v in changes.items() for t in (f"--{k}", str(v).lower() if v is True else str(v))]
    assert main(["run", str(path), *flags]) == 2
    assert capsys.readouterr().err.strip().removeprefix("clplat: ") == says
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = Path(clplat.run(SMALL, output=str(tmp_path), quiet=True).run_dir)
    with pytest.raises(UserError, match=r"start.run: the backbone of .* does not fit: "):
        clplat.run(
            SMALL | {"backbone": {"name": "mlp", "hidden": [9]}}, output=str(tmp_path), start={"run": str(source)}
        )
    with pytest.raises(UserError, match=r"start.head: the head of .* does not fit: "):
        clplat.run(SMALL, head="growing", output=str(tmp_path), start={"run": str(source), "head": True}, quiet=True)


class Moving(clplat.Strategy):
    """Takes a step of Adam on each test batch; its moments tell whether the optimizer was made anew."""

    kinds = frozenset({Kind.LEARN, Kind.FORGET, Kind.ADAPT})
    paper = "none"

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.model(batch[0]).square().mean()

    def forget_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen = [*getattr(self, "seen", []), self.rows.tolist()]
        return self.model(batch[0]).square().mean()

    def adapt_step(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(inputs)
        return logits, logits.square().mean()


def pieces(*kinds: Kind) -> Stream:
    inputs, labels = torch.rand(24, 3), torch.arange(24) % 2
    data = [Data(inputs, labels, torch.arange(8 * k, 8 * k + 8)) for k in range(len(kinds))]
    experiences = [Experience(k, f"e{k}", kind, data[k], classes=(0, 1)) for k, kind in enumerate(kinds)]
    if Kind.FORGET in kinds:
        ids = tuple(f"sample:{row}" for row in range(8))
        experiences[1] = Experience(1, "e1", Kind.FORGET, data[0], request=ids)
    return Stream(experiences, num_classes=2, input_shape=(3,))


def moving(stream: Stream) -> Moving:
    from clplat.backbones.base import Classifier
    from clplat.backbones.heads import Linear
    from clplat.backbones.mlp import MLP

    torch.manual_seed(0)
    return Moving(model=Classifier(MLP(3, [4]), Linear(4, 2)), optimizer="adam", lr=0.01)


def runner_over(stream: Stream, **loop: Any) -> Any:
    from clplat.config.settings import FabricSettings, LoopSettings
    from clplat.run.build import new_record
    from clplat.run.launch import make_fabric
    from clplat.run.loop import Runner
    from clplat.run.runlog import RunLog

    fabric = make_fabric(FabricSettings(accelerator="cpu"))
    fabric.launch()
    settings = LoopSettings(**loop, representation=False)
    return Runner(moving(stream), stream, settings, fabric, 0, RunLog(None, 0.0), new_record(stream))


def steps_of(runner: Any) -> float:
    return float(next(iter(runner.optimizer.state.values()))["step"])


def test_the_optimizer_goes_on_over_pieces_of_test_data_and_nowhere_else() -> None:
    stream = pieces(Kind.ADAPT, Kind.ADAPT, Kind.LEARN)
    runner = runner_over(stream, batch_size=4, stop_after=2)
    runner.run()
    assert steps_of(runner) == 4
    runner.loop.stop_after = None
    runner.run()
    assert steps_of(runner) == 2


def test_forget_epochs_and_rows() -> None:
    stream = pieces(Kind.LEARN, Kind.FORGET)
    runner = runner_over(stream, batch_size=8, max_epochs=1, forget_epochs=3)
    runner.run()
    assert [sorted(rows) for rows in runner.strategy.seen] == [list(range(8))] * 3
    assert total_steps(runner, stream[1]) == 3


def test_retraining_goes_back_to_before_the_start_run(tmp_path: Path) -> None:
    """And not to weights that may have seen what is to be erased."""
    from clplat.config.resolve import resolve
    from clplat.run.build import build

    source = clplat.run(SMALL, output=str(tmp_path / "source"), quiet=True, seed=5).run_dir
    config = resolve(config=SMALL | {"strategy": "retrain", "start": {"run": str(source), "head": True}, "seed": 1})
    started, alone = build(config, source)[1], build(config)[1]
    trained = {n: t for n, t in weights(source).items() if n.startswith("model.")}
    for name, own in alone.model.state_dict().items():
        assert torch.equal(started.initial.model.state_dict()[name], own), name
        assert torch.equal(started.model.state_dict()[name], trained[f"model.{name}"]), name
        assert not torch.equal(own, trained[f"model.{name}"]), name
