"""What the loop does with strategies that sum over frozen features."""

import torch


def learn(strategy, experiences, batch=8, epochs=1):
    """Teach experiences in order, in batches of the strategy's dtype; no step asks for a gradient."""
    dtype = next(strategy.model.parameters()).dtype
    for e in experiences:
        strategy.train()
        strategy.grow(e)
        strategy.begin(e)
        for _ in range(epochs):
            for positions in torch.arange(len(e.train)).split(batch):
                raw, labels = e.train.batch(positions)
                strategy.raw, strategy.rows, strategy.global_batch = raw, e.train.row_ids()[positions], len(raw)
                assert strategy.training_step((strategy.prepare(raw.to(dtype)), labels), 0) is None
        strategy.end(e)
    return strategy
