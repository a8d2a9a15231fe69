"""Avalanche's plugins: the weights of Avalanche's own loop, resumable where that is claimed, refused elsewhere."""

import copy
import sys
import warnings

import pytest
import torch

from clplat.components.plugins import PLUGINS, STATE, Seen
from clplat.errors import UserError
from clplat.strategies.avalanche import Avalanche
from clplat.strategies.ewc import EWC
from clplat.strategies.lwf import LwF
from clplat.strategies.naive import Naive

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
SMALL = {"gem": {"patterns_per_experience": 6}, "agem": {"patterns_per_experience": 6, "sample_size": 6},
         "ewc": {"ewc_lambda": 20.0}, "replay": {"mem_size": 12}, "rwalk": {"delta_t": 2}}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _library():
    """Import it before any test is watched: what it imports sets environment variables."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import avalanche.training.supervised  # noqa: F401


def native(model, experiences, name, options, batch, epochs):
    """Avalanche's own Naive strategy with this plugin, data in their natural order."""
    from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_tensor_classification_dataset
    from avalanche.training import plugins
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive as AvalancheNaive

    cls, required = PLUGINS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        silent = EvaluationPlugin()
    learner = AvalancheNaive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=batch,
        train_epochs=epochs,
        plugins=[getattr(plugins, cls)(**{**required, **options})],
        evaluator=silent,
    )
    from avalanche.benchmarks import benchmark_from_datasets

    parts = [e.train.all() for e in experiences]
    data = [_make_taskaware_tensor_classification_dataset(x, y, task_labels=0, targets=y.tolist()) for x, y in parts]
    for experience in benchmark_from_datasets(train=data).train_stream:
        torch.manual_seed(7)
        learner.train(experience, shuffle=False)


@pytest.mark.parametrize("name", sorted(set(PLUGINS) - {"agem", "replay", "gem"}))
def test_the_same_weights_as_in_avalanches_own_loop(name, experiences, model, drive, monkeypatch):
    from clplat.backbones.heads import Linear

    stream, options = experiences(3), SMALL.get(name, {})
    theirs, ours = model(Linear), model(Linear)
    native(theirs, stream, name, options, batch=8, epochs=2)
    strategy = Avalanche(model=ours, plugin=name, options=options, lr=0.1)
    monkeypatch.setitem(drive.__globals__, "epoch_order", lambda n, *_: torch.arange(n))
    drive(strategy, stream, batch=8, epochs=2)
    for (key, a), b in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", sorted(PLUGINS))
def test_the_mechanism_moves_something(name, experiences, model, drive, equal):
    stream = experiences(3)
    naive = drive(Naive(model=model()), stream)
    strategy = Avalanche(model=model(), plugin=name, options=SMALL.get(name, {}))
    if name in STATE:
        drive(strategy, stream)
    else:
        with pytest.warns(UserWarning, match="not resumable"):
            drive(strategy, stream)
    assert not equal(strategy.model, naive.model)
    assert all(p.isfinite().all() for p in strategy.model.parameters())


@pytest.mark.parametrize("name", sorted(STATE))
def test_resumes(name, experiences, model, drive, equal):
    """After the first and after the second experience; and a checkpoint takes the state."""
    from clplat.run.checkpoint import flatten, unflatten

    stream, options = experiences(3), SMALL.get(name, {})
    whole = Avalanche(model=model(), plugin=name, options=options)
    for done in (1, 2):
        drive(whole, stream[done - 1 : done])
        tensors = {}
        plain = flatten(dict(whole.state_dict()), tensors)
        other = Avalanche(model=model(), plugin=name, options=options)
        for e in stream[:done]:
            other.grow(e)
        other.load_state_dict(unflatten(plain, {k: v.clone() for k, v in tensors.items()}), strict=True)
        drive(other, stream[done:])
        ahead = copy.deepcopy(whole)
        drive(ahead, stream[done:])
        assert equal(other.model, ahead.model), done


@pytest.mark.parametrize("name", sorted(STATE))
def test_resumes_inside_an_experience(name, experiences, model, drive):
    """Where the head has already grown for the new classes, and LwF's teacher has not."""
    stream, options = experiences(3), SMALL.get(name, {})
    whole = drive(Avalanche(model=model(), plugin=name, options=options), stream[:2])
    whole.grow(stream[2])
    whole.begin(stream[2])
    other = Avalanche(model=model(), plugin=name, options=options)
    for e in stream:
        other.grow(e)
    other.load_state_dict(copy.deepcopy(whole.state_dict()), strict=True)
    batch = stream[2].train.all()
    losses = []
    for strategy in (whole, other):
        optimizer = strategy.configure_optimizers()
        for k in range(3):
            losses.append(strategy.training_step(batch, k))
            losses[-1].backward()
            strategy.on_after_backward()
            optimizer.step()
            optimizer.zero_grad()
            strategy.after_step()
    assert losses[:3] == losses[3:]


def test_what_cannot_be_saved_is_refused_when_resumed(experiences, model, drive):
    stream = experiences(2)
    strategy = Avalanche(model=model(), plugin="agem", options=SMALL["agem"])
    with pytest.warns(UserWarning, match="agem can't be saved"):
        drive(strategy, stream[:1])
    other = Avalanche(model=model(), plugin="agem", options=SMALL["agem"])
    other.grow(stream[0])
    other.load_state_dict(strategy.state_dict(), strict=True)
    other.predict(stream[0].train.all()[0])  # a finished run can still be used
    with pytest.raises(UserError, match="can't be saved; start the run anew"):
        drive(other, stream[1:])


def test_clplats_ewc_is_avalanches_at_its_settings(experiences, model, drive):
    stream = experiences(3)
    ours = drive(EWC(model=model(), penalty=20.0, fisher_batch=8), stream)
    theirs = drive(Avalanche(model=model(), plugin="ewc", options={"ewc_lambda": 20.0}), stream)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_clplats_lwf_is_avalanches(experiences, model, drive):
    stream = experiences(3)
    ours = drive(LwF(model=model(), distill=2.0, temperature=3.0), stream)
    theirs = drive(Avalanche(model=model(), plugin="lwf", options={"alpha": 2.0, "temperature": 3.0}), stream)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_a_plugin_that_reads_more_is_refused(experiences, model, drive):
    strategy = Avalanche(model=model(), plugin="lwf")
    strategy._plugin.before_backward = lambda seen: seen.evaluator
    with pytest.raises(UserError, match="it reads 'evaluator'"):
        drive(strategy, experiences(1))
    assert copy.copy(Seen(a=1)).a == 1


def test_two_processes_are_refused(experiences, model):
    strategy = Avalanche(model=model())
    strategy.world_size = 2
    with pytest.raises(UserError, match="devices: 2 is out of range"):
        strategy.begin(experiences(1)[0])


def test_accumulation_is_refused(experiences, model, drive):
    with pytest.raises(UserError, match="accumulate: must be 1"):
        drive(Avalanche(model=model()), experiences(1), accumulate=2)


def test_wrong_arguments_name_the_nearest(model):
    with pytest.raises(UserError, match=r"options.ewc_lamda: no such argument of EWCPlugin \(nearest: ewc_lambda\)"):
        Avalanche(model=model(), options={"ewc_lamda": 1})
    with pytest.raises(UserError, match="EWCPlugin refuses"):
        Avalanche(model=model(), options={"mode": "sideways"})


def test_without_the_library_it_says_what_to_install(model, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "avalanche"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "avalanche", None)
    with pytest.raises(UserError, match=r"pip install 'clplat\[avalanche\]'"):
        Avalanche(model=model())
