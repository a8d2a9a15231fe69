"""Networks of timm and transformers as they are trained by hand, next to clplat's models with the same weights.

By hand a network is the library's own, with a linear layer behind it where it has no words, and peft's adapters for
LoRA; nothing of clplat's is in it.

Shapes: B samples of a batch, L tokens of each text, C classes, A tokens of each answer, V of the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.hand import Reservoir
from benchmarks.in_turn import Hand, Loss, Ours, Work

RANK, ALPHA, RATE, SLOTS = 8, 32, 1e-4, 64


@dataclass
class Pair:
    """clplat's model, and the network by hand with its loss.

    Args:
        answers: what a stream has to tell of its classes, for a model that knows them by their words.
        prepare: stored inputs (B, ...) to what the network by hand takes.
    """

    model: Any
    net: Any
    loss: Loss
    answers: Any = None
    prepare: Callable[[Tensor], Tensor] = lambda x: x


class Images(nn.Module):
    """A network of timm, and a linear layer."""

    def __init__(self, trunk: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


class Texts(nn.Module):
    """The mean of an encoder's states, and a linear layer; texts (B, 2, L) are filled up with -1."""

    def __init__(self, trunk: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, x: Tensor) -> Tensor:
        ids = x[:, 0]
        real = ids >= 0
        states = self.trunk(input_ids=ids.clamp(min=0), attention_mask=real.long()).last_hidden_state
        return self.head((states * real[..., None]).sum(1) / real.sum(1, keepdim=True))


class Words(nn.Module):
    """A causal model of transformers whose classes are words (C, A), behind prompts (B, 2, L) of one length."""

    words: Tensor

    def __init__(self, trunk: Any, words: Tensor) -> None:
        super().__init__()
        self.trunk = trunk
        self.register_buffer("words", words)

    def answer_logits(self, x: Tensor, answers: Tensor) -> Tensor:
        """Logits (B, A, V) of answers (B, A), computed there alone."""
        ids = torch.cat([x[:, 0], answers], 1)
        states = self.trunk.model(input_ids=ids, use_cache=False).last_hidden_state
        return self.trunk.lm_head(states[:, x.shape[2] - 1 : -1]).float()

    def scores(self, x: Tensor) -> Tensor:
        """Log-likelihood (B, C) of each class's answer: a pass for each of them."""
        found = []
        for words in self.words:
            answers = words.expand(len(x), -1)
            found.append(-_each(self.answer_logits(x, answers), answers).sum(1))
        return torch.stack(found, 1)


def _each(logits: Tensor, answers: Tensor) -> Tensor:
    """−log p (B, A) of each token."""
    return F.cross_entropy(logits.transpose(1, 2), answers, reduction="none")


def of_classes(net: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x), y)


def of_words(net: Words, x: Tensor, y: Tensor) -> Tensor:
    answers = net.words[y]
    return _each(net.answer_logits(x, answers), answers).mean()


def with_head(backbone: Any, classes: int, kind: type[Images] | type[Texts], device: torch.device) -> Pair:
    """A backbone of clplat's with a linear head, and by hand its network with one."""
    from clplat.backbones.base import Classifier
    from clplat.backbones.heads import Linear

    head, own = Linear(backbone.embed_dim, classes), nn.Linear(backbone.embed_dim, classes)
    with torch.no_grad():
        own.weight.copy_(head.weight)
        own.bias.copy_(head.bias)
    model = Classifier(backbone, head).to(device).train()
    return Pair(model, kind(copy.deepcopy(backbone.net), own).to(device).train(), of_classes)


def with_words(net: Any, words: Tensor, length: int) -> Pair:
    """A causal network of transformers as clplat's model of prompts of `length` tokens, and by hand."""
    from clplat.backbones.language_model import LanguageModel
    from clplat.stream import Answers

    by_hand = Words(copy.deepcopy(net), words.to(net.device)).train()
    answers = Answers(words, end=int(words[0, -1]), vocabulary=net.config.vocab_size)
    return Pair(LanguageModel(net, length).assemble(None, answers).train(), by_hand, of_words, answers)


def prompts(count: int, length: int, vocabulary: int, classes: int) -> tuple[Tensor, Tensor]:
    """Random texts (n, 2, L) that may be answered by any class, and labels (n,)."""
    drawn = torch.Generator().manual_seed(0)
    x = torch.full((count, 2, length), -1)
    x[:, 0] = torch.randint(3, vocabulary, (count, length), generator=drawn)
    return x, torch.randint(classes, (count,), generator=drawn)


def sides(pair: Pair, method: str, work: Work, replay: int = 8, fabric: Any = None) -> Any:
    """Both sides of `naive`, `er` (`replay` samples beside each batch, of `SLOTS`) or `lora` (queries and values)."""
    from clplat import Experience, Kind
    from clplat.strategies.er import ER
    from clplat.strategies.lora import SequentialLoRA
    from clplat.strategies.naive import Naive

    memory, make = None, lambda parameters: torch.optim.SGD(parameters, lr=RATE)
    if method == "lora":
        strategy: Any = SequentialLoRA(model=pair.model, rank=RANK, alpha=ALPHA, dropout=0.0, lr=RATE)
        strategy.grow(Experience(0, "turn-0", Kind.LEARN, None, classes=tuple(range(work.classes))))
        adapt(pair, strategy.adapters)
        make = lambda parameters: torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)  # noqa: E731
    elif method == "er":
        strategy = ER(model=pair.model, memory=SLOTS, replay_batch=replay, lr=RATE)
        memory = Reservoir(work.data[0][0].to(work.device), SLOTS, replay)
    else:
        strategy = Naive(model=pair.model, lr=RATE)
    return Ours(strategy, work, fabric), Hand(pair.net, pair.loss, work, make, pair.prepare, memory)


def adapt(pair: Pair, adapters: Any) -> None:
    """Give the network by hand peft's adapters, as clplat's model has them."""
    from peft import LoraConfig, inject_adapter_in_model

    names = [name.removeprefix("net.") for name in adapters.layers]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names), pair.net.trunk)
    for name in names:
        mine, own = adapters.backbone.get_submodule(f"net.{name}"), pair.net.trunk.get_submodule(name)
        for factor in ("lora_A", "lora_B"):
            getattr(own, factor)["default"].weight.data = getattr(mine, factor)["shared"].weight.data.clone()
