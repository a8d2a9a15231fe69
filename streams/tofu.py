"""TOFU: a language model learns about invented authors, and is asked to forget some of them.

Source   Maini, Feng, Schwarzschild, Lipton, Kolter, "TOFU: A Task of Fictitious Unlearning for LLMs", COLM 2024,
         arXiv:2401.06121; its files as locuslab/TOFU on the Hugging Face hub has them.
Differs  prompt and answer become tokens apart, as in every stream of text. TOFU learns for five epochs of all questions
         and unlearns for five of those to forget; how long here is `loop`'s to say.

What the model still knows after the request is measured by `clplat.memorisation`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from clplat.data.unlearning_sets import find_sets, tofu
from clplat.errors import UserError
from clplat.streams.text import Text
from clplat.streams.unlearning import Unlearning


class Tofu(Unlearning):
    """TOFU's questions about invented authors are learned, and those of some authors forgotten by a request.

    No author is held out: in evaluation questions are asked that were learned, scored by ROUGE-L recall.

    Args:
        seed: of everything drawn; null takes the run's seed.
        data_root: folder of data sets; null takes $CLPLAT_DATA.
        path: folder of the files; a relative one that is not in the working directory is looked for in the data root.
        forget: the set that the request erases: 1, 5 or 10 % of the authors.
        learn: whole: all questions (full) in one experience, as the paper; to the request those to forget are user:0.
            apart: those to keep (retain99, retain95 or retain90), then those to forget, in an experience each.
        tokenizer: as that of stream `text`.
        chat: give each question as what a user says, in the tokenizer's chat template; else it stands between
            "Question:" and "Answer:".
        max_length: tokens of a question with what stands around it, ≥ 32.
        max_answer: tokens of an answer with its end, ≥ 2; longer ones are cut, which is said. Also what is generated.
        buckets: training batches are cut from runs of so many, sorted by length, ≥ 1; 1: as drawn.
        test_questions: of each set, asked in evaluation, drawn alike for every seed, ≥ 1; null asks all.

    Raises:
        UserError: an option out of range, files that do not go together.
        MissingError: a file is not there; says what to put where.
    """

    paper: ClassVar[str] = "arXiv:2401.06121"

    def __init__(
        self,
        *,
        seed: int | None = None,
        data_root: str | None = None,
        path: str = "tofu",
        forget: Literal["forget01", "forget05", "forget10"] = "forget10",
        learn: Literal["whole", "apart"] = "whole",
        tokenizer: str | None = None,
        chat: bool = False,
        max_length: int = 512,
        max_answer: int = 200,
        buckets: int = 50,
        test_questions: int | None = 100,
    ) -> None:
        if test_questions is not None and test_questions < 1:
            raise UserError(f"stream.test_questions: {test_questions} is out of range (valid: ≥ 1, or null)")
        tasks = ["full"] if learn == "whole" else [f"retain{100 - int(forget[-2:])}", forget]
        base = Text(
            seed=seed, data_root=data_root, benchmark="tofu", path=path, tasks=tasks, tokenizer=tokenizer, chat=chat,
            max_length=max_length, max_answer=max_answer, buckets=buckets, evaluate="generate",
            test_per_class=test_questions,
        )  # fmt: skip
        assigned = None if learn == "apart" else _assigned(path, data_root, forget)
        erased = f"experience:{forget}" if assigned is None else "user:0"
        super().__init__(seed=seed, base=base, requests=[erased], user_assignment=assigned)


def _assigned(path: str, data_root: str | None, forget: str) -> list[int]:
    """0 for each row of the set full that is to be forgotten, -1 for the others."""
    folder = find_sets("tofu", path, data_root)
    erased, full = set(tofu(folder, forget)), tofu(folder, "full")
    if lacking := erased - set(full):
        raise UserError(
            f"stream.path: {len(lacking)} of {len(erased)} questions of {forget} are not in full (valid: files of one "
            "version; or stream.learn apart)"
        )
    return [0 if question in erased else -1 for question in full]
