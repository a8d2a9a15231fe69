"""What `clplat check` asks of a stream: each offender fails its check, shipped streams none."""

import ast
from pathlib import Path

import pytest
import torch

from clplat import Data, UserError
from clplat.testing import STREAM_CHECKS, StreamSubject, judge, run_checks

BAD = Path(__file__).parent / "bad" / "streams.py"
OFFENDERS = {
    node.name: next(s.value.value for s in node.body if isinstance(s, ast.Assign) and s.targets[0].id == "fails")
    for node in ast.parse(BAD.read_text()).body
    if isinstance(node, ast.ClassDef) and node.name[0] != "_"
}


def test_every_check_has_an_offender():
    assert set(OFFENDERS.values()) == set(STREAM_CHECKS)


@pytest.mark.parametrize("name", OFFENDERS)
def test_an_offender_fails_its_check_and_says_where(name):
    (result,) = run_checks(f"{BAD}:{name}", [OFFENDERS[name]], group="streams")
    assert result.status == "failed"
    assert not result.message.startswith("raised")


@pytest.mark.parametrize(
    "keys",
    [
        ["digits", "--stream.scenario", "rotated", "--stream.validation", "0.2"],
        ["digits", "--stream.blurry", "0.2", "--stream.train_per_class", "20"],
        ["unlearning"],
        ["corruptions", "--stream.samples", "20", "--stream.corruptions", '["fog"]'],
    ],
    ids=" ".join,
)
def test_shipped_streams_fail_nothing(keys):
    results = run_checks(keys[0], group="streams", keys=keys[1:])
    assert [r for r in results if r.status == "failed"] == []
    assert len(results) == len(STREAM_CHECKS)


def test_samples_of_few_whole_numbers_may_repeat_themselves():
    subject = StreamSubject("digits", ["--stream.experiences", "1"])
    inputs = (torch.arange(24) % 6).float().reshape(24, 1)  # six values, so that all of them meet in both parts
    rows = torch.arange(24)
    e = subject.stream.experiences[0]
    for data, status in ((inputs, "passed"), (torch.arange(24).float().reshape(24, 1) % 23, "failed")):
        e.__dict__["train"] = Data(data.clone(), torch.arange(24) % 2, rows[:23])
        e.__dict__["test"] = Data(data.clone(), torch.arange(24) % 2, rows[23:])
        assert judge(subject, "held_out", STREAM_CHECKS["held_out"]).status == status


def test_unknown_checks_and_options_are_the_users_mistake():
    with pytest.raises(UserError, match=r"unknown check 'shape' \(valid: shapes\)"):
        run_checks("digits", ["shape"], group="streams")
    with pytest.raises(UserError, match=r"stream\.experience"):
        run_checks("digits", group="streams", keys=["--stream.experience", "2"])
