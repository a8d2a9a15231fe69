"""ROID against a float64 reference.

Against the authors' code (mariodoebler/test-time-adaptation, 8b2ed63), run apart on 20 batches of logits in float64:
likelihood ratio and weights are bit-equal.
"""

import torch
from tta import CLASSES, SGD, batch_statistics, cnn, entropy, images, moved, started, step, weights

from clplat.strategies.roid import ROID, likelihood_ratio, with_prior
from clplat.strategies.roid import weights as weigh


def scaled(v):
    return (v - v.min()) / (v.max() - v.min())


def cross(z, t):
    return -(t.softmax(1) * z.log_softmax(1)).sum(1)


def test_updates_agree_with_the_reference():
    mine, plain = ROID(model=cnn(), source_share=0.2, temperature=0.5, **SGD), batch_statistics(cnn())
    norms = [p for m in plain.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()]
    source = [p.detach().clone() for p in norms]
    optimizer, velocity = started(mine), [torch.zeros_like(p) for p in norms]
    mean = torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64)
    for number in range(3):
        x = images(8, seed=number)
        prediction, stepped = step(mine, optimizer, x)
        logits = plain(x)
        p = logits.softmax(1)
        diverse = scaled(1 - (p @ mean) / (p.norm(dim=1) * mean.norm())).detach()
        kept = diverse >= diverse.mean()
        w = (diverse * scaled(-entropy(logits)).detach() / 0.5).exp()[kept]
        mean = 0.9 * mean + 0.1 * p.detach().mean(0)
        clipped = p.clamp(max=0.99)
        ratio = -(clipped * ((clipped / (1 - clipped)) + 1e-5).log()).sum(1)[kept]
        other = plain(mine._augmented(x)[kept])
        both = (cross(other, logits[kept]) + cross(logits[kept], other)) / 2
        assert stepped
        loss = (w * (ratio + both)).sum() / 8
        for q, v, g, s in zip(norms, velocity, torch.autograd.grad(loss, norms), source, strict=True):
            v.mul_(0.9).add_(g)
            q.data -= 0.05 * v
            q.data = 0.8 * q.data + 0.2 * s
        prior = p.detach().mean(0)
        smooth = max(1 / 8, 1 / CLASSES) / prior.max()
        expected = p.detach() * (prior + smooth) / (1 + smooth * CLASSES)
        torch.testing.assert_close(prediction.softmax(1), expected / expected.sum(1, keepdim=True), atol=1e-9, rtol=0)
    for a, b in zip(mine.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_a_prior_makes_its_classes_likelier_whatever_the_sign_of_the_logits():
    logits = torch.tensor([[-3.0, -1.0], [-3.0, -1.0], [-1.1, -1.0]])
    before, after = logits.softmax(1), with_prior(logits, logits).softmax(1)
    assert (after[:, 1] > before[:, 1]).all()


def test_a_batch_of_alike_samples_weighs_as_numbers():
    p = torch.full((3, 4), 0.25)
    assert weigh(p, torch.ones(3), p[0], 1 / 3).tolist() == [1, 1, 1]


def test_the_likelihood_ratio_does_not_vanish_where_a_prediction_is_certain():
    z = torch.tensor([[20.0, 0.0], [2.0, 0.0]], requires_grad=True)
    assert likelihood_ratio(z).isfinite().all()


def test_with_all_of_the_source_nothing_moves():
    mine = ROID(model=cnn(), source_share=1.0, **SGD)
    optimizer, before = started(mine), weights(mine.model)
    assert step(mine, optimizer, images())[1]
    assert moved(before, mine.model) == []


def test_the_likelihood_ratio_of_half_precise_logits_is_taken_in_single_precision():
    """1 − p has two digits in bfloat16 where p is near 1."""
    z = torch.tensor([[4.5, 0.25, -1.0]], dtype=torch.bfloat16)
    assert torch.equal(likelihood_ratio(z), likelihood_ratio(z.float()))
