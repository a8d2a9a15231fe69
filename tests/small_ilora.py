"""A small I-LoRA."""

from clplat.components.per_parameter import trainable
from clplat.strategies.ilora import ILoRA

PLAIN = {"where": "ffn", "rank": 2, "dropout": 0.0, "optimizer": "sgd", "lr": 0.05}


def make(net, **options):
    return ILoRA(model=net, **{**PLAIN, "memory": 12, **options})


def values(strategy):
    """(fast, slow) of every trained parameter, copied."""
    fast, slow = trainable(strategy.model), strategy.slow.named()
    assert fast.keys() == slow.keys()
    return {n: (fast[n].detach().clone(), slow[n].detach().clone()) for n in fast}
