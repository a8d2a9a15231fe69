"""Every strategy with adapters on CLIP, a Llama, a T5 and a GPT-2: three steps of each of two experiences."""

import pytest
import torch
import transformers

from clplat import Data, Experience, Kind
from clplat.backbones.clip import clip
from clplat.backbones.language_model import LanguageModel, language_model
from clplat.strategies.corda import CorDA
from clplat.strategies.eva import EVA
from clplat.strategies.ilora import ILoRA
from clplat.strategies.inflora import InfLoRA
from clplat.strategies.lora import SequentialLoRA
from clplat.strategies.moram import MoRAM
from clplat.strategies.olora import OLoRA
from clplat.strategies.svd_orthogonal import SVDOrthogonal
from clplat.stream import Answers

END, CLASSES, BATCH, STEPS = 2, 4, 4, 3
LOW_RANK = {"where": "both", "projections": [], "rank": 2, "dropout": 0.0, "lr": 0.01}
STRATEGIES = {
    SequentialLoRA: LOW_RANK,
    OLoRA: LOW_RANK,
    EVA: LOW_RANK,
    CorDA: LOW_RANK,
    InfLoRA: LOW_RANK,
    ILoRA: {**LOW_RANK, "memory": 8, "slow_decay": 0.9},
    MoRAM: {"rank": 2, "top": 2, "threshold": -1.0, "lr": 0.01},
    SVDOrthogonal: {"importance_samples": 4, "lr": 0.01},
}
FAMILIES = ("clip", "llama", "t5", "gpt2")


def gpt2():
    shape = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(**shape, **dropout, bos_token_id=1, eos_token_id=END)
    return LanguageModel(transformers.GPT2LMHeadModel(config), 9)


def model_of(family):
    """The same one at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "clip":
            backbone = clip((3, 8, 8), dim=16, depth=1, heads=2, patch_size=4, vocabulary=40)
        elif family == "gpt2":
            backbone = gpt2()
        else:
            backbone = language_model((2, 9), family=family, dim=16, depth=1, heads=2, vocabulary=40)
    words = [[1, 10 + c, END, -1] if c % 2 else [1, 10 + c, 20 + c, END] for c in range(CLASSES)]
    return backbone.assemble(None, Answers(torch.tensor(words), END, 40, 0))


def stream_of(family):
    """Two experiences of two classes each."""
    generator, found = torch.Generator().manual_seed(1), []
    labels = torch.arange(CLASSES).repeat_interleave(BATCH * STEPS // 2)
    if family == "clip":
        inputs = torch.rand(len(labels), 3, 8, 8, generator=generator)
    else:
        inputs = torch.full((len(labels), 2, 9), -1, dtype=torch.int32)
        inputs[:, 0, :6] = torch.randint(3, 40, (len(labels), 6), generator=generator, dtype=torch.int32)
        inputs[::3, 0, 4:6] = -1
    for k in range(2):
        rows = torch.arange(len(labels))[labels // 2 == k]
        data = Data(inputs, labels, rows)
        found.append(Experience(index=k, name=f"e{k}", kind=Kind.LEARN, train=data, classes=(2 * k, 2 * k + 1)))
    return found


def make(cls, family):
    return cls(model=model_of(family), **STRATEGIES[cls])


def check_mechanism(strategy):
    """What tells it from plain sequential training, in the second experience."""
    facts = strategy.measurements()
    if isinstance(strategy, OLoRA):
        assert facts["overlap"] > 0
        assert facts["up_norm"] > 0
    elif isinstance(strategy, ILoRA):
        assert facts["slow_distance"] > 0
        assert strategy._replay(strategy.memory)[1] > 0
    elif isinstance(strategy, MoRAM):
        assert facts["atoms"] == 4
        assert all(layer.values.any() for layer in strategy._layers)
        assert any(layer.new_values.any() for layer in strategy._layers)  # where none is chosen they stay 0
    elif isinstance(strategy, SVDOrthogonal):
        assert 0 < facts["preserved_fraction"] < 1
        assert len(set(strategy.importance)) > 1
    else:
        pairs = strategy.adapters.factors(strategy.adapters.trained[0]).values()
        assert all(b.any() == a.any() for a, b in pairs)  # of EVA a layer may get no rank
        assert any(b.any() for _, b in pairs)
    if isinstance(strategy, CorDA):
        assert all(b.any() for _, b in strategy.adapters.factors("start1").values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cls", STRATEGIES, ids=lambda c: c.__name__)
def test_it_learns_by_its_layers_alone_and_resumes(cls, family, drive, resumes):
    stream, plain = stream_of(family), dict(model_of(family).named_parameters())
    strategy, losses, told = make(cls, family), [], []
    inner = strategy.training_step
    strategy.training_step = lambda *batch: losses.append(inner(*batch)) or losses[-1]
    drive(strategy, stream, batch=BATCH, epochs=1, each_step=told.append)
    assert len(told) == 2 * STEPS
    check_mechanism(strategy)
    assert torch.stack(losses).isfinite().all()
    learned = {n: p for n, p in strategy.model.named_parameters() if p.requires_grad and p.numel()}
    assert learned
    layers = sum(len(strategy.model.backbone.layers(role)) for role in ("attention", "ffn"))
    if cls is not SVDOrthogonal:  # factors of every layer and nothing else; the backbone keeps its bits
        assert len(learned) == (1 if cls is InfLoRA else 2) * layers  # it holds A
        kept = {n.replace(".base_layer", ""): p for n, p in strategy.model.named_parameters()}
        assert all(torch.equal(kept[n], p) for n, p in plain.items())
    else:
        assert len(strategy.layers) == layers
        changed = [n for n, p in plain.items() if not torch.equal(strategy.model.get_parameter(n), p)]
        assert sum(n.endswith("weight") for n in changed) >= layers
    outputs = strategy.eval().predict(stream[0].train.all()[0])
    assert outputs.shape == (BATCH * STEPS, CLASSES)
    assert outputs.isfinite().all()
    assert resumes(lambda: make(cls, family), stream, batch=BATCH, epochs=1)


def test_inputs_of_texts_are_those_of_their_tokens():
    """Not of the padding of the texts that come with them, however many are asked for at a time."""
    (e, _), strategy, seen = stream_of("llama"), make(InfLoRA, "llama"), []
    strategy.grow(e)
    for chunk in (1, BATCH):
        strategy._calibrate(e, lambda name, x: seen.append(len(x)), chunk=chunk)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    assert len(set(seen)) > 1  # prompts have lengths of their own
