"""Objects for stream, strategy and backbone: from Python, told by their content when the run is gone on with."""

import os
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

import clplat
from clplat import CodeError, Data, Experience, Kind, MissingError, Strategy, Stream, UserError
from clplat.cli import main
from clplat.config.digest import digest
from clplat.streams.arrays import Arrays
from clplat.streams.digits import Digits

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(80, 6)).astype("float32"), np.arange(80) % 4
FAIL = [False]
LAMBDA = 0.5


class Mine(Strategy):
    """Fine-tuning that can break off.

    Args:
        scale: of the loss, > 0.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "none"

    def __init__(self, *, scale: float = 1.0, **base):
        super().__init__(**base)
        self.scale = scale

    def training_step(self, batch, batch_idx):
        if FAIL[0] and self.global_batch and batch_idx == 2:
            raise ZeroDivisionError("broken off")
        return self.scale * self.mean(F.cross_entropy(self.model(batch[0]), batch[1], reduction="none"))


def arrays(x=X, y=Y, **options):
    return {"name": "arrays", "train": (x, y), "test": (x, y), "experiences": 2, **options}


def net(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU())


@pytest.fixture
def run(tmp_path):
    """`clplat.run` of a small run in a folder of its own; of what is given nothing else is set."""

    def start(**given):
        options = {"strategy": "naive", "stream": arrays(), "backbone": "mlp", "output": str(tmp_path / "runs")}
        loop = {"batch_size": 8, "representation": False}
        return clplat.run(**options | {"loop": loop, "tracking": {"enabled": False}, "quiet": True} | given)

    return start


def folders(tmp_path):
    return [p for p in (tmp_path / "runs").rglob("*") if p.is_dir()] if (tmp_path / "runs").exists() else []


# --- what is taken ------------------------------------------------------------------------------------------------


def test_a_class_of_a_notebook_is_taken(run, monkeypatch):
    """There `__main__` has no file, for which Python's `inspect` has an error of its own."""
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    cell = {"__name__": "__main__", "Strategy": Strategy, "Kind": Kind}
    exec(CELL, cell)
    result = run(strategy={"name": cell["OfCell"], "scale": 0.25}, loop={"max_steps": 2})
    assert "scale: 0.25" in (result.run_dir / "config.yaml").read_text()
    right, half = clplat.load(result.run_dir, strategy=cell["OfCell"])(X).ids.numpy() == Y, Y // 2
    last = [float(right[half == i].mean()) for i in range(2)]
    assert last == pytest.approx(result.accuracy_matrix[-1])
    with pytest.raises(UserError, match=r"strategy\.scle: no such key \(did you mean strategy\.scale"):
        run(strategy={"name": cell["OfCell"], "scle": 0.25})


CELL = '''
class OfCell(Strategy):
    """Of a cell."""

    kinds = frozenset({Kind.LEARN})
    paper = "none"

    def __init__(self, *, scale: float = 1.0, **base):
        super().__init__(**base)
        self.scale = scale

    def training_step(self, batch, batch_idx):
        return self.scale * self.mean(self.losses(*batch))
'''


def test_arrays_of_every_library_give_the_run_of_their_file(run, tmp_path):
    import pandas

    np.savez(tmp_path / "a.npz", train_inputs=X, train_labels=Y, test_inputs=X, test_labels=Y)
    expected = run(stream={"name": "arrays", "path": str(tmp_path / "a.npz"), "experiences": 2}).accuracy_matrix
    frame, series = pandas.DataFrame(X, columns=list("abcdef")), pandas.Series(Y, index=np.arange(80)[::-1])
    for x, y in ((X, Y), (torch.from_numpy(X), torch.from_numpy(Y)), (frame, series)):
        assert run(stream=arrays(x, y)).accuracy_matrix == expected
    whole = Arrays(train=(X, Y), test=(X, Y), experiences=2)
    assert run(stream=whole).accuracy_matrix == expected
    assert whole[0].train.inputs.device.type == "cpu"
    assert run(stream={"name": Arrays, "train": (X, Y), "test": (X, Y), "experiences": 2}).accuracy_matrix == expected


def test_frames_whose_columns_differ_are_refused(run):
    import pandas

    train, test = pandas.DataFrame(X, columns=list("abcdef")), pandas.DataFrame(X, columns=list("bacdef"))
    with pytest.raises(UserError, match=r"stream\.test: columns differ from those of train"):
        run(stream={"name": "arrays", "train": (train, Y), "test": (test, Y)})


def test_a_class_takes_options_and_is_named_by_what_it_is(run):
    result = run(strategy={"name": Mine, "scale": 2.0, "lr": 0.05})
    config = yaml.safe_load((result.run_dir / "config.yaml").read_text())
    assert config["strategy"]["scale"] == 2.0
    assert config["strategy"]["name"] == f"Mine@python:{digest(Mine)}" == result.summary["from_python"]["strategy"]
    assert result.run_dir.parent.name == "Mine-arrays-mlp"
    with pytest.raises(UserError, match=r"strategy\.scal: no such key \(did you mean strategy\.scale"):
        run(strategy={"name": Mine, "scal": 2.0})
    assert run(strategy=Mine, **{"strategy.lr": 0.05, "strategy.scale": 2.0}).accuracy_matrix == result.accuracy_matrix


def test_a_class_written_in_a_function_runs(run):
    from clplat.strategies.er import ER

    class Local(ER):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)

    result = run(strategy={"name": Local, "memory": 20})
    assert result.accuracy_matrix == run(strategy={"name": "er", "memory": 20}).accuracy_matrix


def test_a_network_is_a_backbone_and_stays_as_it_was(run):
    given = net()
    before = {k: v.clone() for k, v in given.state_dict().items()}
    result = run(backbone=given)
    assert all(torch.equal(v, given.state_dict()[k]) for k, v in before.items())
    learner = clplat.load(result.run_dir, backbone=given)
    assert learner.model.head.in_features == 8
    assert [type(b).__name__ for b in learner.model.backbone.blocks] == ["Linear", "ReLU"]
    assert not torch.equal(learner.model.backbone.net[0].weight, given[0].weight)

    def make(input_shape, width: int = 5):
        return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0], width))

    result = run(backbone={"name": make, "width": 7})
    assert clplat.load(result.run_dir, backbone=make).model.head.in_features == 7


def test_streams_within_streams(run):
    request = {"name": "unlearning", "requests": ["class:1"]}
    few = {"strategy": "gradient_ascent", "loop": {"max_steps": 3}, "audit": {"enabled": False}}
    named = run(**few, stream=request | {"base": "digits", "base_options": {"experiences": 2}})
    base = Digits(experiences=2, seed=0)
    for given in ({"base": base}, {"base": Digits, "base_options": {"experiences": 2}}):
        assert run(**few, stream=request | given).accuracy_matrix == named.accuracy_matrix
    assert len(base) == 2
    with pytest.raises(UserError, match=r"stream\.base_options\.experience: no such key"):
        run(**few, stream=request | {"base": Digits, "base_options": {"experience": 2}})


def test_a_benchmark_of_avalanche_is_a_stream(run):
    from types import SimpleNamespace

    def stream(shift):
        parts = [
            [(torch.from_numpy(x) + shift, int(y), 0) for x, y in zip(X, Y, strict=True) if y // 2 == i] for i in (0, 1)
        ]
        return [SimpleNamespace(dataset=p, task_labels=[0]) for p in parts]

    given = SimpleNamespace(train_stream=stream(0), test_stream=stream(0))
    result = run(stream=given)
    assert [e["train_samples"] for e in result.summary["experiences"]] == [40, 40]
    assert run(stream=given, resume=True).run_dir == result.run_dir
    other = SimpleNamespace(train_stream=stream(0), test_stream=stream(1))
    with pytest.raises(UserError, match=r"resume: stream\.benchmark: .* was begun with SimpleNamespace@python"):
        run(stream=other, resume=True)


def test_what_is_no_part_is_refused_in_a_line_and_leaves_nothing(run, tmp_path):
    cases = [
        (r"strategy: an instance of Mine, which holds a model already \(valid: .*strategy=Mine",
         {"strategy": Mine(model=nn.Linear(1, 1))}),
        (r"strategy: <class '.*Digits'>", {"strategy": Digits}),
        (r"stream: .*valid: .*'train': \(X, Y\)", {"stream": (X, Y)}),
        (r"backbone: <class '.*Linear'> \(valid: .*without its last layer", {"backbone": nn.Linear}),
        (r"backbone: Linear can't be run on inputs \(2, 6\)", {"backbone": nn.Linear(3, 2)}),
        (r"backbone: Unflatten gives \(2, 2, 3\) for two inputs", {"backbone": nn.Unflatten(1, (2, 3))}),
        (r"stream\.path: tuple is not text or null", {"stream": {"name": "arrays", "path": (X, Y)}}),
        (r"stream\.train: .*lock.* can't be told by its content", {"stream": arrays() | {"train": threading.Lock()}}),
        (r"train_labels holds <U1|train_labels hold", {"stream": arrays(X, Y.astype(str))}),
        (r"backbone: has no linear layers of role attention", {"strategy": "lora", "backbone": net()}),
    ]  # fmt: skip
    for message, given in cases:
        with pytest.raises(UserError, match=message):
            run(**given)
        assert folders(tmp_path) == [], message


# --- going on -----------------------------------------------------------------------------------------------------


def test_a_run_broken_off_is_gone_on_with_given_the_same(run, monkeypatch):
    options = {"strategy": Mine, "backbone": net(), "stream": arrays()}
    options["loop"] = {"batch_size": 8, "checkpoint_every": 1}
    whole = run(**options, seed=1)
    monkeypatch.setitem(globals(), "FAIL", FAIL)
    FAIL[0] = True
    try:
        with pytest.raises(
            CodeError, match=r"in Mine\.training_step, .*test_given\.py, line \d+: ZeroDivisionError: broken off"
        ):
            run(**options)
    finally:
        FAIL[0] = False
    for other, key in (
        ({"stream": arrays(X + 1)}, r"stream\.train"),
        ({"backbone": net(9)}, "backbone"),
        ({"strategy": type("Mine", (Mine,), {})}, "strategy"),
    ):
        with pytest.raises(UserError, match=rf"^resume: {key}: .* was begun with \w+@python:\w+, and this is another"):
            run(**options | other, resume=True)
    with pytest.raises(UserError, match=r"another configuration: strategy\.scale: 1\.0 → 3\.0"):
        run(**options, resume=True, **{"strategy.scale": 3.0})
    result = run(**options, resume=True)
    assert result.status == "complete"
    assert [d for d in result.run_dir.parent.iterdir() if d.name.split("-")[2].startswith("0")] == [result.run_dir]
    assert result.accuracy_matrix == run(**options, output=str(result.run_dir / "again")).accuracy_matrix
    assert run(**options, resume=True, seed=1).run_dir == whole.run_dir


def test_resume_and_load_ask_for_what_was_given(run, capsys):
    result = run(strategy=Mine, backbone=net())
    head = (result.run_dir / "config.yaml").read_text().splitlines()[0]
    assert head.startswith("# strategy, stream.train, stream.test, backbone: given in Python")
    assert "given in Python: config.yaml alone can't repeat this run" in capsys.readouterr().err
    with pytest.raises(UserError) as refused:
        clplat.resume(result.run_dir, backbone=net())
    assert [f.partition(":")[0] for f in refused.value.faults] == ["strategy", "stream.train", "stream.test"]
    assert clplat.resume(result.run_dir, stream=arrays(), strategy=Mine, backbone=net()).metrics == result.metrics
    with pytest.raises(UserError, match=r"clplat\.load\(RUN_DIR, strategy=Mine\)"):
        clplat.load(result.run_dir, backbone=net())
    learner = clplat.load(result.run_dir, strategy=Mine, backbone=net())
    assert isinstance(learner, Mine)
    with pytest.raises(UserError, match=r"load: backbone: .* this is another"):
        clplat.load(result.run_dir, strategy=Mine, backbone=net(9))
    with pytest.raises(UserError, match=r"takes objects for stream, strategy and backbone alone \(got lr\)"):
        clplat.resume(result.run_dir, lr=3)
    for words in (
        ["run", "--resume", str(result.run_dir)],
        ["run", str(result.run_dir)],
        ["validate", str(result.run_dir)],
    ):
        assert main(words) == 2
        assert "strategy: Mine@python:" in (said := capsys.readouterr().err)
        assert "clplat.resume(RUN_DIR, strategy=Mine)" in said


def test_a_finished_run_with_objects_is_asked_to_forget(run):
    base = Digits(experiences=2, seed=0)
    stream = {"name": "unlearning", "base": base, "requests": ["class:1"]}
    result = run(strategy="gradient_ascent", stream=stream, loop={"max_steps": 3}, audit={"enabled": False})
    with pytest.raises(UserError, match=r"stream\.base: Digits@python:\w+ was given in Python"):
        clplat.forget(result.run_dir, "class:7")
    clplat.forget(result.run_dir, "class:7", stream=stream)


def test_processes_that_cannot_be_given_the_objects_are_not_started(run, tmp_path):
    class Local(Mine):
        pass

    with pytest.raises(UserError, match=r"fabric\.devices: 2, but Local@python:\w+ can't be sent to another process"):
        run(strategy=Local, fabric={"devices": 2, "accelerator": "cpu"})
    assert folders(tmp_path) == []


# --- digests ------------------------------------------------------------------------------------------------------


def variants():
    """Pairs that differ in one thing each, and are the same but for it."""

    def strategy(scale=1.0, add=0, text="a"):
        class One(Strategy):
            __doc__ = text

            def training_step(self, batch, batch_idx, k=scale):
                return k + add

        return One

    data = {"inputs": torch.zeros(4, 2), "labels": torch.tensor([0, 1, 0, 1])}

    def stream(**other):
        e = Experience(0, "a", Kind.LEARN, train=Data(**data | other), classes=(0, 1))
        return Stream([e], num_classes=2, input_shape=(2,))

    dropout = [nn.Sequential(nn.Dropout(p)) for p in (0.1, 0.1, 0.2)]
    return [
        (strategy(), strategy(text="b"), strategy(scale=2.0)),
        (strategy(add=1), strategy(add=1), strategy(add=2)),
        (lambda: LAMBDA, lambda: LAMBDA, lambda: FAIL),
        (stream(), stream(), stream(labels=torch.tensor([0, 1, 1, 1]))),
        (stream(), stream(rows=None), stream(rows=torch.arange(3))),
        (stream(world=lambda x: x + 1), stream(world=lambda x: x + 1), stream(world=lambda x: x + 2)),
        (net(), net().eval(), net(9)),
        tuple(dropout),
        (np.zeros(3), np.zeros(6)[::2], np.zeros(3, "float32")),
        tuple(torch.zeros(2, dtype=d) for d in (torch.bfloat16, torch.bfloat16, torch.float16)),
        ({"a": 1, "b": {3, 4}}, {"b": {4, 3}, "a": 1}, {"a": 1, "b": {3, 5}}),
        (("ab", "c"), ("ab", "c"), ("a", "bc")),
        (np.random.default_rng(0), np.random.default_rng(0), np.random.default_rng(1)),
    ]  # fmt: skip


@pytest.mark.parametrize("case", range(len(variants())))
def test_a_digest_tells_what_differs_and_nothing_else(case):
    one, same, other = variants()[case]
    assert digest(one) == digest(same)
    assert digest(one) != digest(other)


def test_a_constant_of_its_file_is_part_of_a_function(monkeypatch):
    def uses():
        return LAMBDA

    before = digest(uses)
    monkeypatch.setitem(globals(), "LAMBDA", 0.7)
    assert digest(uses) != before


SCRIPT = """
import torch
from clplat import Kind, Strategy
from clplat.config.digest import digest
from clplat.streams.digits import Digits

class Mine(Strategy):
    kinds = frozenset({Kind.LEARN, Kind.FORGET})

    def training_step(self, batch, batch_idx):
        return 1 if batch in {"a", "b", "c"} else super().x

torch.manual_seed(0)
print(digest(Mine), digest(torch.nn.LSTM(2, 3)), digest(Digits(scenario="rotated", seed=3)))
"""


def test_digests_are_the_same_in_another_process(tmp_path):
    (tmp_path / "one.py").write_text(SCRIPT)
    said = set()
    for seed, words in (("1", [str(tmp_path / "one.py")]), ("2", ["-c", SCRIPT])):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.add(done.stdout)
    assert len(said) == 1
    assert len(said.pop().split()) == 3


def test_missing_data_are_still_missing(run):
    with pytest.raises(MissingError):
        run(stream={"name": "arrays", "path": "nowhere.npz"}, strategy=Mine)
