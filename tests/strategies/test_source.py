import torch
from tta import cnn, images, moved, started, step, weights

from clplat.strategies.source import Source


def test_it_is_the_model_in_evaluation_mode_and_nothing_moves():
    mine, plain = Source(model=cnn()), cnn().eval()
    before = weights(mine)
    assert started(mine) is None
    for number in range(3):
        x = images(seed=number)
        torch.testing.assert_close(step(mine, None, x)[0], plain(x).detach(), atol=1e-12, rtol=0)
    assert moved(before, mine) == []
    torch.testing.assert_close(mine.predict(x), plain(x))


def test_it_learns_as_fine_tuning_does(experiences, drive, equal, model):
    from clplat.strategies.naive import Naive

    stream = experiences()
    assert equal(drive(Source(model=model()), stream).model, drive(Naive(model=model()), stream).model)
