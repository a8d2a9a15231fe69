"""Scores of generated answers: against definitions written out here, and at their limits."""

import random

import pytest

from clplat.metrics.text import TEXT_METRICS, choice, exact_match, normalized, rouge_l, rouge_l_recall, similarity


def _common(a, b):
    """Length of the longest common subsequence, by its table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    draw = random.Random(0)
    for _ in range(20):
        a, b = (
            [draw.choice(["red", "ball", "big", "dog", "ran"]) for _ in range(draw.randint(1, 9))] for _ in range(2)
        )
        common = _common(a, b)
        expected = 2 * common / (len(a) + len(b))
        assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected, abs=1e-6)
        assert rouge_l_recall(" ".join(a), " ".join(b)) == pytest.approx(common / len(b), abs=1e-6)
    assert rouge_l("", "a b") == 0


@pytest.mark.parametrize("metric", TEXT_METRICS.values(), ids=TEXT_METRICS)
def test_an_answer_equal_to_its_reference_scores_one(metric):
    assert metric("B. The red ball", "B. The red ball") == pytest.approx(1)
    assert 0 <= metric("other", "B. The red ball") < 1


def test_exact_match_sees_past_case_punctuation_and_spaces():
    assert normalized("  Science  or,\nTechnology! ") == "science or technology"
    assert exact_match("very Negative.", "very negative") == 1
    assert exact_match("negative", "very negative") == 0
    assert exact_match("the cat", "cat") == 0  # articles count


def test_choice_takes_the_first_letter_that_stands_alone():
    assert choice("(B) because A is wrong", "B") == 1
    assert choice("Because", "B") == 0
    assert choice("F", "B") == 0


def test_similarity_is_symmetric_here_and_falls_with_edits():
    assert similarity("", "") == 1
    assert similarity("abcd", "abed") == pytest.approx(0.75)
    assert similarity("abcd", "wxyz") == 0
