"""Batches of similar length: every sample once, less padding, nothing else moved."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from clplat.data.batches import batches_per_epoch, by_length, epoch_order, local_slice


@given(n=st.integers(1, 200), batch=st.integers(1, 16), window=st.integers(1, 20), seed=st.integers(0, 1000))
def test_batches_by_length(n, batch, window, seed):
    lengths = torch.randint(1, 9, (n,), generator=torch.Generator().manual_seed(seed))
    drawn = epoch_order(n, seed, 0, 0, torch.device("cpu"))
    order = by_length(drawn, lengths, batch, window)
    assert order.sort().values.tolist() == list(range(n))
    full = n // batch * batch
    assert order[full:].tolist() == drawn[full:].tolist()  # the short batch
    for start in range(0, full, batch * window):
        before, after = (o[:full][start : start + batch * window] for o in (drawn, order))
        assert sorted(before.tolist()) == sorted(after.tolist())
        cut = lengths[after].view(-1, batch)
        cut = cut[cut.amin(1).argsort(stable=True)]
        assert (cut.amax(1).sum() == lengths[after].sort().values.view(-1, batch).amax(1).sum()).item()  # the least
        assert after.view(-1, batch).eq(before[0]).any(1)[0]  # the order of batches is drawn, too


@given(n=st.integers(1, 100), batch=st.integers(1, 9), world=st.integers(1, 5))
def test_the_parts_of_processes_in_order_are_the_batches_of_one(n, batch, world):
    order = torch.arange(n)
    for k, whole in enumerate(order.split(batch * world)):
        parts, sizes = zip(*(local_slice(n, k, batch, rank, world) for rank in range(world)), strict=True)
        assert [order[p].tolist() for p in parts] == [p.tolist() for p in whole.tensor_split(world)]
        assert set(sizes) == {len(whole)}
    assert k + 1 == batches_per_epoch(n, batch, world)


def test_one_bucket_keeps_the_batches_as_drawn():
    drawn = epoch_order(20, 0, 0, 0, torch.device("cpu"))
    order = by_length(drawn, torch.arange(20) % 7, 4, 1)
    assert order.view(-1, 4).sort(1).values.tolist() == drawn.view(-1, 4).sort(1).values.tolist()
