"""ACU in the loop, over streams with requests: exact against a learner that never saw what was erased."""

import numpy as np
import pytest
import torch

from clplat import Data, Experience, Kind, Stream
from clplat.config.settings import FabricSettings, LoopSettings
from clplat.errors import UserError
from clplat.metrics.cost import stored_bytes
from clplat.run.build import new_record
from clplat.run.launch import make_fabric
from clplat.run.loop import Runner
from clplat.run.runlog import RunLog
from clplat.strategies.acu import ACU
from clplat.streams.unlearning import Unlearning

PER_CLASS = 12


@pytest.fixture
def base(experiences):
    """Three experiences of two classes; the test sets are the training sets."""

    def make(**options):
        scored = [
            Experience(e.index, e.name, Kind.LEARN, e.train, e.train, classes=e.classes) for e in experiences(**options)
        ]
        return Stream(scored, num_classes=6, input_shape=(5,))

    return make


@pytest.fixture
def run(model):
    """A run over a stream; gives the runner."""

    def start(stream, *, loop=None, **options):
        torch.manual_seed(0)
        strategy = ACU(model=model(hidden=(60,)), **{"width": 40, **options})
        settings = LoopSettings(
            **{"batch_size": 8, "checkpoint_seconds": None, "representation": False, **(loop or {})}
        )
        fabric = make_fabric(FabricSettings(accelerator="cpu"))
        runner = Runner(strategy, stream, settings, fabric, 0, RunLog(None, 0.0), new_record(stream))
        runner.run()
        return runner

    return start


def only(base, keep):
    """The base with those training rows only for which `keep(rows, labels)` holds, whole classes left out."""
    kept = []
    for e in base:
        rows = e.train.rows[keep(e.train.rows, e.train.targets())]
        data = Data(e.train.inputs, e.train.labels, rows)
        if len(rows):
            kept.append(Experience(len(kept), e.name, Kind.LEARN, data, e.test, classes=e.classes))
    return Stream(kept, num_classes=6, input_shape=(5,))


def same(one, other):
    """Equal sums, bit for bit, and heads to the error of a solve."""
    a, b = one.strategy.ridge, other.strategy.ridge
    b.grow(len(a.counts))
    assert torch.equal(a.counts, b.counts)
    assert torch.equal(a.gram.tril(), b.gram.tril())
    assert torch.equal(a.cross, b.cross)
    assert (a.weight - b.weight).norm() <= 1e-10 * b.weight.norm()
    x = one.stream[0].train.inputs
    mine, theirs = one.strategy.eval().predict(x), other.strategy.eval().predict(x)
    assert torch.equal(mine.argmax(1), theirs.argmax(1))
    finite = mine.isfinite()
    assert torch.equal(finite, theirs.isfinite())
    assert (mine - theirs)[finite].abs().max() < 1e-9


REQUESTS = {
    "class": (["class:1"], lambda r, y: y != 1),
    "classes": ([["class:0", "class:5"]], lambda r, y: (y != 0) & (y != 5)),
    "samples": ([[f"sample:{r}" for r in (0, 7, 30, 71)]], lambda r, y: ~torch.isin(r, torch.tensor([0, 7, 30, 71]))),
    "many samples": ([[f"sample:{r}" for r in range(20)]], lambda r, y: r >= 20),
    "experience": (["experience:e1"], lambda r, y: (y != 2) & (y != 3)),
    "one after another": (["class:1", ["sample:0", "sample:40"], "experience:e2"],
                          lambda r, y: (y != 1) & (y < 4) & (r != 0) & (r != 40)),
    "between": ([{"erase": ["class:0"], "after": "e0"}, {"erase": ["sample:30"], "after": "e1"}],
                lambda r, y: (y != 0) & (r != 30)),
    "and learned again": ([{"erase": ["class:0"], "after": "e0"}, {"learn": ["class:0"], "after": "e1"}],
                          lambda r, y: r >= 0),
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"inverse": False}, {"per_class": True}, {"bits": 16}])
@pytest.mark.parametrize("request_", REQUESTS)
def test_a_request_leaves_the_learner_that_never_saw_the_samples(base, run, request_, options):
    requests, keep = REQUESTS[request_]
    erased = run(Unlearning(base=base(), requests=requests), **options)
    never = run(only(base(), keep), loop={"batch_size": 11}, **options)
    same(erased, never)
    assert not erased.strategy.request.stored  # nothing of the request is kept


def test_without_rounding_it_is_so_to_a_billionth(base, run):
    requests, keep = REQUESTS["one after another"]
    a = run(Unlearning(base=base(), requests=requests), bits=None).strategy.ridge.weight
    b = run(only(base(), keep), bits=None).strategy.ridge
    b.grow(a.shape[1])
    assert (a - b.weight).norm() < 1e-9 * a.norm()


def test_by_statistics_no_data_are_read(base, run):
    """A class goes without one of its samples; what the request brings of them is not looked at."""
    stream = Unlearning(base=base(), requests=["class:1", "experience:e2"])
    steps = []

    class Watched(ACU):
        def forget_step(self, batch, batch_idx):
            steps.append(len(batch[1]))
            return super().forget_step(batch, batch_idx)

    torch.manual_seed(0)
    for per_class, expected in ((True, []), (False, [8, 4, 8, 8, 8])):
        steps.clear()
        runner = run(stream, per_class=per_class)
        learner = Watched(model=runner.strategy.model, width=40, per_class=per_class)
        fabric, loop = make_fabric(FabricSettings(accelerator="cpu")), LoopSettings(batch_size=8, representation=False)
        Runner(learner, stream, loop, fabric, 0, RunLog(None, 0.0), new_record(stream)).run()
        assert steps == expected
        assert learner.ridge.counts.tolist() == [12, 0, 12, 12, 0, 0]


def test_what_statistics_and_inverse_cost(base, run):
    """8 d² bytes for the sums, as much for the inverse, and for each class."""
    plain = stored_bytes(run(base(), inverse=False).strategy)
    d = 40
    assert stored_bytes(run(base(), inverse=True).strategy) - plain == 8 * d * d
    assert stored_bytes(run(base(), inverse=False, per_class=True).strategy) - plain == 6 * 8 * d * d


def test_an_erased_class_is_never_predicted(base, run):
    erased = run(Unlearning(base=base(), requests=["class:1"]))
    x = torch.randn(50, 5)
    assert erased.strategy.eval().predict(x)[:, 1].isneginf().all()
    erased.strategy.ridge.weight.abs_().neg_()
    logits = erased.strategy.predict(x)
    assert (logits < 0).all()  # the zero of its column would win
    assert (logits.argmax(1) != 1).all()
    assert erased.record.matrix[-1][3] == 0.0
    assert erased.record.matrix[-1][0] == pytest.approx(0.5)


def test_a_request_counts_once_however_many_epochs(base, run):
    requests, keep = REQUESTS["samples"]
    erased = run(Unlearning(base=base(), requests=requests), loop={"max_epochs": 3})
    same(erased, run(only(base(), keep)))


def test_predictions_keep_to_the_old_head_until_the_request_is_whole(base, run):
    runner = run(base())
    strategy = runner.strategy
    before = {k: v.clone() for k, v in strategy.ridge.state_dict().items()}
    data = Data(runner.stream[0].train.inputs, runner.stream[0].train.labels, torch.arange(12))
    request = Experience(3, "forget", Kind.FORGET, data, classes=(0,), request=("class:0",))
    strategy.grow(request)
    strategy.begin(request)
    for rows in torch.arange(12).split(8):
        raw, labels = data.batch(rows)
        strategy.raw, strategy.global_batch = raw, len(rows)
        assert strategy.forget_step((raw, labels), 0) is None
        assert all(torch.equal(v, before[k]) for k, v in strategy.ridge.state_dict().items())
    strategy.end(request)
    assert strategy.ridge.counts[0] == 0


@pytest.mark.parametrize("per_class", [False, True])
def test_a_stop_inside_a_request_resumes_exactly(base, run, model, per_class):
    """At each step of learning and of the request, the state goes through a checkpoint."""
    from clplat.errors import Interrupted
    from clplat.run import checkpoint
    from clplat.run.saving import restore, snapshot

    def stream():
        return Unlearning(base=base(), requests=[[f"sample:{r}" for r in range(20)]])

    straight = run(stream(), per_class=per_class)
    stops = straight.progress.total_steps
    assert stops == 12
    for stop in range(1, stops + 1):
        held = {}

        class Stopped(Runner):
            def _between_steps(self, experience, stop=stop):
                self.stop_requested = self.progress.total_steps == stop
                super()._between_steps(experience)

            def save(self, held=held):
                tensors = {}
                plain = checkpoint.flatten(snapshot(self), tensors)
                held["state"] = checkpoint.unflatten(plain, {k: v.clone() for k, v in tensors.items()})

        loop = LoopSettings(batch_size=8, checkpoint_seconds=None, representation=False)
        parts = []
        for kind in (Stopped, Runner):
            torch.manual_seed(0)
            s = stream()
            learner = ACU(model=model(hidden=(60,)), width=40, per_class=per_class)
            fabric = make_fabric(FabricSettings(accelerator="cpu"))
            parts.append(kind(learner, s, loop, fabric, 0, RunLog(None, 0.0), new_record(s)))
        with pytest.raises(Interrupted):
            parts[0].run()
        restore(parts[1], held["state"])
        parts[1].run()
        expected = straight.strategy.state_dict()
        for name, tensor in parts[1].strategy.state_dict().items():
            assert torch.equal(torch.as_tensor(tensor), torch.as_tensor(expected[name])), (stop, name)
        assert parts[1].record.matrix == straight.record.matrix


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_request_after_learning_cut_short_is_refused(base, run):
    with pytest.raises(UserError, match=r"loop\.max_steps: cut learning short"):
        run(Unlearning(base=base(), requests=["class:1"]), loop={"max_steps": 2})


def test_a_request_cut_short_changes_nothing(base, run):
    runner = run(base())
    strategy, before = runner.strategy, {k: v.clone() for k, v in runner.strategy.ridge.state_dict().items()}
    data = Data(runner.stream[0].train.inputs, runner.stream[0].train.labels, torch.arange(12))
    request = Experience(3, "forget", Kind.FORGET, data, classes=(0,), request=("class:0",))
    strategy.begin(request)
    strategy.raw, strategy.global_batch = data.inputs[:8], 8
    strategy.forget_step((data.inputs[:8], data.labels[:8]), 0)
    with pytest.raises(UserError, match="cuts the request short"):
        strategy.end(request)
    assert all(torch.equal(v, before[k]) for k, v in strategy.ridge.state_dict().items())


def test_a_class_learned_twice_cannot_leave_by_half(base, run):
    """A stream that repeats samples put them into the sums more than once."""
    twice = Stream([*base(), Experience(3, "again", Kind.LEARN, base()[0].train, classes=(0, 1))], num_classes=6,
                   input_shape=(5,))  # fmt: skip
    runner = run(twice)
    data = Data(twice[0].train.inputs, twice[0].train.labels, torch.arange(12))
    request = Experience(4, "forget", Kind.FORGET, data, classes=(0,), request=("class:0",))
    strategy = runner.strategy
    strategy.begin(request)
    strategy.raw, strategy.global_batch = data.inputs[:12], 12
    strategy.forget_step((data.inputs[:12], data.labels[:12]), 0)
    with pytest.raises(UserError, match="class 0 is learned from more samples than the request names"):
        strategy.end(request)
    assert strategy.ridge.counts[0] == 24


def test_the_ledger_refuses_before_anything_changes(base, run):
    """A stream made by hand that asks twice, with no check when it is built."""
    stream = Unlearning(base=base(), requests=["class:1"])
    again = Experience(4, "again", Kind.FORGET, stream[3].train, classes=(1,), request=("class:1",))
    found = {}

    class Kept(Runner):
        def _finish(self, experience):
            super()._finish(experience)
            found.update({k: v.clone() for k, v in self.strategy.ridge.state_dict().items()})

    torch.manual_seed(0)
    broken = Stream([*stream, again], num_classes=6, input_shape=(5,))
    runner = run(base())
    learner = ACU(model=runner.strategy.model, width=40)
    fabric, loop = make_fabric(FabricSettings(accelerator="cpu")), LoopSettings(batch_size=8, representation=False)
    kept = Kept(learner, broken, loop, fabric, 0, RunLog(None, 0.0), new_record(broken))
    with pytest.raises(UserError, match="class:1 is erased already"):
        kept.run()
    assert all(torch.equal(v, found[k]) for k, v in learner.ridge.state_dict().items())


def test_measurements(base, run):
    runner = run(Unlearning(base=base(), requests=["class:1"]))
    found = runner.strategy.measurements()
    assert found["samples"] == 60
    h = runner.strategy.ridge.gram.tril() + runner.strategy.ridge.gram.tril(-1).T
    assert found["condition_bound"] >= np.linalg.cond(h.numpy() + 0.1 * np.eye(40)) * 0.99
    assert found["answers_by_inverse"] == 1.0
