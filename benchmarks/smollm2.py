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
from benchmarks.real import CPU, folder, steps
from benchmarks.timing import Row, clock, paired

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
    from clplat import Data, Experience, Kind, Stream
    from clplat.run.evaluation import Evaluator
    from clplat.strategies.naive import Naive

    (x, y), read = work.data, clock(CPU)
    test = Experience(0, "test", Kind.LEARN, None, test=Data(x, y), classes=tuple(range(work.classes)))
    stream = Stream([test], num_classes=work.classes, input_shape=tuple(x.shape[1:]))
    evaluator, strategy = Evaluator(stream, device=CPU, batch_size=work.batch), Naive(model=pair.model)
    times, right = ([], []), [0.0, 0.0]

    def ours() -> float:
        return float(evaluator(strategy)[0] or 0.0)

    @torch.no_grad()
    def by_hand() -> float:
        parts = zip(x.split(work.batch), y.split(work.batch), strict=True)
        return sum(float((pair.net.scores(a).argmax(1) == b).float().sum()) for a, b in parts) / len(y)

    pair.net.eval()
    for number in range(work.rounds + 1):
        for side in (0, 1) if number % 2 else (1, 0):
            started = read()
            right[side] = (ours, by_hand)[side]()
            if number:
                times[side].append((read() - started) / len(y))
    note = f"{work.classes} answers; accuracy {right[0]:.3f} and {right[1]:.3f}"
    return paired("label scoring, a sample, smollm2", "ms", *times, "ratio", 1.0, note)


def rows(quick: bool = False) -> list[Row]:
    """A row for each method, and one for label scoring; `quick` takes a small model with random weights."""
    path = None if quick else folder(DECODER)
    if not quick and path is None:
        return []
    return [*steps("smollm2", lambda: decoder(path, quick), quick), scoring(*decoder(path, quick))]
