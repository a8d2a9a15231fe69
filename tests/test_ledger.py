"""The ledger: what may be asked, that refusing changes nothing, and what is written down."""

import copy
import hashlib
import json
from datetime import datetime
from typing import Any

import pytest
import torch

from clplat import Data, Experience, Kind, Stream
from clplat.erasure.ledger import Ledger, Membership, parse_id, rows_sha256, stream_faults
from clplat.errors import UserError
from clplat.metrics.record import RunRecord

INPUTS, LABELS = torch.arange(12.0)[:, None], torch.arange(12) // 3  # classes 0 to 3, three samples each
OTHER = torch.arange(12.0)[:, None]


def data(rows, inputs=INPUTS, world=None):
    return Data(inputs, LABELS, torch.as_tensor(rows), world)


def learn(index, classes, rows=None, **kw):
    rows = [r for c in classes for r in range(3 * c, 3 * c + 3)] if rows is None else rows
    return Experience(index, f"learn-{index}", Kind.LEARN, data(rows, **kw), classes=tuple(classes))


def forget(index, request, rows, classes=(), **kw):
    return Experience(index, f"forget-{index}", Kind.FORGET, data(rows, **kw), classes=classes, request=tuple(request))


FIRST = [learn(0, (0, 1)), learn(1, (2, 3))]

GOOD = [
    forget(2, ["class:1"], [3, 4, 5], (1,)),
    forget(2, ["class:1", "class:3"], [3, 4, 5, 9, 10, 11], (1, 3)),
    forget(2, ["class:1"], [4], (1,)),  # a few samples that stand for the class
    forget(2, ["class:1"], [3, 4], (1,), inputs=OTHER),  # samples of the class from elsewhere
    forget(2, ["sample:7", "sample:0"], [0, 7]),
    forget(2, ["experience:learn-0"], [0, 1, 2, 3, 4, 5], (0, 1)),
    forget(2, ["user:4"], [0, 5, 9]),
]
BAD = {
    "names nothing": forget(2, [], [0]),
    "names class:1 2 times": forget(2, ["class:1", "class:1"], [3], (1,)),
    "'7' is no id": forget(2, ["7"], [7]),
    "'class:x' is no id": forget(2, ["class:x"], [7]),
    "ids of several kinds (class, sample)": forget(2, ["class:1", "sample:0"], [0, 3, 4, 5], (1,)),
    "class:4 was never learned before it (learned: class:0, class:1, class:2, class:3)": forget(
        2, ["class:4"], [3], (4,)
    ),
    "experience:learn-7 was never learned before it (learned: experience:learn-0, experience:learn-1)": forget(
        2, ["experience:learn-7"], [0]
    ),
    "class:1: has no samples to erase": forget(2, ["class:1"], torch.arange(0), (1,)),
    "its classes [2] are not those it names (class:1)": forget(2, ["class:1"], [3], (2,)),
    "its data hold classes [0], which it does not name": forget(2, ["class:1"], [0, 3], (1,)),
    "its data are not the samples that it names": forget(2, ["sample:1"], [2]),
    "sample:1: its samples were never learned": forget(2, ["sample:1"], [1], inputs=OTHER),
    "user:3: its samples were never learned": forget(2, ["user:3"], [1], world=torch.neg),
}


@pytest.mark.parametrize("request_", GOOD, ids=lambda e: " ".join(e.request) + f" {len(e.train)}")
def test_a_request_that_can_be_met(request_):
    assert stream_faults([*FIRST, request_]) == []


@pytest.mark.parametrize("fault", BAD)
def test_a_request_that_can_not(fault):
    (found,) = stream_faults([*FIRST, BAD[fault]])
    assert found.startswith("stream: experience 2: forget-2: ")
    assert fault in found


def test_samples_that_come_only_later_were_never_learned():
    parts = [learn(0, (0,)), forget(1, ["sample:4", "sample:5"], [4, 5]), learn(2, (1,))]
    assert stream_faults(parts) == [
        "stream: experience 1: forget-1: sample:4 was never learned (nor 1 more of its samples)"
    ]


@pytest.mark.parametrize("one", GOOD, ids=lambda e: " ".join(e.request) + f" {len(e.train)}")
def test_asking_twice(one):
    again = Experience(3, "forget-3", Kind.FORGET, one.train, classes=one.classes, request=one.request)
    faults = stream_faults([*FIRST, one, again])
    assert faults
    assert all("forget-3: " in fault and "is erased already" in fault for fault in faults)
    assert stream_faults([*FIRST, one, Experience(3, "learn-3", Kind.LEARN, one.train, classes=one.classes),
                          Experience(4, "forget-4", Kind.FORGET, one.train, classes=one.classes,
                                     request=one.request)]) == []  # fmt: skip


def test_what_a_wider_request_took_is_erased():
    whole = forget(2, ["class:1"], [4], (1,))
    (fault,) = stream_faults([*FIRST, whole, forget(3, ["sample:3"], [3])])
    assert "sample:3 is erased already" in fault
    (fault,) = stream_faults([*FIRST, forget(2, ["sample:3"], [3]), forget(3, ["experience:learn-0"], [0, 3])])
    assert "experience:learn-0: sample 3 is erased already" in fault
    parts = [*FIRST, forget(2, ["class:0"], [0, 1, 2], (0,)), forget(3, ["class:1"], [3, 4, 5], (1,))]
    (fault,) = stream_faults([*parts, forget(4, ["experience:learn-0"], [0])])
    assert "experience:learn-0 is erased already" in fault


def test_a_sample_erased_keeps_its_class_alive():
    samples = forget(2, ["sample:3", "sample:4"], [3, 4])
    assert stream_faults([*FIRST, samples, forget(3, ["class:1"], [5], (1,))]) == []


def test_a_model_that_comes_trained_has_learned_everything():
    parts = [forget(0, ["class:1"], [3, 4, 5], (1,)), forget(1, ["sample:0"], [0])]
    assert stream_faults(parts) == []
    assert "is erased already" in stream_faults([*parts, forget(2, ["class:1"], [3], (1,))])[0]
    assert "is erased already" in stream_faults([*parts, forget(2, ["sample:0"], [0])])[0]


def test_refusing_changes_nothing():
    for bad in BAD.values():
        ledger, written, events = Ledger([*FIRST, bad]), list[Any](), list[Any]()
        for index in (0, 1):
            ledger.open(index, events, written.append)
            ledger.close(events, 1.0, written.append)
        assert ledger.faults(2)
        before, members = copy.deepcopy(events), copy.copy(ledger.members.classes)
        active = [s.active.clone() for s in ledger.members.sources[:1]]
        with pytest.raises(UserError, match=r"stream: experience 2: forget-2"):
            ledger.open(2, events, written.append)
        assert events == before
        assert ledger.members.classes == members
        assert torch.equal(active[0], ledger.members.sources[0].active)
        assert written[-1][-1]["outcome"].startswith("refused: forget-2: ")
        assert written[-1][:-1] == before


def test_ids_alone_are_judged_from_events():
    events, nowhere = list[Any](), lambda events: None
    ledger = Ledger([*FIRST, GOOD[0]])
    for index in range(3):
        ledger.open(index, events, nowhere)
        if index == 2:
            assert not Membership.of(events).faults("now", ["class:1"], (1,))  # not done yet
        ledger.close(events, index, nowhere)
    known = Membership.of(json.loads(json.dumps(events)))
    assert known.classes == {0: True, 1: False, 2: True, 3: True}
    assert known.faults("now", ["class:0"], (0,)) == []
    assert known.faults("now", ["experience:learn-0"]) == []
    assert known.faults("now", ["class:1"], (1,)) == ["now: class:1 is erased already (by forget-2)"]
    assert "never learned" in known.faults("now", ["class:9"], (9,))[0]
    known.erase("now", ["class:0"], (0,))
    assert known.faults("then", ["experience:learn-0"]) == ["then: experience:learn-0 is erased already"]


def test_events_are_plain_and_whole():
    written, events = list[Any](), list[Any]()
    ledger = Ledger([*FIRST, GOOD[0]])
    for index, seconds in enumerate((2.0, 5.0, 5.5)):
        ledger.open(index, events, lambda e: written.append(copy.deepcopy(e)))
        ledger.close(events, seconds, lambda e: written.append(copy.deepcopy(e)))
    assert [w[-1]["outcome"] for w in written] == ["under way", "done"] * 3
    assert [e["seconds"] for e in events] == [2.0, 3.0, 0.5]
    last = json.loads(json.dumps(events))[-1]
    assert {k: last[k] for k in ("index", "name", "kind", "request", "classes", "samples", "outcome")} == {
        "index": 2, "name": "forget-2", "kind": "forget", "request": ["class:1"], "classes": [1], "samples": 3,
        "outcome": "done"}  # fmt: skip
    rows = b"".join(r.to_bytes(8, "little") for r in (3, 4, 5))
    assert last["rows_sha256"] == hashlib.sha256(rows).hexdigest() == rows_sha256(data([5, 3, 4]))
    assert datetime.fromisoformat(last["started"]) <= datetime.fromisoformat(last["finished"])
    record = RunRecord([], ledger=events)
    assert RunRecord.from_dict(json.loads(json.dumps(record.to_dict()))).ledger == json.loads(json.dumps(events))


def test_a_ledger_taken_up_in_the_middle_knows_the_past():
    ledger = Ledger([*FIRST, GOOD[0], forget(3, ["class:1"], [3], (1,))])
    assert "is erased already" in ledger.faults(3)[0]


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("class:7", ("class", "7")), ("experience:a b:c", ("experience", "a b:c")), ("user:0", ("user", "0")),
     ("sample:-1", None), ("class:", None), ("klass:1", None), ("experience:", None)],
)  # fmt: skip
def test_ids(text, parsed):
    assert parse_id(text) == parsed


def test_a_stream_in_python_that_is_wrong_is_refused_in_the_loop(make_runner, tmp_path):
    """Nothing of the learner moves, the checkpoint before it stands, and the ledger says why."""
    runner = make_runner(tmp_path)
    runner.strategy.state_dict()
    parts = list(runner.stream)
    twice = Experience(3, "again", Kind.FORGET, parts[2].train, parts[2].test, classes=(0,), request=("class:0",))
    runner.stream.experiences = (*parts[:3], twice, parts[4])
    runner.ledger = Ledger(runner.stream)
    states = {}
    original = runner._finish

    def watched(experience):
        original(experience)
        states[experience.index] = {k: copy.deepcopy(v) for k, v in runner.strategy.state_dict().items()}

    runner._finish = watched
    with pytest.raises(UserError, match=r"experience 3: again: class:0 is erased already \(by erase-0\)"):
        runner.run()
    after = runner.strategy.state_dict()
    same = (torch.equal(v, after[k]) if isinstance(v, torch.Tensor) else v == after[k] for k, v in states[2].items())
    assert all(same)
    assert [e["name"] for e in runner.record.ledger] == ["first", "second", "erase-0"]
    assert len(runner.record.matrix) == 4
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert [e["outcome"].partition(":")[0] for e in ledger] == ["done", "done", "done", "refused"]
    assert isinstance(runner.stream, Stream)
