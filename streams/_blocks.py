"""Texts cut into blocks whose tokens are to be predicted, and streams that are scored by how well they are.

Shapes: N blocks, A tokens of the longest that are predicted. Inputs are those of `Answerer`, the prompt being a block's
first token, which only conditions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clplat.data.tokens import Tokenizer, encode_cached, padded
from clplat.errors import MissingError
from clplat.stream import Data, Experience, Kind, Stream


class Predicted(Stream):
    """A stream whose test sets are blocks to predict; the score of a set is 1 / perplexity, over all its tokens."""

    perplexity = True

    def score(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Log-likelihood (B,) of each block, from predictions (B, 1)."""
        return predictions[:, 0]

    def weights(self, labels: Tensor) -> Tensor:
        """Tokens (B,) of each block that are predicted."""
        return (labels >= 0).sum(1)

    def pooled(self, mean: float) -> float:
        """1 / perplexity."""
        return math.exp(mean)


class Passages(Predicted):
    """Texts that are not learned, each set of them an experience.

    Args:
        sets: name of each set, and its blocks as `to_predict` makes them.
    """

    def __init__(self, sets: Sequence[tuple[str, Data]]) -> None:
        made = [Experience(i, name, Kind.LEARN, None, test=data) for i, (name, data) in enumerate(sets)]
        super().__init__(made, num_classes=0, input_shape=(3,))


def blocks(documents: Sequence[np.ndarray], end: int, length: int) -> tuple[Tensor, Tensor]:
    """Documents, each (n,) token ids, one after the other with the token `end` between them, in blocks.

    Blocks do not overlap, and have `length` tokens, the last one what is left. The first token of each is not
    predicted; a last block of one token is left out.

    Returns:
        (N, 1) int32, the first tokens, and (N, A) the others, filled with -1; A < length.
    """
    parts = [part for document in documents for part in (document, np.array([end]))][:-1]
    flat = np.concatenate(parts).astype(np.int32) if parts else np.arange(0, dtype=np.int32)
    rows = [flat[start : start + length] for start in range(0, len(flat), length)]
    table = padded([row for row in rows if len(row) > 1])
    return table[:, :1], table[:, 1:]


def cut(documents: Sequence[str], tokenizer: Tokenizer, length: int) -> tuple[Tensor, Tensor]:
    """`blocks` of texts; the template that a tokenizer puts around one is left out."""
    return blocks(encode_cached(tokenizer, documents), tokenizer.end, length)


def to_predict(first: Tensor, others: Tensor) -> Data:
    """Blocks (N, 1) and (N, A) as a test set: inputs (N, 3, A), labels (N, A) the tokens that are predicted."""
    inputs = torch.full((len(first), 3, others.shape[1]), -1, dtype=torch.int32)
    inputs[:, 0, :1], inputs[:, 2] = first, others
    return Data(inputs, others.long())


def read_text(file: Path) -> str:
    """A text in UTF-8.

    Raises:
        MissingError: it can't be read as such.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise MissingError(f"{file} can't be read ({error}): replace it by a text in UTF-8") from error


def is_file(name: str) -> bool:
    """Whether the name of a text is that of a file."""
    return name.endswith(".txt")


def called(name: str) -> str:
    """What a text is called in tables: a file by its name without folder and ending."""
    return Path(name).stem if is_file(name) else name
