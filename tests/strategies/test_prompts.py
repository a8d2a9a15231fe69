"""L2P, DualPrompt and CODA-Prompt: prefixes and losses by independent references, what is frozen, and what chooses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clplat import Experience, Kind
from clplat.backbones.base import Classifier
from clplat.backbones.heads import Growing
from clplat.backbones.vit import vit_micro
from clplat.errors import UserError
from clplat.strategies.coda_prompt import CODAPrompt, apart
from clplat.strategies.dualprompt import DualPrompt
from clplat.strategies.l2p import L2P

D, B = 8, 5
SMALL = {
    CODAPrompt: {"blocks": 2, "length": 3, "components": 2},
    DualPrompt: {"general": 1, "expert": 1, "general_length": 2, "expert_length": 3},
    L2P: {"blocks": 2, "pool": 4, "chosen": 2, "length": 3},
}


def model():
    backbone = vit_micro((1, 8, 8), patch_size=4, dim=D, depth=2, heads=2)
    return Classifier(backbone, Growing(D, 6))


def grown(cls, experiences=2, **options):
    strategy = cls(model=model(), **(SMALL[cls] | options)).double()
    for t in range(experiences):
        strategy.grow(Experience(t, f"e{t}", Kind.LEARN, None, classes=(2 * t, 2 * t + 1)))
        strategy.double()
    return strategy


def lists(prefixes):
    return [[p.detach().numpy() for p in pair] for pair in prefixes]


def unit(v):
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def test_codas_prompts_are_sums_of_components_by_attention():
    strategy, q = grown(CODAPrompt), torch.randn(B, D).double()
    p, k, a = (torch.cat([*parts]).detach().numpy() for parts in strategy._parts())
    found = lists(strategy._prefixes_for(q))
    for i in range(2):
        for b in range(B):
            alpha = [unit(q[b].numpy() * a[m, i]) @ unit(k[m, i]) for m in range(4)]
            for half in range(2):
                expected = sum(alpha[m] * p[m, i, half] for m in range(4))
                np.testing.assert_allclose(found[i][half][b], expected, rtol=0, atol=1e-12)


def test_codas_penalty_is_the_mean_of_squares_in_every_block():
    strategy = grown(CODAPrompt, orthogonality=0.5)
    for parts in strategy._parts():
        for table in parts:
            table.data.normal_()
    x, y = torch.randn(B, 1, 8, 8).double(), torch.tensor([2, 3, 3, 2, 2])
    with_it = strategy.training_step((x, y), 0).item()
    strategy.orthogonality = 0.0
    expected = 0.0
    for parts in strategy._parts():
        rows = torch.cat([*parts]).detach().numpy()
        for i in range(2):
            t = rows[:, i].reshape(4, -1)
            expected += ((t @ t.T - np.eye(4)) ** 2).mean()
    assert abs(with_it - strategy.training_step((x, y), 0).item() - 0.5 * expected) < 1e-10


def test_codas_new_components_are_orthogonal_to_the_old_ones_which_are_frozen():
    strategy = grown(CODAPrompt, experiences=3)
    for parts in strategy._parts():
        assert [p.requires_grad for p in parts] == [False, False, True]
        rows = torch.cat([*parts]).detach()
        for i in range(2):
            table = rows[:, i].flatten(1)
            torch.testing.assert_close(table @ table.T, torch.eye(6).double(), rtol=0, atol=1e-5)


def test_rows_beyond_the_directions_that_are_left_are_drawn_with_length_one():
    rows = apart(torch.eye(4)[:3], 3)
    assert torch.allclose(rows[0].abs(), torch.eye(4)[3], atol=1e-6)
    assert torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-6)


def test_dualprompts_expert_is_the_experiences_own_in_training_and_the_nearest_keys_after():
    strategy, q = grown(DualPrompt, experiences=3), torch.randn(B, D).double()
    keys = [k.detach().numpy() for k in strategy.keys]
    likeness = np.array([[unit(x) @ unit(k) for k in keys] for x in q.numpy()])
    strategy.train()
    own = lists(strategy._prefixes_for(q))
    np.testing.assert_allclose(strategy._away.detach().numpy(), 1 - likeness[:, 2], rtol=0, atol=1e-12)
    strategy.eval()
    nearest = lists(strategy._prefixes_for(q))
    assert len(set(likeness.argmax(1).tolist())) > 1  # samples of one batch choose by themselves
    for b in range(B):
        for half in range(2):
            for found, expert in ((own, 2), (nearest, int(likeness[b].argmax()))):
                assert np.array_equal(found[0][half][b], strategy.general[0, half].detach().numpy())
                assert np.array_equal(found[1][half][b], strategy.experts[expert][0, half].detach().numpy())
    assert [p.requires_grad for p in strategy.experts] == [False, False, True]
    assert strategy.general.requires_grad


def test_l2p_takes_the_prompts_of_the_nearest_keys_one_after_the_other():
    strategy, q = grown(L2P).train(), torch.randn(B, D).double()
    keys, prompts = strategy.keys.detach().numpy(), strategy.prompts.detach().numpy()
    found = lists(strategy._prefixes_for(q))
    for b in range(B):
        likeness = unit(keys) @ unit(q[b].numpy())
        first, second = np.argsort(-likeness)[:2]
        for i in range(2):
            for half in range(2):
                expected = np.concatenate([prompts[first, i, half], prompts[second, i, half]])
                assert np.array_equal(found[i][half][b], expected)
        away = 0.5 * (2 - likeness[first] - likeness[second])
        assert abs(strategy._away[b].item() - away) < 1e-12


@pytest.mark.parametrize("cls", SMALL)
def test_the_loss_is_over_the_experiences_classes_and_adds_the_keys(cls):
    strategy = grown(cls).train()
    x, y = torch.randn(B, 1, 8, 8).double(), torch.tensor([2, 3, 3, 2, 2])
    loss = strategy.training_step((x, y), 0).item()
    logits = strategy.model(x).detach()[:, 2:]
    away = 0.0 if strategy._away is None else strategy._away.mean().item()
    assert abs(loss - F.cross_entropy(logits, y - 2).item() - away) < 1e-12
    assert (away > 0) == (cls is not CODAPrompt)


@pytest.mark.parametrize("cls", SMALL)
def test_only_prompts_keys_and_head_learn_and_the_query_has_no_prompts(cls):
    strategy = grown(cls).train()
    x, y = torch.randn(B, 1, 8, 8).double(), torch.tensor([2, 3, 3, 2, 2])
    with strategy.prefixes.resting():
        plain = strategy.model.features(x)
    seen = []
    made, strategy._prefixes_for = strategy._prefixes_for, lambda q: seen.append(q) or made(q)
    strategy.training_step((x, y), 0).backward()
    assert torch.equal(seen[0], plain)
    assert not any(p.requires_grad for p in strategy.model.backbone.parameters())
    missing = [n for n, p in strategy.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (CODAPrompt, {"components": 0}, r"strategy\.components: 0 .* \(valid: ≥ 1\)"),
        (CODAPrompt, {"blocks": 3}, r"prefixes for 3 blocks, but the backbone has 2"),
        (DualPrompt, {"expert_length": 0}, r"strategy\.expert_length: 0"),
        (L2P, {"chosen": 5}, r"strategy\.chosen: 5 .* \(valid: 1 to 4, the pool\)"),
    ],
)
def test_options_out_of_range_are_named(cls, options, message):
    with pytest.raises(UserError, match=message):
        cls(model=model(), **(SMALL[cls] | options))
