"""The language model of a run as a reader and writer of texts that are not its stream's.

Shapes: b texts at once, T tokens of an answer or text, V ids of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from clplat.backbones.answering import Answerer, trimmed
from clplat.backbones.language_model import LanguageModel
from clplat.config.settings import Config
from clplat.data.prompts import Prompts
from clplat.data.tokens import padded
from clplat.errors import UserError
from clplat.run.export import network_of
from clplat.run.learner import Learner
from clplat.strategy import evaluating

MOST = 2048  # tokens of a prompt, and of an answer or text, that are read at most


@dataclass(frozen=True, eq=False)
class Seen:
    """A text of T tokens as a model sees it, each token given what comes before.

    Args:
        tokens: (T,) ids.
        log_p: (T,) float64, of each token.
        greedy: (T,) id of the most likely token at its place.
        ended: whether the last token is the one that ends an answer.
    """

    tokens: np.ndarray
    log_p: np.ndarray
    greedy: np.ndarray
    ended: bool

    @property
    def loss(self) -> float:
        """Mean over all tokens, in nats."""
        return float(-self.log_p.mean())

    def plain(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Greedy tokens, tokens and their log-probabilities, without the end."""
        last = len(self.tokens) - self.ended
        return self.greedy[:last], self.tokens[:last], self.log_p[:last]


class Reader:
    """A run's language model, which reads and writes texts.

    Args:
        learner: of the run, whose network is taken out of it.
        config: of the run.
        device: where it computes.
        batch_size: texts at once.

    Raises:
        UserError: no language model, or a learner that predicts by more than its network.
    """

    def __init__(self, learner: Learner, config: Config, device: str, batch_size: int) -> None:
        known = learner.of_run.preprocessing.text
        if not isinstance(learner.model, Answerer) or known is None:
            what = f"{config.backbone.name} on stream {config.stream.name}"
            raise UserError(f"memorisation: {what} writes no text (valid: a run of backbone language_model on texts)")
        self.model = network_of(learner, config, "memorisation").to(device)
        self.speaker = cast(LanguageModel, self.model.backbone)
        self.tokenizer, self.chat = learner.of_run.raw.tokenizer, bool(known["chat"])
        self.device, self.batch_size = device, batch_size
        self.mixed = config.fabric.precision == "bf16-mixed"
        share = 1 if self.speaker.seq2seq else 2
        self.most = int(min(MOST, self.speaker.context // share))
        self.notes: dict[str, None] = {}

    def see(self, prompts: Sequence[str], answers: Sequence[str], what: str, *, spoken: bool = True) -> list[Seen]:
        """Each answer given its prompt.

        Args:
            what: prompts and answers are, for notes.
            spoken: to a model that answers, with the token that ends an answer; else the text goes on.
        """
        asked_ids, told = self._prompts(prompts, what, spoken), self.tokenizer.encode(answers)
        pairs = []
        for before, ids in zip(asked_ids, told, strict=True):
            whole = [*ids, self.tokenizer.end] if spoken else list(ids)
            if not len(before):  # a tokenizer without a token that begins a text: nothing tells the first one
                before, whole = np.array(whole[:1], np.int32), whole[1:]
            pairs.append((before, np.array(whole[: self.most], np.int64), spoken and len(whole) <= self.most))
        self._note(sum(len(ids) + spoken > self.most for ids in told), len(told), f"{what} lose their end")
        if empty := sum(not len(ids) for _, ids, _ in pairs):
            raise UserError(f"memorisation: {empty} of {len(pairs)} {what} have no token to be told")
        found: list[Seen] = []
        for start in range(0, len(pairs), self.batch_size):
            found += self._seen(pairs[start : start + self.batch_size])
        return found

    @torch.no_grad()
    def _seen(self, pairs: Sequence[tuple[np.ndarray, np.ndarray, bool]]) -> list[Seen]:
        prompts = trimmed(padded([before for before, _, _ in pairs])).to(self.device)
        answers = padded([ids for _, ids, _ in pairs]).long().to(self.device)  # (b, T)
        with evaluating(self.model), torch.autocast(torch.device(self.device).type, torch.bfloat16, self.mixed):
            logits = self.speaker.answer_logits(prompts, answers).float()  # (b, T, V)
        chosen = logits.gather(2, answers.clamp(min=0).unsqueeze(2)).squeeze(2) - logits.logsumexp(2)
        best = logits.argmax(2).cpu().numpy()
        rows = zip(pairs, chosen.double().cpu().numpy(), best, strict=True)
        return [Seen(ids, log_p[: len(ids)], greedy[: len(ids)], ended) for (_, ids, ended), log_p, greedy in rows]

    @torch.no_grad()
    def write(self, prompts: Sequence[str], tokens: int, what: str, *, spoken: bool = True) -> list[str]:
        """What the model writes after each prompt, greedily: at most so many tokens."""
        found: list[str] = []
        rows = self._prompts(prompts, what, spoken)
        for start in range(0, len(rows), self.batch_size):
            ids = trimmed(padded(rows[start : start + self.batch_size])).to(self.device)
            with evaluating(self.model), torch.autocast(torch.device(self.device).type, torch.bfloat16, self.mixed):
                written = self.speaker.generate(ids, min(tokens, self.most), self.tokenizer.end)
            found += [self.tokenizer.decode([i for i in row if i >= 0]) for row in written.tolist()]
        return found

    def begun(self, text: str, tokens: int) -> str:
        """The first tokens of a text, as text."""
        return self.tokenizer.decode(self.tokenizer.encode([text])[0][:tokens])

    def room(self, prompts: Sequence[str]) -> bool:
        """Whether prompts fit in whole."""
        framing = Prompts(self.tokenizer, self.chat, self.most)
        return not framing.framed(self.tokenizer.encode(framing.said(prompts)))[1]

    def _prompts(self, prompts: Sequence[str], what: str, spoken: bool) -> list[np.ndarray]:
        framing = Prompts(self.tokenizer, self.chat and spoken, self.most)
        rows, cut = framing.framed(self.tokenizer.encode(framing.said(prompts)))
        self._note(len(cut), len(rows), f"prompts of {what} lose {framing.lost}")
        return rows

    def _note(self, some: int, of: int, what: str) -> None:
        if some:
            self.notes |= {f"{some} of {of} {what}: {self.most} tokens are read": None}
