import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from small_lora import X, changed_by_hand, make, stirred, tiny_vit
from torch import nn

from clplat.adapters import LoRA
from clplat.backbones.base import Backbone
from clplat.backbones.cnn import slim_resnet18
from clplat.backbones.mlp import mlp
from clplat.backbones.vit import vit_tiny
from clplat.errors import UserError

# --- which layers -----------------------------------------------------------------------------------------------------


def test_layers_are_those_of_the_role_in_order():
    assert make("ffn")[1].layers == tuple(f"net.blocks.{i}.mlp.{fc}" for i in range(2) for fc in ("fc1", "fc2"))
    assert make("attention")[1].layers == tuple(f"net.blocks.{i}.attn.{n}" for i in range(2) for n in ("qkv", "proj"))
    both = make("both")[1].layers
    assert both[:4] == tuple(f"net.blocks.0.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
    assert len(both) == 8


def test_a_backbone_without_such_layers_is_refused():
    with pytest.raises(UserError, match="no linear layers of role attention"):
        LoRA(mlp((5,), [4]), "attention")
    with pytest.raises(UserError, match="no linear layers of role attention or ffn"):
        LoRA(slim_resnet18((3, 8, 8), width=2), "both")


class Attention(Backbone):
    """An attention whose layers have the names given, and an FFN layer."""

    embed_dim = 4

    def __init__(self, *names):
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
        self.fc = nn.Linear(4, 4)

    blocks = property(lambda self: [self])

    def role(self, name):
        return "attention" if "attn" in name else "ffn"

    def features(self, inputs):
        return inputs


def test_projections_are_told_by_the_names_that_families_use():
    names = ("Wq", "Wk", "Wv", "o_proj", "gate_proj", "q_a_proj", "kv_b_proj")
    chosen = LoRA(Attention(*names), "both", projections=["query", "value"]).layers
    assert chosen == ("attn.Wq", "attn.Wv", "attn.q_a_proj", "attn.kv_b_proj", "fc")


@pytest.mark.parametrize("where", ["attention", "both"])
def test_an_attention_without_the_projections_asked_for_is_refused_with_what_it_has(where):
    message = r"that are query or value to adapt \(it has: gate, mix; strategy.projections \[\] takes them all\)"
    with pytest.raises(UserError, match=message):
        LoRA(Attention("mix", "gate"), where, projections=["query", "value"])
    assert len(LoRA(Attention("mix", "gate"), where).layers) == 2 + (where == "both")


def test_a_layer_that_is_used_past_its_module_is_refused():
    class Torch(Backbone):
        embed_dim = 4

        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(4, 2)

        blocks = property(lambda self: [self.attn])

        def role(self, name):
            return "attention"

        def features(self, inputs):
            return self.attn(inputs, inputs, inputs)[0]

    with pytest.raises(UserError, match="MultiheadAttention"):
        LoRA(Torch(), "attention")


@pytest.mark.parametrize(
    "bad", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"where": "convolution"}], ids=lambda b: next(iter(b))
)
def test_options_out_of_range_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        make(**bad)


def test_layers_keep_their_names_for_others():
    backbone, lora = make("both")
    before = {role: list(backbone.layers(role)) for role in ("attention", "ffn")}
    weights = {name: layer.weight for role in before for name, layer in backbone.layers(role).items()}
    lora.add("a")
    lora.add("b")
    assert {role: list(backbone.layers(role)) for role in before} == before
    for role in before:
        assert all(layer.weight is weights[name] for name, layer in backbone.layers(role).items())


# --- the change -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["attention", "ffn", "both"])
def test_a_new_adapter_changes_nothing(where):
    backbone, lora = make(where)
    expected = backbone(X)
    lora.add("a")
    lora.use("a", train="a")
    assert torch.equal(backbone(X), expected)


@pytest.mark.parametrize(("alpha", "scale"), [(3.0, 1.5), (1.0, 0.5), (None, 1.0)])
def test_outputs_are_those_of_the_changed_weights(alpha, scale):
    backbone, lora = make("ffn", alpha=alpha)
    for adapter in ("a", "b", "c"):
        lora.add(adapter)
    stirred(lora, "a", "b", "c")
    assert lora.scale("a") == scale
    lora.use("a", "b")
    expected = changed_by_hand(lora, ("a", "b"), scale)(X.double())
    torch.testing.assert_close(backbone(X).double(), expected, rtol=1e-5, atol=1e-5)
    lora.use()
    torch.testing.assert_close(backbone(X), tiny_vit()(X))
    for name, change in lora.delta("c").items():
        a, b = lora.factors("c")[name]
        torch.testing.assert_close(change.double(), scale * b.double() @ a.double(), rtol=1e-5, atol=1e-5)


def test_gradients_reach_both_factors_and_agree_with_autograd_by_hand():
    backbone, lora = make("ffn", alpha=3.0)
    lora.add("a")
    stirred(lora, "a")
    lora.use("a", train="a")
    backbone(X).square().sum().backward()
    reference = tiny_vit().double()
    leaves = {n: (a.detach().double().requires_grad_(), b.detach().double().requires_grad_())
              for n, (a, b) in lora.factors("a").items()}  # fmt: skip
    weights = {f"{n}.weight": reference.get_submodule(n).weight.detach() + 1.5 * b @ a for n, (a, b) in leaves.items()}
    torch.func.functional_call(reference, weights, (X.double(),)).square().sum().backward()
    for name, pair in lora.factors("a").items():
        for mine, theirs in zip(pair, leaves[name], strict=True):
            assert mine.grad.abs().max() > 0
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-3, atol=1e-3)


def test_mixed_precision_trains_the_factors_in_float32():
    backbone, lora = make("both")
    lora.add("a")
    stirred(lora, "a")
    lora.use("a", train="a")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = backbone(X)
    out.float().square().sum().backward()
    exact = changed_by_hand(lora, (), 1.5)
    for p in lora.parameters_of("a"):
        assert p.dtype == torch.float32
        assert p.grad is not None
        assert p.grad.abs().max() > 0
    assert out.isfinite().all()
    assert exact(X.double()).shape == out.shape


def test_factors_on_a_backbone_in_half_precision_are_in_single_precision():
    backbone, lora = make("both", tiny_vit().bfloat16())
    lora.add("a")
    stirred(lora, "a")
    lora.use("a", train="a")
    assert {p.dtype for p in lora.parameters_of("a")} == {torch.float32}
    outputs = backbone(X.bfloat16())
    outputs.float().square().sum().backward()
    assert outputs.dtype == torch.bfloat16
    assert {p.grad.dtype for p in lora.parameters_of("a")} == {torch.float32}
    expected = changed_by_hand(lora, ["a"], 1.5)(X.double())
    torch.testing.assert_close(outputs.double(), expected, rtol=0.1, atol=0.1)


def test_dropout_acts_on_the_way_to_the_change_only():
    backbone, lora = make("ffn", dropout=0.5)
    lora.add("a")
    lora.use("a")
    backbone.train()
    assert torch.equal(backbone(X), backbone(X))  # the base is not dropped: B is zero
    stirred(lora, "a")
    assert not torch.equal(backbone(X), backbone(X))
    backbone.eval()
    assert torch.equal(backbone(X), backbone(X))


# --- groups -----------------------------------------------------------------------------------------------------------


def test_groups_by_block_pair_and_matrix():
    _, lora = make("ffn")
    lora.add("a")
    pairs = lora.factors("a")
    one, two = ([p for fc in ("fc1", "fc2") for p in pairs[f"net.blocks.{i}.mlp.{fc}"]] for i in range(2))
    by_block = lora.groups("a")
    assert [[id(p) for p in g] for g in by_block] == [[id(p) for p in g] for g in (one, two)]
    assert [len(g) for g in lora.groups("a", "lora")] == [2] * 4
    assert [len(g) for g in lora.groups("a", "matrix")] == [1] * 8
    assert sum(p.numel() for g in by_block for p in g) == 2 * 2 * 2 * (16 + 64)  # blocks · Σ r (d + h)
    with pytest.raises(UserError, match="grouping"):
        lora.groups("a", "model")


def test_groups_on_an_mlp_are_its_layers():
    _, lora = make("ffn", mlp((5,), [4, 3]))
    lora.add("a")
    assert [len(g) for g in lora.groups("a")] == [2, 2]


def test_parameters_of_the_reference_network():
    """DeiT-tiny, r = 8, FFN: Σ over 12 blocks of 2 r (192 + 768)."""
    _, lora = make("ffn", vit_tiny((3, 32, 32)), rank=8, alpha=1.0)
    lora.add("a")
    assert sum(p.numel() for p in lora.parameters_of("a")) == 12 * 2 * 8 * (192 + 768)


def test_training_reduces_a_loss():
    backbone, lora = make("both", rank=4)
    lora.add("a")
    lora.use("a", train="a")
    lora.rest(backbone)
    target = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam([p for p in backbone.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.mse_loss(backbone(X), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_importing_does_not_import_peft():
    code = "import sys, clplat.adapters; sys.exit('peft' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_transposed_layers_are_adapted_as_peft_does():
    """GPT-2's Conv1D: the same factors beside transformers' own model, by peft."""
    import transformers
    from peft import LoraConfig, inject_adapter_in_model

    from clplat.backbones.language_model import LanguageModel

    shape = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    config = transformers.GPT2Config(**shape, bos_token_id=1, eos_token_id=2)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    backbone = LanguageModel(copy.deepcopy(theirs), 9)
    lora = LoRA(backbone, "both", rank=2, alpha=3.0)
    lora.add("a")
    lora.use("a", train="a")
    stirred(lora, "a")
    names = [name.removeprefix("net.") for name in lora.layers]
    options = LoraConfig(r=2, lora_alpha=3.0, target_modules=names, fan_in_fan_out=True)  # type: ignore[arg-type]
    wrapped = inject_adapter_in_model(options, theirs)
    with torch.no_grad():
        for name, (a, b) in lora.factors("a").items():
            layer = wrapped.get_submodule(name.removeprefix("net."))
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
    ids = torch.randint(0, 50, (3, 7))
    mine, peft = backbone.net(ids).logits, wrapped(ids).logits
    torch.testing.assert_close(mine, peft, atol=1e-4, rtol=1e-4)
    with lora.using():
        assert not torch.allclose(mine, backbone.net(ids).logits, atol=1e-2)
    for out in (mine, peft):
        out.square().sum().backward()
    for name, pair in lora.factors("a").items():
        layer = wrapped.get_submodule(name.removeprefix("net."))
        others = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for p, q in zip(pair, others, strict=True):
            assert (p.grad - q.grad).norm() < 1e-4 * q.grad.norm()
