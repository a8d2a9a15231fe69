"""The stream of requests: drawn and listed, wrong ones refused on the command line and in Python, and whole runs."""

import json

import numpy as np
import pytest
import torch
import yaml

import clplat
from clplat import Kind
from clplat.cli import main
from clplat.config import discovery
from clplat.config.resolve import resolve
from clplat.erasure.ledger import parse_id, stream_faults
from clplat.errors import MissingError, UserError
from clplat.streams.digits import Digits
from clplat.streams.unlearning import Unlearning

PERMUTED = {"scenario": "permuted", "experiences": 3}


def facts(stream):
    return [(e.name, e.request, e.classes, e.train.row_ids().tolist()) for e in stream]


def requests(stream):
    return [e for e in stream if e.kind is Kind.FORGET]


# --- drawn ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["class", "sample", "experience", "user"])
@pytest.mark.parametrize("positions", ["random", "end"])
def test_drawn_requests(unit, positions):
    for seed in range(6):
        stream = Unlearning(seed=seed, unit=unit, count=2, size=2, positions=positions)
        assert [e.index for e in stream] == list(range(7))
        assert [e.name for e in requests(stream)] == ["forget-0", "forget-1"]
        ids = [i for e in requests(stream) for i in e.request]
        assert len(set(ids)) == 4
        assert all(parse_id(i)[0] == unit for i in ids)
        assert stream_faults(stream) == []  # each comes after its own learning
        if positions == "end":
            assert [e.index for e in requests(stream)] == [5, 6]
        assert facts(stream) == facts(Unlearning(seed=seed, unit=unit, count=2, size=2, positions=positions))


def test_places_reach_from_right_after_learning_to_the_end():
    seen = {}
    for seed in range(150):
        stream = Unlearning(seed=seed)
        (request,) = requests(stream)
        learned = next(e.index for e in stream if request.classes[0] in e.classes)
        seen.setdefault(learned, set()).add(request.index - learned)
    assert {k: max(v) for k, v in seen.items()} == {k: 5 - k for k in range(5)}
    assert all(min(v) == 1 for v in seen.values())


def test_one_request_more_changes_none_of_the_others():
    few, more = (Unlearning(seed=3, count=n, positions="end") for n in (2, 3))
    assert [e.request for e in requests(more)][:2] == [e.request for e in requests(few)]


def test_requests_in_one_shot_and_in_another_order():
    plain = Unlearning(seed=4, count=4, positions="end")
    ids = [e.request[0] for e in requests(plain)]
    (one,) = requests(Unlearning(seed=4, count=4, positions="end", one_shot=True))
    assert list(one.request) == ids
    assert sorted(one.train.row_ids().tolist()) == sorted(
        r for e in requests(plain) for r in e.train.row_ids().tolist()
    )
    orders = {tuple(e.request[0] for e in requests(Unlearning(seed=4, count=4, positions="end", order_seed=s)))
              for s in range(8)}  # fmt: skip
    assert all(sorted(o) == sorted(ids) for o in orders)
    assert len(orders) > 3
    (late,) = requests(Unlearning(seed=1, count=3, one_shot=True))
    assert late.index == max(e.index for e in requests(Unlearning(seed=1, count=3))) - 2


def test_users_share_out_the_samples_of_each_experience():
    stream = Unlearning(unit="user", count=20, users=4, positions="end")
    taken = torch.cat([e.train.row_ids() for e in requests(stream)])
    assert sorted(taken.tolist()) == list(range(1437))  # all 20 users: every sample, once
    sizes = [len(e.train) for e in requests(stream)]
    assert max(sizes) - min(sizes) <= 3  # experiences are of 283 to 290 samples
    for e in requests(stream):
        user = int(e.request[0].partition(":")[2])
        assert set(e.train.row_ids().tolist()) <= set(stream[user // 4].train.row_ids().tolist())
        assert torch.equal(e.test.row_ids(), e.train.row_ids())
        assert e.classes == ()


def test_given_users(tmp_path):
    owner = np.arange(1437) % 3 - 1
    np.save(tmp_path / "users.npy", owner)
    for given in (owner.tolist(), str(tmp_path / "users.npy"), "users.npy"):
        stream = Unlearning(requests=["user:1"], user_assignment=given, data_root=str(tmp_path))
        assert requests(stream)[0].train.row_ids().tolist() == np.flatnonzero(owner == 1).tolist()
    with pytest.raises(UserError, match="user:2 is unknown"):
        Unlearning(requests=["user:2"], user_assignment=owner.tolist())
    with pytest.raises(UserError, match=r"stream.user_assignment: holds 2 rows for 1437"):
        Unlearning(user_assignment=[0, 1])
    with pytest.raises(UserError, match=r"stream.user_assignment: needs a base of one data set"):
        Unlearning(user_assignment=owner.tolist(), unit="experience", base_options=PERMUTED)
    with pytest.raises(MissingError, match=r"stream.user_assignment: .*none.npy is missing"):
        Unlearning(user_assignment="none.npy")
    np.save(tmp_path / "bad.npy", np.zeros((2, 2)))
    with pytest.raises(UserError, match=r"bad.npy holds float64 \(2, 2\)"):
        Unlearning(user_assignment=str(tmp_path / "bad.npy"))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(MissingError, match=r"objects.npy can't be read"):
        Unlearning(user_assignment=str(tmp_path / "objects.npy"))


# --- what is around them --------------------------------------------------------------------------------------------


def test_the_base_goes_through_as_it_is():
    base = Digits(seed=2, experiences=5, validation=0.1)
    stream = Unlearning(seed=2, count=2, base_options={"experiences": 5, "validation": 0.1})
    learned = [e for e in stream if e.kind is Kind.LEARN]
    assert [e.train.row_ids().tolist() for e in learned] == [e.train.row_ids().tolist() for e in base]
    assert len({id(e.train.inputs) for e in stream}) == 1
    assert all(e.valid is not None for e in stream)
    request = requests(stream)[0]
    assert request.valid.targets().unique().tolist() == list(request.classes)
    assert (stream.num_classes, stream.input_shape, stream.class_names) == (10, (1, 8, 8), base.class_names)


def test_a_finished_stream_from_python_keeps_its_own_ways():
    class Louder(Digits):
        def prepare(self, inputs, training):
            return 2 * super().prepare(inputs, training)

        def score(self, predictions, labels):
            return torch.ones(len(labels))

    stream = Unlearning(base=Louder(experiences=2), requests=["class:3"])
    assert stream.prepare(torch.ones(1, 1, 8, 8), False).max() == 2
    assert stream.score(torch.zeros(3, 10), torch.zeros(3)).tolist() == [1, 1, 1]
    assert stream.to(torch.device("cpu")) is stream
    with pytest.raises(UserError, match=r"stream.base: holds requests to forget already"):
        Unlearning(base=stream)
    with pytest.raises(UserError, match=r"stream.base_options: has no meaning with a finished stream"):
        Unlearning(base=Digits(), base_options={"experiences": 2})


def test_the_base_may_have_a_seed_of_its_own():
    options = {"class_order": "shuffled"}
    same = [Unlearning(seed=s, base_options=options | {"seed": 7})[0].train.row_ids().tolist() for s in (1, 2)]
    other = [Unlearning(seed=s, base_options=options)[0].train.row_ids().tolist() for s in (1, 2)]
    assert same[0] == same[1]
    assert other[0] != other[1]


def test_experiences_of_a_stream_in_guises():
    stream = Unlearning(unit="experience", count=2, base_options=PERMUTED)
    for e in requests(stream):
        (learned,) = [x for x in stream if f"experience:{x.name}" in e.request]
        assert e.train.world is learned.train.world
        assert e.test.world is learned.test.world


def test_listed_requests_and_further_learning():
    stream = Unlearning(
        requests=[
            "class:9",
            {"erase": ["class:1", "class:0"], "after": "split_1"},
            {"learn": "class:1", "after": 2},
            {"erase": ["sample:3"], "after": "split_4"},
            {"erase": "class:1", "after": 3},
        ]
    )
    assert [e.name for e in stream] == [
        "split_0", "split_1", "forget-0", "split_2", "relearn-0", "split_3", "forget-1", "split_4", "forget-2",
        "forget-3"]  # fmt: skip
    assert [e.request for e in requests(stream)] == [("class:1", "class:0"), ("class:1",), ("class:9",), ("sample:3",)]
    assert [e.index for e in stream] == list(range(10))


# --- what is refused ------------------------------------------------------------------------------------------------

WRONG = {
    "requests[0]: forget-0: names nothing to erase": {"requests": [[]]},
    "requests[0]: forget-0: 'seven' is no id": {"requests": ["seven"]},
    "requests[0]: forget-0: class:33 was never learned": {"requests": ["class:33"]},
    "requests[0]: forget-0: class:9 was never learned before it (learned: class:0, class:1)": {
        "requests": [{"erase": "class:9", "after": "split_0"}]
    },
    "requests[1]: forget-1: class:3 is erased already (by forget-0)": {"requests": ["class:3", "class:3"]},
    "requests[0]: forget-0: names class:3 2 times": {"requests": [["class:3", "class:3"]]},
    "requests[0]: forget-0: sample:99999 was never learned": {"requests": ["sample:99999"]},
    "requests[1]: forget-1: sample:5 is erased already": {"requests": ["sample:5", "sample:5"]},
    "requests[0]: forget-0: experience:split_9 was never learned": {"requests": ["experience:split_9"]},
    "requests[0]: forget-0: user:50 is unknown (valid: user:0 to user:49)": {"requests": ["user:50"]},
    "requests[0].after: 'split_00' is no experience of the base (did you mean split_0": {
        "requests": [{"erase": "class:3", "after": "split_00"}]
    },
    "requests[0]: {'forget': 'class:3'} is no request": {"requests": [{"forget": "class:3"}]},
    "requests[0]: 3 are no ids": {"requests": [{"erase": 3}]},
    "requests[0]: relearn-0: class:3 has no samples that are erased": {"requests": [{"learn": "class:3"}]},
    "requests: is empty": {"requests": []},
    "count: 3 has no meaning with listed requests (valid: 1)": {"requests": ["class:1"], "count": 3},
    "count: 11 requests of 1 make 11 of 10 of unit class (valid: at most 10 in all)": {"count": 11},
    "count: 0 is out of range (valid: ≥ 1)": {"count": 0},
    "unit: 'sample' needs a base of one data set": {"unit": "sample", "base_options": PERMUTED},
    "is in several data sets or guises (permuted_0, permuted_1, permuted_2)": {"base_options": PERMUTED},
    "order_seed: 1 has no meaning where requests have places of their own": {"order_seed": 1, "count": 3},
    "one_shot: has no meaning where data are learned again": {
        "requests": ["class:1", {"learn": "class:1"}], "one_shot": True},
    "base: unknown name 'digts' (did you mean digits": {"base": "digts"},
    "base_options.experiences: 50 is more than the 10 classes": {"base_options": {"experiences": 50}},
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_refused_in_python(fault):
    with pytest.raises(UserError) as error:
        Unlearning(**WRONG[fault])
    assert any(f.startswith("stream.") and fault in f for f in error.value.faults), error.value.faults


@pytest.mark.parametrize("fault", WRONG)
def test_refused_on_the_command_line(fault, tmp_path, capsys):
    config = {"strategy": "retrain", "stream": {"name": "unlearning", **WRONG[fault]}, "output": str(tmp_path / "runs"),
              "tracking": {"enabled": False}}  # fmt: skip
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config))
    assert main(["run", str(tmp_path / "wrong.yaml"), "--quiet"]) == 2
    told = capsys.readouterr().err
    assert fault in told
    assert "Traceback" not in told
    assert not (tmp_path / "runs").exists()


OPTIONS = {
    "stream.base_options.experience: no such key (did you mean experiences": {"base_options": {"experience": 3}},
    "stream.base_options.nothing: no such key (digits takes: experiences": {"base_options": {"nothing": 3}},
    "stream.base_options.experiences: 'three' is not an int": {"base_options": {"experiences": "three"}},
    "stream.base_options.scenario: 'clas' is not one of class": {"base_options": {"scenario": "clas"}},
    "stream.base: unknown name 'digts' (did you mean digits": {"base": "digts", "base_options": {"x": 1}},
}


@pytest.mark.parametrize("fault", OPTIONS)
def test_options_of_the_base_are_checked_before_anything_is_built(fault):
    with pytest.raises(UserError) as error:
        resolve(strategy="retrain", stream={"name": "unlearning", **OPTIONS[fault]})
    assert any(fault in f for f in error.value.faults), error.value.faults


def test_options_of_the_base_come_from_flags_and_in_their_types(tmp_path):
    flags = ["--stream.base_options.experiences", "3", "--stream.base_options.train_per_class", "9"]
    flags += ["--stream.requests", '["class:1", {"erase": ["sample:3"], "after": "split_0"}]']
    stream = {"name": "unlearning", "base_options": {"class_order": "shuffled"}}
    config = resolve(flags, strategy="retrain", stream=stream)
    assert config.stream.options["base_options"] == {
        "class_order": "shuffled", "experiences": 3, "train_per_class": 9}  # fmt: skip
    assert config.stream.options["requests"] == ["class:1", {"erase": ["sample:3"], "after": "split_0"}]
    file = tmp_path / "own.py"
    file.write_text("from clplat.streams.digits import Digits\n\nclass Own(Digits):\n    pass\n")
    config = resolve(strategy="retrain", stream={"name": "unlearning", "base": str(file)})
    assert config.stream.options["base"] == f"{file}:Own"


# --- whole runs -----------------------------------------------------------------------------------------------------


def by_hand(result, stream):
    """forget_accuracy, retain_accuracy and h_mean from the hits in the accuracy matrix, counted by test rows."""
    matrix, tests = result.accuracy_matrix, [set(e.test.row_ids().tolist()) for e in stream]
    forgot, kept, means = [], [], []
    for f in (e.index for e in stream if e.kind is Kind.FORGET):
        row, hits, rows = matrix[f + 1], 0.0, set()
        for j in range(f + 1):
            sign = 1 if stream[j].kind is Kind.LEARN else -1
            hits += sign * row[j] * len(tests[j])
            rows = rows | tests[j] if sign == 1 else rows - tests[j]
        first = f
        while stream[first - 1].kind is Kind.FORGET:
            first -= 1
        drop = max(0.0, matrix[first][f] - row[f])
        forgot, kept = [*forgot, row[f]], [*kept, hits / len(rows)]
        means.append(2 * kept[-1] * drop / (kept[-1] + drop) if kept[-1] + drop else 0.0)
    return {"forget_accuracy": np.mean(forgot), "retain_accuracy": np.mean(kept), "h_mean": np.mean(means)}


CLASSES = ["class:1", {"erase": ["class:6", "class:0"]}]


@pytest.mark.parametrize("strategy", ["retrain", "finetune_retained", "gradient_ascent", "random_labels"])
def test_a_whole_run(strategy, tmp_path):
    options = {"name": strategy, "lr": 0.2} | ({"replay_batch": 16} if strategy == "gradient_ascent" else {})
    stream = {"name": "unlearning", "base_options": {"experiences": 1, "train_per_class": 30},
              "requests": [*CLASSES, {"learn": "class:1"}]}  # fmt: skip
    result = clplat.run(strategy=options, stream=stream, loop={"max_epochs": 12, "batch_size": 16},
                        output=str(tmp_path), tracking={"enabled": False}, quiet=True)  # fmt: skip
    made = Unlearning(seed=0, **{k: v for k, v in stream.items() if k != "name"})
    expected = by_hand(result, list(made)[:3])
    assert {k: result.metrics[k] for k in expected} == pytest.approx(expected, abs=1e-9)
    assert result.metrics["retain_accuracy"] > 0.8
    if strategy != "finetune_retained":
        assert result.metrics["forget_accuracy"] < 0.1
    assert result.accuracy_matrix[4][3] > 0.8  # taught again, known again
    ledger = json.loads((result.run_dir / "ledger.json").read_text())
    assert [(e["name"], e["request"], e["classes"], e["samples"], e["outcome"]) for e in ledger] == [
        ("split_0", [], list(range(10)), 300, "done"), ("forget-0", ["class:1"], [1], 30, "done"),
        ("forget-1", ["class:6", "class:0"], [0, 6], 60, "done"), ("relearn-0", [], [1], 30, "done")]  # fmt: skip
    assert sum(e["seconds"] for e in ledger) == pytest.approx(result.summary["cost"]["train_seconds"])


def test_it_is_listed():
    entry = discovery.find("streams", "unlearning")
    assert entry.kinds == ("learn", "forget")
    assert {o.name for o in discovery.options(entry)} >= {"base", "base_options", "requests", "unit", "count", "users"}
