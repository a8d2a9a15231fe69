"""On equal predictions our numbers equal Avalanche's, whose metric objects are fed here as its plugins feed them.

What Avalanche calls forgetting is the accuracy just after learning minus the last, so minus our backward transfer; ours
(Chaudhry et al.) starts from the best accuracy instead, and is the same where no accuracy rises after learning.
"""

import warnings

import numpy as np
import pytest
import torch

from clplat.metrics import matrix as m

# Importing it takes about 10 s, so it happens in a fixture: collecting this file costs nothing.
pytestmark = pytest.mark.slow

TASKS, CLASSES, SAMPLES = 4, 5, 40


@pytest.fixture(scope="module")
def avalanche():
    """Avalanche's module of metrics; its import warns of what it depends on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("avalanche.evaluation.metrics", reason="avalanche-lib is not installed")


@pytest.fixture(params=range(3))
def predictions(request):
    """Labels (T, n) and predicted classes (T + 1, T, n)."""
    generator = torch.Generator().manual_seed(request.param)
    labels = torch.randint(CLASSES, (TASKS, SAMPLES), generator=generator)
    return labels, torch.randint(CLASSES, (TASKS + 1, TASKS, SAMPLES), generator=generator)


@pytest.fixture
def R(predictions):
    labels, predicted = predictions
    return (predicted == labels).double().mean(-1).numpy()


def avalanche_accuracy(avalanche, predicted, labels):
    metric = avalanche.Accuracy()
    for some, true in zip(predicted.split(16), labels.split(16), strict=True):
        metric.update(some, true)
    return metric.result()


@pytest.fixture
def theirs(avalanche, predictions):
    """Avalanche's accuracies, (T + 1, T)."""
    labels, predicted = predictions
    return np.array(
        [[avalanche_accuracy(avalanche, p, y) for p, y in zip(row, labels, strict=True)] for row in predicted]
    )


def test_accuracy(R, theirs):
    assert theirs == pytest.approx(R)
    assert m.average_accuracy(R, range(TASKS)) == pytest.approx(theirs[-1].mean())


@pytest.mark.parametrize("name", ["Forgetting", "BWT"])
def test_forgetting_and_backward_transfer(avalanche, R, theirs, name):
    metric = getattr(avalanche, name)()
    for j in range(TASKS):
        metric.update(j, theirs[j + 1, j], initial=True)
    for j in range(TASKS - 1):  # the last experience has no evaluation after its own
        metric.update(j, theirs[-1, j])
    mean = sum(metric.result().values()) / (TASKS - 1)
    ours = m.backward_transfer(R, range(TASKS))
    assert mean == pytest.approx(ours if name == "BWT" else -ours)


def test_forgetting_is_theirs_where_no_accuracy_rises(avalanche, theirs):
    falling = np.minimum.accumulate(np.where(np.tri(TASKS + 1, TASKS, -1), theirs, 1.0), axis=0)
    falling = np.where(np.tri(TASKS + 1, TASKS, -1), falling, 0.0)
    plugin = avalanche.ExperienceForgetting()
    for j in range(TASKS):
        plugin.update(j, falling[j + 1, j], initial=True)
    for j in range(TASKS - 1):
        plugin.update(j, falling[-1, j])
    mean = sum(plugin.result().values()) / (TASKS - 1)
    assert m.forgetting(falling, range(TASKS)) == pytest.approx(mean)
    assert mean > 0


def test_forward_transfer(avalanche, R, theirs):
    metric = avalanche.ForwardTransfer()
    for j in range(TASKS):
        metric.update(j, theirs[0, j], initial=True)
    for j in range(1, TASKS):
        metric.update(j, theirs[j, j])
    mean = sum(metric.result().values()) / (TASKS - 1)
    assert m.forward_transfer(R, range(TASKS)) == pytest.approx(mean)
