"""Domains of text, one after the other: continual pretraining of a decoder on whole texts.

Source   Yıldız, Ravichandran, Sharma, Bethge, Ermis, "Investigating Continual Pretraining in Large Language Models:
         Insights and Implications", TMLR 2025, arXiv:2402.17400 (domains of M2D2 in similar or random order, perplexity
         on all of them after each); no code was found, and the paper itself could not be read: what is done here is by
         its abstract and by summaries of it.
Differs  domains come from files of the user's. Similar are those in which each token occurs about as often, which is
         ours. Blocks hold no template of the tokenizer's.

The texts of a domain are joined by the end token and cut into blocks of `max_length` tokens, of which all but the first
are predicted: training minimises the mean −ln p of a block's tokens. Test sets are scored by 1 / perplexity =
exp(Σ ln p / tokens), over all tokens of the set, which stands in the accuracy matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from clplat.data.datasets import find_root
from clplat.data.orderings import chain
from clplat.data.rows import find_rows
from clplat.data.splits import hold_out
from clplat.data.tokens import load_tokenizer
from clplat.data.worlds import generator
from clplat.errors import MissingError, UserError
from clplat.stream import Answers, Data, Experience, Kind
from clplat.streams._blocks import Passages, Predicted, called, cut, is_file, read_text, to_predict
from clplat.streams._text_reading import find

Blocks = tuple[Tensor, Tensor]  # (N, 1) int32 first tokens, (N, A) the others, filled with -1


class Corpora(Predicted):
    """Domains of text one after the other, of whose tokens a decoder predicts each from those before it in its block.

    Args:
        seed: of everything drawn; null takes the run's seed.
        data_root: folder of data sets; null takes $CLPLAT_DATA.
        path: folder of a folder for each domain; a relative one that is not in the working directory is looked for in
            the data root. A domain has train and test: .txt, one text in UTF-8, or .jsonl (or .json, .jsonl.gz, .csv,
            .parquet), one text a row, in its field `text`.
        domains: names in order; null takes all but those of `general_texts`, sorted.
        order: given; shuffled (by seed); or similar: the first is drawn by seed, and after each comes the one left
            whose training text has the most similar tokens, by the cosine of the roots of their frequencies.
        tokenizer: folder, name below weights/ of the data root or hub name; null takes that of the backbone's weights,
            and `bytes` (one token a byte) where these are random.
        max_length: tokens of a block, ≥ 32; perplexities of another one, or of another tokenizer, do not compare.
        train_blocks: keep the first so many training blocks of each domain, ≥ 1, so that each has as many tokens; null
            keeps all. A last block that is shorter is left out where there are others.
        test_blocks: the same for test blocks; null keeps all, with the last one.
        validation: share, in [0, 1), of each domain's training blocks held out.
        general_texts: text files (.txt, found like `path`), or domains of which the test part is read, whose perplexity
            is measured before the first experience and after each, and of which nothing is learned; null: none.

    Raises:
        UserError: an option out of range, an unknown domain.
        MissingError: a domain is not there, or has no text; says what to put where.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:2402.17400"

    def __init__(
        self,
        *,
        seed: int | None = None,
        data_root: str | None = None,
        path: str = "corpora",
        domains: list[str] | None = None,
        order: Literal["given", "shuffled", "similar"] = "given",
        tokenizer: str | None = None,
        max_length: int = 512,
        train_blocks: int | None = None,
        test_blocks: int | None = None,
        validation: float = 0.0,
        general_texts: list[str] | None = None,
    ) -> None:
        _check(order, max_length, validation, train_blocks=train_blocks, test_blocks=test_blocks,
               domains=domains, general_texts=general_texts)  # fmt: skip
        root, texts = find_root(data_root), general_texts or []
        folder = find(path, root)
        names = _names(folder, domains, texts)
        known = load_tokenizer(tokenizer)

        def read(name: str, part: str) -> Blocks:
            file = find(name, root, "general_texts") if is_file(name) else None
            return cut(_texts(folder / name, part) if file is None else [read_text(file)], known, max_length)

        notes = ["stream: scores are 1 / perplexity, and so is what figures and tables call accuracy"]
        train, test = ({n: _first(n, p, read(n, p), most, notes) for n in names}
                       for p, most in (("train", train_blocks), ("test", test_blocks)))  # fmt: skip
        names = _ordered(names, order, train, seed or 0)
        made = _experiences(names, train, test, validation, seed or 0)
        self.notes = tuple(notes)
        super().__init__(made, num_classes=0, input_shape=(2, 1))
        facts = {"tokenizer": tokenizer or "bytes", "fingerprint": known.fingerprint, "chat": False}
        self.origin = {"text": facts | {"max_length": max_length, "cue": False}, "shape": (2, 1)}
        # Asked for text, which evaluation never does, a model writes the next token.
        self.answers = Answers(torch.zeros(0, 0, dtype=torch.int64), known.end, known.size, new_tokens=1)
        if texts:
            sets = [(called(n), _first(n, "test", read(n, "test"), None, notes)) for n in texts]
            self.general = {"perplexity": Passages([(name, to_predict(*own)) for name, own in sets])}


def _check(order: str, max_length: int, validation: float, **optional: Any) -> None:
    asked: dict[str, tuple[Any, bool, str]] = {
        "order": (order, order in ("given", "shuffled", "similar"), "given, shuffled or similar"),
        "max_length": (max_length, max_length >= 32, "≥ 32"),
        "validation": (validation, 0 <= validation < 1, "in [0, 1)"),
    }
    for key, value in optional.items():
        listed = isinstance(value, list)
        holds = value is None or (bool(value) if listed else value >= 1)
        asked[key] = value, holds, "names, or null" if listed else "≥ 1, or null"
    bad = [f"stream.{k}: {v!r} is out of range (valid: {what})" for k, (v, holds, what) in asked.items() if not holds]
    if bad:
        raise UserError(*bad)


def _names(folder: Path, domains: list[str] | None, texts: Sequence[str]) -> list[str]:
    """Of the domains that are learned, in order."""
    known = sorted(p.name for p in folder.glob("*/") if p.is_dir())
    if not known:
        raise MissingError(f"stream.path: {folder} holds no domain: put folders with train.txt and test.txt there")
    aside, faults = [name for name in texts if not is_file(name)], []
    names = [name for name in known if name not in aside] if domains is None else domains
    for key, own in (("domains", names), ("general_texts", aside)):
        faults += [f"stream.{key}: {n!r} is unknown (valid: {', '.join(known)})" for n in own if n not in known]
    for key, own in (("domains", names), ("general_texts", [called(n) for n in texts])):
        twice = dict.fromkeys(name for name in own if own.count(name) > 1)
        faults += [f"stream.{key}: {name} stands there twice (valid: each once)" for name in twice]
    both = [name for name in aside if name in names]
    faults += [f"stream.general_texts: {n} is learned (valid: one that is not among stream.domains)" for n in both]
    if not names:
        faults.append("stream.general_texts: leaves no domain to learn (valid: fewer)")
    if faults:
        raise UserError(*faults)
    return list(names)


def _texts(folder: Path, part: str) -> list[str]:
    """The texts of a domain's train or test part."""
    file, rows = folder / f"{part}.txt", find_rows(folder, part, bare="text")
    if file.is_file() and rows is not None:
        raise UserError(f"stream.path: {folder} has {part}.txt and another file called {part} (valid: one of them)")
    if file.is_file():
        return [read_text(file)]
    if rows is None:
        raise MissingError(f"stream.path: {file} is missing: put it there, or {part}.jsonl with a field text a row")
    if strange := [i for i, row in enumerate(rows, 1) if not isinstance(row.get("text"), str)]:
        raise MissingError(f"stream.path: row {strange[0]} of {part} of {folder} has no text in its field text: add it")
    return [row["text"] for row in rows]


def _first(name: str, part: str, found: Blocks, most: int | None, notes: list[str]) -> Blocks:
    """The blocks of a part that are kept; `notes` takes a line for what is left out unasked."""
    first, others = found
    if not len(first):
        raise MissingError(f"stream: the {part} text of {name} has less than two tokens: put a longer one there")
    if part == "train" and len(first) > 1 and int(others[-1, -1]) < 0:
        if most is None or most >= len(first):
            notes.append(f"stream: the last {1 + int((others[-1] >= 0).sum())} training tokens of {name} are left out")
        first, others = first[:-1], others[:-1]
    return first[:most], others[:most]


def _ordered(names: list[str], order: str, train: dict[str, Blocks], seed: int) -> list[str]:
    draws = generator(seed, "domain_order")
    if order == "given":
        return names
    if order == "shuffled":
        return [names[i] for i in draws.permutation(len(names)).tolist()]
    counts = [torch.cat([part.flatten() for part in train[name]]) for name in names]
    size = 1 + max(int(ids.max()) for ids in counts)
    table = np.stack([np.bincount(ids[ids >= 0].numpy(), minlength=size) for ids in counts])
    return [names[i] for i in chain(np.sqrt(table), int(draws.integers(len(names)))).tolist()]


def _experiences(
    names: list[str], train: dict[str, Blocks], test: dict[str, Blocks], validation: float, seed: int
) -> list[Experience]:
    first, others, starts = _joined([train[name] for name in names])
    inputs = torch.full((len(first), 2, 1), -1, dtype=torch.int32)
    inputs[:, 0] = first
    learned = Data(inputs, others.long())
    held_out = to_predict(first, others) if validation else learned
    first, others, ends = _joined([test[name] for name in names])
    tested, made = to_predict(first, others), []
    for i, name in enumerate(names):
        kept, held = np.arange(starts[i], starts[i + 1]), np.arange(0)
        if validation:
            kept, held = hold_out(kept, np.zeros(starts[-1]), validation, generator(seed, "validation", i))
        made.append(
            Experience(
                index=i,
                name=name,
                kind=Kind.LEARN,
                train=learned.subset(torch.from_numpy(kept)),
                test=tested.subset(torch.arange(ends[i], ends[i + 1])),
                valid=held_out.subset(torch.from_numpy(held)) if len(held) else None,
                task=i,
            )
        )
    return made


def _joined(parts: Sequence[Blocks]) -> tuple[Tensor, Tensor, list[int]]:
    """Blocks of all domains as one table, and the first row of each and how many there are."""
    width = max(others.shape[1] for _, others in parts)
    starts = np.cumsum([0, *(len(first) for first, _ in parts)]).tolist()
    others = torch.cat([pad(others, (0, width - others.shape[1]), value=-1) for _, others in parts])
    return torch.cat([first for first, _ in parts]), others, starts
