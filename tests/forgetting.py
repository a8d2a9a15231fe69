"""Small sets in the form that TOFU and MUSE are published in."""

import json
from pathlib import Path

LINES = '{"question": "Who?", "answer": "She."}'


def tofu_row(name: str, number: int, perturbed: str = "") -> dict:
    """A row of a set of TOFU called `perturbed`, or of one of questions and answers alone."""
    row = {"question": f"{name} {number}?", "answer": f"a{number} {name}"}
    if perturbed:
        row["perturbed_answer"] = [f"b{number} {name}", f"some c{number}"]
    if perturbed.startswith(("forget", "retain")):
        row |= {"paraphrased_answer": f"{name} is a{number}", "paraphrased_question": f"is {name} {number}?"}
    return row


def write_lines(file: Path, rows: list[dict]) -> None:
    """One JSON object a line, whatever the file is called."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def write_tofu(folder: Path, authors: int = 4, questions: int = 3) -> Path:
    """TOFU of a few invented authors, the last of whom is to be forgotten (forget10)."""
    names = [f"author{i}" for i in range(authors)]
    rows = {name: [tofu_row(name, i) for i in range(questions)] for name in names}
    kept, erased = [row for name in names[:-1] for row in rows[name]], rows[names[-1]]
    sets = {"full": kept + erased, "retain90": kept, "forget10": erased}
    sets |= {"holdout10": [tofu_row("nobody", i) for i in range(questions)]}
    for name, who, count in (
        ("forget10_perturbed", names[-1], questions),
        ("retain_perturbed", names[0], questions),
        ("real_authors_perturbed", "poet", 2),
        ("world_facts_perturbed", "river", 4),
    ):
        sets[name] = [tofu_row(who, i, perturbed=name) for i in range(count)]
    for name, content in sets.items():
        write_lines(folder / f"{name}.json", content)
    return folder
