"""Prompts and answers in the ids of a tokenizer: what is too long, what can't be told apart, what is said of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from clplat.data.tokens import Tokenizer, check_different, encode_cached, padded
from clplat.errors import UserError
from clplat.metrics.text import normalized

KEPT_AT_END = 16  # tokens of a prompt that is cut: its cue for the answer


class Spoken:
    """Prompts and answers in a tokenizer's ids.

    Args:
        chat: see `Text`.
        max_length: tokens of a prompt.
        max_answer: tokens of an answer with its end.
        notes: takes a line for what is cut.
    """

    def __init__(self, tokenizer: Tokenizer, chat: bool, max_length: int, max_answer: int, notes: list[str]) -> None:
        self.tokenizer, self.chat, self.notes = tokenizer, chat, notes
        self.max_length, self.max_answer = max_length, max_answer
        self.before, self.behind = ((), ()) if chat else (tokenizer.before, tokenizer.behind)
        self.kept = KEPT_AT_END
        if chat:  # what the template puts behind a prompt stays, too
            (tail,) = tokenizer.encode([tokenizer.chat("|").rpartition("|")[2]])
            self.kept += len(tail)
        if max_length <= self.kept + len(self.before) + len(self.behind):
            raise UserError(
                f"stream.max_length: {max_length} leaves no room beside the tokenizer's own template (valid: ≥ "
                f"{self.kept + len(self.before) + len(self.behind) + 1})"
            )

    def prompts(self, texts: Sequence[str], which: np.ndarray, what: str) -> list[np.ndarray]:
        """Ids of `texts` at places `which` in the tokenizer's template, cut before their last `kept` where too long."""
        encoded = encode_cached(self.tokenizer, [self.tokenizer.chat(t) for t in texts] if self.chat else texts)
        room, found, cut = self.max_length - len(self.before) - len(self.behind), [], []
        for ids in (encoded[i] for i in which.tolist()):
            if len(ids) > room:
                cut.append(len(ids) + self.max_length - room)
            kept = ids if len(ids) <= room else np.concatenate([ids[: room - self.kept], ids[-self.kept :]])
            found.append(np.concatenate([self.before, kept, self.behind]).astype(np.int32))
        if cut:
            self.notes.append(
                f"stream.max_length: {len(cut)} of {len(which)} {what} lose tokens before their end ({max(cut)} at "
                f"most, of which {self.max_length} stay)"
            )
        return found

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
