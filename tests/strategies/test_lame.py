"""LAME against a float64 reference.

Against mariodoebler/test-time-adaptation lame.py (8b2ed63), run apart on 20 batches of 30 features in float64:
affinities 4.4e-16 at most; assignments 5.2e-6 (knn), 3.1e-8 (rbf), 3.7e-6 (linear), since it stops earlier.
"""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from tta import cnn, images, moved, started, step, vit, weights

from clplat.errors import UserError
from clplat.strategies.lame import LAME, affinities, assigned
from clplat.strategies.source import Source


@pytest.mark.parametrize("kind", ["knn", "rbf", "linear"])
def test_affinities_by_hand(kind):
    features = torch.randn(7, 3, dtype=torch.float64)
    unit = (features / features.norm(dim=1, keepdim=True)).numpy()
    gaps = np.linalg.norm(unit[:, None] - unit[None], axis=2)
    order = [[j for j in np.argsort(row) if j != i] for i, row in enumerate(gaps)]
    expected = {
        "knn": np.array([[float(j in order[i][:2]) for j in range(7)] for i in range(7)]),
        "rbf": np.exp(-(gaps**2) / (2 * np.mean([gaps[i, order[i][1]] for i in range(7)]) ** 2)),
        "linear": unit @ unit.T,
    }[kind]
    np.testing.assert_allclose(affinities(features, kind, 2).numpy(), expected, rtol=0, atol=1e-10)


def test_what_it_finds_is_a_fixed_point_and_lowers_the_objective():
    log, w = torch.randn(6, 4, dtype=torch.float64).log_softmax(1), affinities(torch.randn(6, 3).double(), "rbf", 2)
    z = assigned(log, w).exp()
    torch.testing.assert_close((log + w @ z).softmax(1), z, rtol=0, atol=1e-7)

    def objective(q):
        return (q * (q.log() - log)).sum() - (w * (q @ q.T)).sum()

    assert objective(z) < objective(log.exp())


def test_predictions_by_a_reference_and_nothing_moves():
    mine, plain, x = LAME(model=cnn(), neighbours=2), cnn().eval(), images(9)
    optimizer, before = started(mine), weights(mine.model)
    prediction, stepped = step(mine, optimizer, x)
    with torch.no_grad():
        features, log = plain.features(x), log_softmax(plain(x).numpy(), 1)
    w, z = affinities(features, "knn", 2).numpy(), np.exp(log)
    for _ in range(500):
        z = np.exp(log_softmax(log + w @ z, 1))
    np.testing.assert_allclose(prediction.softmax(1).numpy(), z, rtol=0, atol=1e-6)
    assert not stepped
    assert moved(before, mine.model) == []
    torch.testing.assert_close(mine.predict(x), prediction)  # evaluation does the same to its batches
    assert mine.evaluation_batch


def test_a_batch_of_one_is_predicted_as_by_the_source():
    for make, dtype in ((cnn, torch.float64), (vit, torch.float32)):
        x, predictions = images(1, dtype=dtype), []
        for strategy in (LAME(model=make()), LAME(model=make(), affinity="rbf"), Source(model=make())):
            predictions.append(step(strategy, started(strategy), x)[0].softmax(1))
        torch.testing.assert_close(predictions[0], predictions[2])
        torch.testing.assert_close(predictions[1], predictions[2])


def test_alike_samples_do_not_divide_by_zero():
    assert affinities(torch.ones(3, 2), "rbf", 2).isfinite().all()


def test_refuses_an_unknown_affinity():
    with pytest.raises(UserError, match="affinity: 'cosine' is out of range"):
        LAME(model=cnn(), affinity="cosine")
