"""Files of TOFU and MUSE in the forms that they are published in, and what is said where they are not there."""

import json

import pytest
from forgetting import LINES, tofu_row, write_lines

from clplat.data.unlearning_sets import PERTURBED, Question, find_sets, muse_questions, muse_texts, tofu
from clplat.errors import MissingError, UserError


@pytest.mark.parametrize("layout", ["forget01.json", "forget01.jsonl", "forget01/train"])
def test_a_set_of_tofu_is_read_from_each_form_that_it_is_published_in(layout, tmp_path):
    """One JSON object a line, although the file is called .json; the hub's parquet in two parts."""
    rows = [tofu_row("who", i) for i in range(5)]
    if layout.endswith("train"):
        write_parts(tmp_path / "forget01" / "train", rows)
    else:
        write_lines(tmp_path / layout, rows)
    assert tofu(tmp_path, "forget01") == [Question(r["question"], r["answer"]) for r in rows]


def write_parts(place, rows):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    place.parent.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate((rows[:2], rows[2:])):
        parquet.write_table(pa.Table.from_pylist(part), f"{place}-{i:05}-of-00002.parquet")


@pytest.mark.parametrize("name", [f"{name}_perturbed" for name in PERTURBED])
def test_perturbed_sets_have_wrong_answers_and_those_of_invented_authors_a_paraphrase(name, tmp_path):
    rows = [tofu_row("who", i, perturbed=name) for i in range(3)]
    write_lines(tmp_path / f"{name}.json", rows)
    found = tofu(tmp_path, name)
    assert [q.wrong for q in found] == [tuple(r["perturbed_answer"]) for r in rows]
    assert [q.paraphrase for q in found] == [r.get("paraphrased_answer") for r in rows]
    assert (found[0].paraphrase is None) == name.startswith(("real", "world"))


def test_muse_is_read_as_the_hub_and_as_the_repository_have_it(tmp_path):
    """Bare texts in the repository's JSON, a column `text` in the hub's; and retain2_qa is the hub's retain_qa."""
    texts, pairs = ["one. ", "two"], [{"question": f"q{i}", "answer": f"a{i}"} for i in range(2)]
    for path, content in {
        "repository/privleak/forget": texts,
        "repository/knowmem/retain2_qa": pairs,
        "repository/verbmem/forget": [{"prompt": "It was", "gt": " a night."}],
        "hub/privleak/forget": [{"text": text} for text in texts],
        "hub/knowmem/retain_qa": pairs,
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{path}.json").write_text(json.dumps(content))
    write_parts(tmp_path / "hub" / "raw" / "retain1", [{"text": text} for text in "abc"])
    for kind in ("repository", "hub"):
        assert muse_texts(tmp_path / kind, "privleak/forget") == texts
        assert muse_questions(tmp_path / kind, "retain_qa") == [Question(f"q{i}", f"a{i}") for i in range(2)]
    assert muse_questions(tmp_path / "repository", "forget") == [Question("It was", " a night.")]
    assert muse_texts(tmp_path / "hub", "raw/retain1") == list("abc")
    (tmp_path / "hub" / "raw" / "retain1-00000-of-00002.parquet").unlink()
    with pytest.raises(MissingError, match=r"retain1-00000-of-00002\.parquet is missing: put all 2 parts there"):
        muse_texts(tmp_path / "hub", "raw/retain1")


def test_what_is_missing_is_said_in_one_line(tmp_path):
    with pytest.raises(MissingError, match=r"tofu is no folder: put the files of locuslab/TOFU there"):
        find_sets("tofu", None, str(tmp_path))
    (tmp_path / "tofu").mkdir()
    assert find_sets("tofu", None, str(tmp_path)) == tmp_path / "tofu"
    with pytest.raises(MissingError, match=r"forget10\.json is missing: put it there, or \.jsonl or \.parquet"):
        tofu(tmp_path / "tofu", "forget10")
    with pytest.raises(MissingError, match=r"knowmem/forget_qa\.json is missing: .* of muse-bench/MUSE-News"):
        muse_questions(tmp_path, "forget_qa")


BAD = {
    "no answer": ({"question": "q"}, r"forget01: row 2 has nothing as answer \(valid: text\)"),
    "a list": ({"question": ["q"], "answer": "a"}, r"forget01: row 2 has \['q'\] as question \(valid: text\)"),
    "blank": ({"question": "q", "answer": " "}, r"forget01: row 2 has ' ' as answer \(valid: text\)"),
}


@pytest.mark.parametrize("bad", BAD)
def test_rows_of_another_form_are_refused(bad, tmp_path):
    row, fault = BAD[bad]
    write_lines(tmp_path / "forget01.json", [tofu_row("who", 0), row])
    with pytest.raises(UserError, match=fault):
        tofu(tmp_path, "forget01")


def test_wrong_answers_are_a_list_of_as_many_in_each_row(tmp_path):
    rows = [tofu_row("who", i, perturbed="retain_perturbed") for i in range(2)]
    rows[1]["perturbed_answer"] = rows[1]["perturbed_answer"][:1]
    write_lines(tmp_path / "retain_perturbed.json", rows)
    with pytest.raises(UserError, match=r"row 2 has 1 of perturbed_answer \(valid: 2, as the first row\)"):
        tofu(tmp_path, "retain_perturbed")
    rows[1]["perturbed_answer"] = "one"
    write_lines(tmp_path / "retain_perturbed.json", rows)
    with pytest.raises(UserError, match=r"has 'one' as perturbed_answer \(valid: a list of texts\)"):
        tofu(tmp_path, "retain_perturbed")
    (tmp_path / "forget01.json").write_text("\n")
    with pytest.raises(MissingError, match=r"can't be read"):
        tofu(tmp_path, "forget01")
    (tmp_path / "forget01.json").write_text("[]")
    with pytest.raises(MissingError, match=r"forget01 has no rows"):
        tofu(tmp_path, "forget01")
    (tmp_path / "forget01.json").write_text(LINES + '\n{"question": ')
    with pytest.raises(MissingError, match=r"forget01\.json can't be read"):
        tofu(tmp_path, "forget01")
