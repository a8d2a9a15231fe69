"""RanPAC by itself: its ridge and the choice of λ against NumPy, and sums that stand for held-out samples."""

import numpy as np
import pytest
import torch
from summing import learn

from clplat import Data, Experience, Kind
from clplat.components.ridge import Ridge
from clplat.errors import UserError
from clplat.strategies import ranpac
from clplat.strategies.ranpac import LAMBDAS, RanPAC, held


@pytest.fixture
def model(model):
    return lambda **options: model(**{"hidden": (9,), **options})


def make(model, **options):
    torch.manual_seed(0)
    return RanPAC(model=model().double(), **{"width": 20, **options})


def noisy(experiences, count):
    """Experiences whose clouds overlap, so that the best λ lies inside the range."""
    found = experiences(count, per_class=60)
    inputs = found[0].train.inputs  # of all of them
    inputs.add_(torch.randn(inputs.shape, generator=torch.Generator().manual_seed(2)))
    return found


def expanded(strategy, x):
    with torch.no_grad():
        phi = strategy.model.eval().features(x.double())
    return np.maximum(phi.numpy() @ strategy.expansion.numpy(), 0)


def reference(strategy, experiences, classes):
    """W and λ of each session, from the samples themselves."""
    d = len(strategy.expansion[0])
    gram, cross, lambdas = np.zeros((d, d)), np.zeros((d, classes)), []
    for e in experiences:
        x, y = e.train.all()
        h, hot = expanded(strategy, x), np.eye(classes)[y.numpy()]
        apart = held(e.train.row_ids(), 0.2).numpy()
        errors = []
        for value in LAMBDAS:
            mine = h[~apart]
            w = np.linalg.solve(mine.T @ mine + value * np.eye(d), mine.T @ hot[~apart])
            errors.append(((h[apart] @ w - hot[apart]) ** 2).mean())
        lambdas.append(LAMBDAS[int(np.argmin(errors))])
        gram, cross = gram + h.T @ h, cross + h.T @ hot
    return np.linalg.solve(gram + lambdas[-1] * np.eye(d), cross), lambdas


def test_head_and_lambda_are_those_of_the_samples(experiences, model):
    stream, strategy, found = noisy(experiences, 3), make(model), []
    for e in stream:
        learn(strategy, [e])
        found.append(float(strategy.chosen))
    expected, lambdas = reference(strategy, stream, 6)
    assert found == lambdas
    assert LAMBDAS[0] < found[-1] < LAMBDAS[-1]
    scale = np.abs(expected).max()
    assert np.abs(strategy.ridge.weight.numpy() - expected).max() < 1e-10 * scale
    x = torch.randn(8, 5, dtype=torch.float64)
    torch.testing.assert_close(
        strategy.eval().predict(x), torch.from_numpy(expanded(strategy, x) @ expected), atol=1e-10, rtol=1e-10
    )


def test_the_error_from_sums_is_that_of_the_samples():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 6, dtype=torch.float64, generator=draw), torch.randint(3, (50,), generator=draw)
    fit, rest = Ridge(6, 1.0), Ridge(6, 1.0)
    for ridge, part in ((fit, slice(0, 35)), (rest, slice(35, 50))):
        ridge.grow(3)
        ridge.add(x[part], y[part])
    hot = np.eye(3)[y.numpy()]
    a, b = x[:35].numpy(), x[35:].numpy()
    w = np.linalg.solve(a.T @ a + 0.3 * np.eye(6), a.T @ hot[:35])
    assert fit.error(rest, 0.3) == pytest.approx(((b @ w - hot[35:]) ** 2).mean(), abs=1e-10)
    assert not fit.weight.any()  # it is only asked


def test_held_out_samples_are_a_fifth_of_any_run_of_rows():
    for start in (0, 17, 10**6, 2**33):
        apart = held(torch.arange(start, start + 1000), 0.2)
        assert abs(int(apart.sum()) - 200) <= 2
        assert all(int(part.sum()) >= 8 for part in apart.split(50))  # of every class where classes come in blocks
    rows = torch.randperm(500)
    assert torch.equal(held(rows, 0.3), held(torch.arange(500), 0.3)[rows])


def test_all_samples_are_in_the_sums_and_the_sessions_are_empty_then(experiences, model):
    strategy = learn(make(model), experiences(3), epochs=2)
    assert strategy.ridge.counts.tolist() == [12] * 6
    assert not any(t.any() for part in (strategy.fit, strategy.rest) for t in (part.gram, part.cross, part.counts))


def test_a_given_lambda_is_kept(experiences, model):
    strategy = learn(make(model, gamma=3.0), noisy(experiences, 2))
    assert (float(strategy.chosen), strategy.ridge.gamma, strategy.measurements()["lambda"]) == (3.0, 3.0, 3.0)


def test_a_lambda_without_a_factor_is_passed_over(experiences, model, monkeypatch):
    stream = noisy(experiences, 1)
    monkeypatch.setattr(ranpac, "LAMBDAS", [1e-30, 10.0])
    strategy = learn(make(model, width=200), stream)  # of fewer samples than features: 1e-30 is lost beside them
    assert float(strategy.chosen) == 10.0
    monkeypatch.setattr(ranpac, "LAMBDAS", [1e-30])
    with pytest.raises(UserError, match=r"strategy.gamma: 1e-30 leaves"):
        learn(make(model, width=200), stream)


def test_projections_are_standard_normal(model):
    e = make(model, width=3000).expansion
    assert e.shape == (9, 3000)
    assert abs(e.mean()) < 0.05
    assert e.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("at", [1, 3])
def test_resumes_within_a_session(experiences, model, equal, at):
    """After `at` batches of the second session."""
    stream = noisy(experiences, 2)
    ends = []
    for stop in (False, True):
        strategy = learn(make(model), stream[:1])
        strategy.grow(stream[1])
        strategy.begin(stream[1])
        for k, positions in enumerate(torch.arange(120).split(20)):
            if stop and k == at:
                state, strategy = strategy.state_dict(), make(model)
                for e in stream:
                    strategy.grow(e)
                strategy.load_state_dict(state)
            raw, labels = stream[1].train.batch(positions)
            strategy.rows, strategy.global_batch = stream[1].train.row_ids()[positions], 20
            strategy.training_step((raw.double(), labels), k)
        strategy.end(stream[1])
        ends.append(strategy)
    assert equal(ends[0].ridge, ends[1].ridge)
    assert torch.equal(ends[0].chosen, ends[1].chosen)


def test_data_of_one_sample_keep_lambda(model):
    data = Data(torch.randn(1, 5), torch.zeros(1, dtype=torch.int64))
    strategy = learn(make(model), [Experience(0, "one", Kind.LEARN, data, classes=(0,))])
    assert strategy.eval().predict(data.inputs.double()).argmax(1).tolist() == [0]
    assert float(strategy.chosen) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 0.0}, "strategy.held_out: 0.0 is out of range"),
        ({"held_out": 1.0}, "strategy.held_out: 1.0 is out of range"),
        ({"gamma": 0.0}, "strategy.gamma: 0.0 is out of range"),
        ({"width": 0}, "strategy.width: 0 is out of range"),
    ],
)
def test_refuses_what_is_out_of_range(model, options, message):
    with pytest.raises(UserError, match=message):
        make(model, **options)
