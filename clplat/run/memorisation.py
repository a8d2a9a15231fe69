"""What the language model of a run still knows of erased texts, as TOFU, MUSE and open-unlearning measure it.

Sources  Maini et al., "TOFU", COLM 2024, arXiv:2401.06121; Shi et al., "MUSE", ICLR 2025, arXiv:2407.06460; Dorna et
         al., "OpenUnlearning", 2025, arXiv:2506.12618. What is asked of which set, the tokens written (200 of TOFU's
         answers, 128 of verbatim texts, 32 of MUSE's answers), where these end, and the 40 % of Min-K% are as in
         open-unlearning's configurations and MUSE's scripts; formulas: `clplat.metrics.memorisation`.
Losses are means over an answer's tokens with its end, as the run learned it. Extraction strength, exact memorisation
and Min-K% leave the end out.
Differs  prompt and answer become tokens apart, as the run learned them. open-unlearning leaves out the last token of a
         text that has no end, too, and puts a space behind a verbatim prompt; ROUGE is without stemming (TOFU's and
         open-unlearning's stem). In a chat MUSE's examples stand in what the user says.

Shapes: n questions, K wrong answers to each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clplat.config.settings import Config
from clplat.data.unlearning_sets import SHARES, Question, asked, find_sets, muse_questions, muse_texts, tofu
from clplat.errors import MissingError, UserError
from clplat.metrics import memorisation as measures
from clplat.metrics.text import rouge_l, rouge_l_recall
from clplat.run.reader import Reader, Seen

ANSWER, VERBATIM, SHORT = 200, 128, 32  # tokens written
STOPS = ("\n\n", "\nQuestion", "Question:")  # where an answer of MUSE ends
MIN_K = 0.4
FILE = "memorisation.json"  # in the run's folder
NO_REFERENCE = "no reference: no run that never had the erased texts was given"


# --- TOFU -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Found:
    """What is measured of one model.

    Args:
        values: measures that need no other model.
        ratios: (n,) truth ratios on what was erased; empty for MUSE.
        auc: `text_auc`; None where there is nothing unseen to compare with.
    """

    values: dict[str, float]
    ratios: np.ndarray
    auc: float | None


@dataclass(frozen=True, eq=False)
class Tofu:
    """TOFU's sets, of which `forget` was erased. At most `most` questions of each, the first ones."""

    folder: Path
    forget: str
    most: int | None = None

    def sets(self) -> dict[str, list[Question]]:
        """Questions of each set; those never seen (holdout) only where their file is there."""
        names = [self.forget, "retain", "real_authors", "world_facts"]
        found = {name: tofu(self.folder, f"{name}_perturbed")[: self.most] for name in names}
        try:
            found["holdout"] = tofu(self.folder, self.forget.replace("forget", "holdout"))[: self.most]
        except MissingError:
            return found
        return found

    def of(self, reader: Reader, sets: dict[str, list[Question]]) -> Found:
        """All measures of one model."""
        parts = {name: _of_set(reader, name, questions) for name, questions in sets.items() if name != "holdout"}
        erased, values = parts[self.forget], dict[str, float]()
        for name in ("retain", "real_authors", "world_facts"):
            part = parts[name]
            among = measures.probability_among(part.losses, part.wrong)
            values[f"{name}_probability"] = measures.probability(part.losses) if name == "retain" else among
            values[f"{name}_rouge"] = part.rouge
            values[f"{name}_truth_ratio"] = measures.kept_truth(part.ratios)
        utility = measures.model_utility(list(values.values()))
        auc = None
        if "holdout" in sets:
            unseen = _answers(reader, sets["holdout"], "answers of holdout")
            auc = measures.text_auc(_min_k(erased.seen), _min_k(unseen))
        first = {
            "forget_truth_ratio": measures.erased_truth(erased.ratios),
            "forget_probability": measures.probability(erased.losses),
            "forget_rouge": erased.rouge,
            "extraction_strength": _mean(erased.seen, measures.extraction_strength),
            "exact_memorisation": _mean(erased.seen, measures.exact_memorisation),
            "model_utility": utility,
        }
        return Found(first | values, erased.ratios, auc)


@dataclass(frozen=True, eq=False)
class _Part:
    """Right answers of one set as seen; wrong, (n, K), their losses; mean ROUGE-L recall; truth ratios (n,)."""

    seen: list[Seen]
    wrong: np.ndarray
    rouge: float
    ratios: np.ndarray

    @property
    def losses(self) -> list[float]:
        """Of the right answers."""
        return [seen.loss for seen in self.seen]


def _of_set(reader: Reader, name: str, questions: Sequence[Question]) -> _Part:
    said = [asked(q.question, reader.chat) for q in questions]
    seen = _answers(reader, questions, f"answers of {name}")
    count = len(questions[0].wrong)
    wrong = reader.see(
        [prompt for prompt in said for _ in range(count)], [w for q in questions for w in q.wrong],
        f"wrong answers of {name}",
    )  # fmt: skip
    losses = np.array([one.loss for one in wrong]).reshape(len(questions), count)
    right = [one.loss for one in seen]
    if paraphrased := [q.paraphrase for q in questions if q.paraphrase is not None]:
        right = [one.loss for one in reader.see(said, paraphrased, f"paraphrases of {name}")]
    written = reader.write(said, ANSWER, f"questions of {name}")
    rouge = float(np.mean([rouge_l_recall(w, q.answer) for w, q in zip(written, questions, strict=True)]))
    return _Part(seen, losses, rouge, measures.truth_ratios(right, losses))


def _answers(reader: Reader, questions: Sequence[Question], what: str) -> list[Seen]:
    return reader.see([asked(q.question, reader.chat) for q in questions], [q.answer for q in questions], what)


def _mean(seen: Sequence[Seen], measure: Callable[[Any, Any], float]) -> float:
    return float(np.mean([measure(*one.plain()[:2]) for one in seen]))


def _min_k(seen: Sequence[Seen]) -> list[float]:
    return [measures.min_k(one.plain()[2], MIN_K) for one in seen]


# --- MUSE -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Muse:
    """MUSE's sets, of News or Books. At most `most` questions and texts of each, the first ones."""

    folder: Path
    most: int | None = None

    def sets(self) -> dict[str, Any]:
        """Questions and texts of each set; examples (icl) are all taken."""
        found: dict[str, Any] = {"verbatim": muse_questions(self.folder, "forget")[: self.most]}
        for name in ("forget_qa", "retain_qa"):
            found[name] = muse_questions(self.folder, name)[: self.most]
            found[f"{name}_icl"] = muse_questions(self.folder, f"{name}_icl")
        for name in ("forget", "holdout"):
            found[f"privleak_{name}"] = muse_texts(self.folder, f"privleak/{name}")[: self.most]
        return found

    def of(self, reader: Reader, sets: dict[str, Any]) -> Found:
        """All measures of one model."""
        verbatim: list[Question] = sets["verbatim"]
        begun = [q.question for q in verbatim]
        written = reader.write(begun, VERBATIM, "verbatim texts", spoken=False)
        seen = reader.see(begun, [q.answer for q in verbatim], "verbatim texts", spoken=False)
        scores = [rouge_l(w, reader.begun(q.answer, VERBATIM)) for w, q in zip(written, verbatim, strict=True)]
        texts = [sets[f"privleak_{name}"] for name in ("forget", "holdout")]
        erased, unseen = (_min_k(reader.see([""] * len(t), t, "texts", spoken=False)) for t in texts)
        values = {
            "verbatim_memory": float(np.mean(scores)),
            "knowledge_memory": _knowledge(reader, sets, "forget_qa"),
            "retained_knowledge": _knowledge(reader, sets, "retain_qa"),
            "extraction_strength": _mean(seen, measures.extraction_strength),
            "exact_memorisation": _mean(seen, measures.exact_memorisation),
        }
        return Found(values, np.empty(0), measures.text_auc(erased, unseen))


def _knowledge(reader: Reader, sets: dict[str, Any], name: str) -> float:
    """Mean ROUGE-L of answers after examples, of which as many are shown as fit."""
    questions, examples = sets[name], list(sets[f"{name}_icl"])
    told = len(examples)
    while True:
        shown = "".join(f"{asked(q.question, False)} {q.answer}\n\n" for q in examples)
        prompts = [shown + asked(q.question, False) for q in questions]
        if not examples or reader.room(prompts):
            break
        examples.pop()
    if len(examples) < told:
        reader.notes |= {f"{len(examples)} of {told} examples before {name} are shown: no more fit": None}
    scores = []
    for answer, question in zip(reader.write(prompts, SHORT, f"questions of {name}"), questions, strict=True):
        for stop in STOPS:
            answer = answer.split(stop)[0]
        scores.append(rouge_l(answer, question.answer))
    return float(np.mean(scores))


# --- both -------------------------------------------------------------------------------------------------------------


def check(*, most: int | None, batch_size: int, device: str) -> None:
    """Refuse what is out of range."""
    faults = [] if most is None or most >= 1 else [f"most: {most} is out of range (valid: ≥ 1, or None)"]
    faults += [] if batch_size >= 1 else [f"batch_size: {batch_size} is out of range (valid: ≥ 1)"]
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        faults.append(f"device: {device!r} is not here (valid: cpu, or cuda where there is one)")
    if faults:
        raise UserError(*faults)


def benchmark_of(
    config: Config, name: str, path: str | Path | None, forget: str | None, most: int | None
) -> Tofu | Muse:
    """What to measure by; what is None is that of the run's stream, where this is `tofu`.

    Raises:
        UserError, MissingError: an unknown benchmark or set; its folder is not there.
    """
    if name not in ("tofu", "muse"):
        raise UserError(f"benchmark: {name!r} is unknown (valid: tofu, muse)")
    own = config.stream.options if config.stream.name == name else {}
    folder = find_sets(name, own.get("path") if path is None else path, config.data_root)
    if name == "muse":
        if forget is not None:
            raise UserError(f"forget: {forget!r} has no meaning with muse (valid: None)")
        return Muse(folder, most)
    forget = own.get("forget", "forget10") if forget is None else forget
    if forget not in (known := [f"forget{share}" for share in SHARES]):
        raise UserError(f"forget: {forget!r} is unknown (valid: {', '.join(known)})")
    return Tofu(folder, forget, most)


def compared(benchmark: Tofu | Muse, readers: Sequence[Callable[[], Reader]]) -> dict[str, Any]:
    """What is measured of a run's model and of one that never had the erased texts, one after the other in memory.

    Args:
        readers: make the reader of the run's model, and of the other where there is one.
    """
    sets, notes, found = benchmark.sets(), dict[str, None](), list[Found]()
    for make in readers:
        reader = make()
        found.append(benchmark.of(reader, sets))
        notes |= reader.notes
    mine, theirs = found[0], found[1] if len(found) > 1 else None
    why, both = dict[str, str](), dict[str, float | None]()
    if isinstance(benchmark, Tofu):
        both["forget_quality"] = None if theirs is None else measures.forget_quality(mine.ratios, theirs.ratios)
        if theirs is None:
            why["forget_quality"] = NO_REFERENCE
    both["privacy_leakage"] = _leakage(mine, theirs, why)
    own = {"benchmark": "tofu", "forget": benchmark.forget} if isinstance(benchmark, Tofu) else {"benchmark": "muse"}
    models = [None if one is None else {**one.values, "text_auc": one.auc} for one in (mine, theirs)]
    asked_of = {name: len(items) for name, items in sets.items()}
    return own | {"folder": str(benchmark.folder), "run": models[0], "retrained": models[1], **both, "asked": asked_of,
                  "notes": list(notes), "why_null": why}  # fmt: skip


def _leakage(mine: Found, theirs: Found | None, why: dict[str, str]) -> float | None:
    """MUSE's PrivLeak, or None and why."""
    if theirs is None:
        why["privacy_leakage"] = NO_REFERENCE
    if mine.auc is None:
        why["text_auc"] = why["privacy_leakage"] = "no texts that neither model has seen: the set holdout is not there"
    if theirs is None or mine.auc is None or theirs.auc is None:
        return None
    found = measures.privacy_leakage(mine.auc, theirs.auc)
    if found is None:
        why["privacy_leakage"] = "the retrained model itself tells every erased text from the unseen ones"
    return found
