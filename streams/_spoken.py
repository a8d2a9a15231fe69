"""Prompts and answers in the ids of a tokenizer: what is too long, what can't be told apart, what is said of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from clplat.data.prompts import Prompts
from clplat.data.tokens import Tokenizer, check_different, encode_cached, padded
from clplat.errors import UserError
from clplat.metrics.text import normalized


class Spoken:
    """Prompts and answers in a tokenizer's ids.

    Args:
        chat: see `Text`.
        max_length: tokens of a prompt.
        max_answer: tokens of an answer with its end.
        notes: takes a line for what is cut.
        cue: whether the end of a prompt asks for the answer, and so stays where the prompt is cut.
    """

    def __init__(
        self, tokenizer: Tokenizer, chat: bool, max_length: int, max_answer: int, notes: list[str], cue: bool = True
    ) -> None:
        self.tokenizer, self.notes, self.max_length, self.max_answer = tokenizer, notes, max_length, max_answer
        self._prompts = Prompts(tokenizer, chat, max_length, cue)

    def facts(self, name: str | None) -> dict[str, Any]:
        """How texts become ids, as data; `name` is the tokenizer's."""
        own = {"tokenizer": name or "bytes", "fingerprint": self.tokenizer.fingerprint}
        how = self._prompts
        return own | {"chat": how.chat, "max_length": how.max_length, "cue": how.cue}

    def prompts(self, texts: Sequence[str], which: np.ndarray, what: str) -> list[np.ndarray]:
        """Ids of `texts` at places `which` in the tokenizer's template, cut where too long (see `Prompts`)."""
        encoded = encode_cached(self.tokenizer, self._prompts.said(texts))
        found, cut = self._prompts.framed(encoded[i] for i in which.tolist())
        if cut:
            self.notes.append(
                f"stream.max_length: {len(cut)} of {len(which)} {what} lose {self._prompts.lost} ({max(cut)} at most, "
                f"of which {self._prompts.max_length} stay)"
            )
        return found

    def uncut(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of `texts` in the tokenizer's template, however many they are."""
        whole = Prompts(self.tokenizer, self._prompts.chat, sys.maxsize)
        return whole.framed(self.tokenizer.encode(whole.said(texts)))[0]

    def classes(self, names: Sequence[str], generated: bool) -> Tensor:
        """(C, A) ids of classes.

        Raises:
            UserError: one is too long, or two can't be told apart.
        """
        ids = self._ended(names)
        for name, row in zip(names, ids, strict=True):
            if len(row) > self.max_answer:
                raise UserError(
                    f"stream.max_answer: {self.max_answer} is below the {len(row)} tokens of the answer {name!r} with "
                    f"its end (valid: ≥ {max(map(len, ids))})"
                )
        check_different(ids, names)
        alike: dict[str, str] = {"": ""}
        for name in names if generated else ():
            other = alike.setdefault(normalized(name), name)
            if other != name:
                raise UserError(
                    f"stream.evaluate: generate can't tell the answer {name!r} from {other!r}, since case and "
                    "punctuation are not compared (valid: score)"
                )
        return padded(ids).long()

    def free(self, texts: Sequence[str]) -> Tensor:
        """(n, A) ids of free answers, cut where they are too long."""
        ids = self._ended(texts)
        if cut := sum(len(row) > self.max_answer for row in ids):
            self.notes.append(
                f"stream.max_answer: {cut} of {len(ids)} free answers are learned up to their first "
                f"{self.max_answer - 1} tokens (the longest has {max(map(len, ids)) - 1})"
            )
        return padded([np.concatenate([row[:-1][: self.max_answer - 1], row[-1:]]) for row in ids]).long()

    def _ended(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.append(row, np.int32(self.tokenizer.end)) for row in encode_cached(self.tokenizer, texts)]
