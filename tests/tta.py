"""What the tests of test-time adaptation share: small networks, images, and the loop at its barest."""

import copy

import torch
from torch import nn

from clplat import Experience, Kind
from clplat.backbones.base import Classifier
from clplat.backbones.cnn import ResNet
from clplat.backbones.heads import Linear
from clplat.backbones.vit import vit_micro

CLASSES = 4
SGD = {"adapt_optimizer": "sgd", "adapt_lr": 0.05}


def experience(index=0, kind=Kind.ADAPT, train=None):
    return Experience(index, f"e{index}", kind, train, classes=tuple(range(CLASSES)))


def cnn(dtype=torch.float64, seed=0):
    """Batch-norm network on (3, 8, 8), with statistics and gains that are not those of a fresh one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Classifier(ResNet(3, [4, 6], depth=2, pad=False), Linear(6, CLASSES))
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.weight, 1, 0.3)
                nn.init.normal_(m.bias, 0, 0.3)
                m.running_mean.normal_(0, 0.2)
                m.running_var.uniform_(0.5, 1.5)
        with torch.no_grad():
            net.head.weight *= 4
    return net.to(dtype)


def vit(dtype=torch.float32, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Classifier(vit_micro((3, 8, 8), patch_size=4, dim=8, depth=2, heads=2), Linear(8, CLASSES))
    return net.to(dtype)


def images(count=6, dtype=torch.float64, seed=1):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def started(strategy, index=0):
    """`strategy` in its first adapt experience, and its optimizer (None where nothing trains)."""
    strategy.train()
    strategy.grow(experience(index))
    strategy.begin(experience(index))
    trains = any(p.requires_grad for p in strategy.parameters())
    return strategy.configure_optimizers() if trains else None


def step(strategy, optimizer, x):
    """What the loop does with a batch; the predictions, and whether a step was taken."""
    strategy.raw, strategy.global_batch = x, len(x)
    out = strategy.adapt_step(x)
    predictions, loss = out if isinstance(out, tuple) else (out, None)
    if loss is None or optimizer is None:
        return predictions, False
    loss.backward()
    strategy.on_after_backward()
    strategy.on_before_optimizer_step(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    strategy.after_step()
    return predictions, True


def weights(module):
    return {k: v.detach().clone() for k, v in module.state_dict().items() if isinstance(v, torch.Tensor)}


def moved(before, module):
    """Names of the tensors that are not as they were, bit for bit."""
    return [k for k, v in weights(module).items() if not torch.equal(v, before[k])]


def batch_statistics(model):
    """An independent copy of a model with torch's own layers, which normalises by the batch in every mode."""
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.track_running_stats, m.running_mean, m.running_var = False, None, None
    return model.eval()


def entropy(logits):
    p = logits.softmax(1)
    return -(p * p.log()).sum(1)
