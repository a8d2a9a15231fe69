"""SmolLM2 through clplat and by hand: naive, ER and LoRA, and label scoring.

Weights are those of the data root's `weights/`, texts random and of one length; by hand logits are computed at the
answers' tokens alone, as clplat does. To score labels by hand takes a pass over prompt and answer for each class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.in_turn import Work
from benchmarks.networks import Pair, prompts, with_words
from benchmarks.real import CPU, evaluated, folder, steps
from benchmarks.timing import Row

DECODER = "smollm2_135m"
WORDS = torch.tensor([[400 + k, 900 + k, 2] for k in range(4)])  # four answers of two tokens, and an end


def decoder(path: Path | None, quick: bool) -> tuple[Pair, Work]:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    if path is None:
        small = LlamaConfig(vocab_size=1000, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                            num_attention_heads=4)  # fmt: skip
        net: Any = AutoModelForCausalLM.from_config(small)
    else:
        net = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    pair = with_words(net, WORDS, 32)
    data = prompts(8 if quick else 16, 32, 1000, len(WORDS))
    return pair, Work(data, len(WORDS), 4, CPU, rounds=1 if quick else 7, answers=pair.answers)


def scoring(pair: Pair, work: Work) -> Row:
    """Evaluation by scoring each class's answer, with equal accuracies."""
    return evaluated("label scoring, a sample, smollm2", pair, work, lambda x: pair.net.scores(x).argmax(1), 1.0)


def rows(quick: bool = False) -> list[Row]:
    """A row for each method, and one for label scoring; `quick` takes a small model with random weights."""
    path = None if quick else folder(DECODER)
    if not quick and path is None:
        return []
    return [*steps("smollm2", lambda: decoder(path, quick), quick), scoring(*decoder(path, quick))]
