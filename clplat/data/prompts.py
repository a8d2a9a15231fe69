"""Prompts in the ids of a tokenizer, in its template, and cut where they are too long."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from clplat.data.tokens import Tokenizer
from clplat.errors import UserError

KEPT_AT_END = 16  # tokens of a prompt that is cut: its cue for the answer


class Prompts:
    """Prompts of at most so many tokens; one that is longer loses those before its last `kept`.

    Args:
        tokenizer: whose ids.
        chat: give each prompt as what a user says, in the tokenizer's chat template, which stands for its plain one.
        max_length: tokens of a prompt, its template's included.
        cue: whether the end of a prompt asks for the answer, and so is kept; else a long one loses its end.

    Raises:
        UserError: the template leaves no room, or there is none for a chat.
    """

    def __init__(self, tokenizer: Tokenizer, chat: bool, max_length: int, cue: bool = True) -> None:
        self.tokenizer, self.chat, self.max_length, self.cue = tokenizer, chat, max_length, cue
        self.before, self.behind = ((), ()) if chat else (tokenizer.before, tokenizer.behind)
        self.kept = KEPT_AT_END if cue else 0
        if chat:  # what the template puts behind a prompt stays, too
            (tail,) = tokenizer.encode([tokenizer.chat("|").rpartition("|")[2]])
            self.kept += len(tail)
        beside = self.kept + len(self.before) + len(self.behind)
        if max_length <= beside:
            raise UserError(
                f"stream.max_length: {max_length} leaves no room beside the tokenizer's own template (valid: ≥ "
                f"{beside + 1})"
            )

    def said(self, texts: Sequence[str]) -> Sequence[str]:
        """What is to be tokenised of each text."""
        return [self.tokenizer.chat(text) for text in texts] if self.chat else texts

    def framed(self, encoded: Iterable[Sequence[int] | np.ndarray]) -> tuple[list[np.ndarray], list[int]]:
        """Ids (n,) of tokenised texts in the template, cut where too long; and how long those were that were cut."""
        room, found, cut = self.max_length - len(self.before) - len(self.behind), [], []
        for ids in (np.asarray(row, np.int32) for row in encoded):
            if len(ids) > room:
                cut.append(len(ids) + self.max_length - room)
            end = len(ids) - self.kept
            kept = ids if len(ids) <= room else np.concatenate([ids[: room - self.kept], ids[end:]])
            found.append(np.concatenate([self.before, kept, self.behind]).astype(np.int32))
        return found, cut

    @property
    def lost(self) -> str:
        """What a long prompt loses, in words."""
        return "tokens before their end" if self.kept else "their end"
