"""S3FT on the suite's model that writes; on language models in test_families.py, and test_text_written.py."""

import warnings
from contextlib import suppress

import pytest
import torch

from clplat.config.settings import Config, Part
from clplat.errors import Interrupted, UserError
from clplat.run.build import check_stream
from clplat.strategies.lora import SequentialLoRA
from clplat.strategies.s3ft import S3FT
from clplat.stream import Kind
from clplat.testing.streams import CLASSES, WORDS, TinyStream
from clplat.testing.subject import State, Subject
from clplat.testing.writing import END, TOKENS, Slate

pytestmark = pytest.mark.filterwarnings("ignore:strategy:UserWarning")


@pytest.fixture
def subject():
    return Subject("s3ft")


def begun(subject, number=0, **options):
    """A strategy at the beginning of an experience, and what it may see of it."""
    stream = subject.stream(repeat=4)
    strategy = subject.build(stream, **subject.options(), **options)
    strategy._prepare, strategy.writing = stream.prepare, stream.writing
    for e in stream[: number + 1]:
        strategy.grow(e.seen())
    seen = stream[number].seen()
    strategy.train()
    strategy.begin(seen)
    return strategy, seen


def written(strategy, inputs):
    """Answers as lists, and whether each ends."""
    with torch.no_grad():
        rows = strategy.eval().model.predict(inputs).tolist()
    return [[t for t in row if t >= 0] for row in rows]


def sources(strategy):
    given, own, rewritten, unfit = strategy.counts.tolist()
    return own, rewritten, given, unfit


def test_targets_are_chosen_as_the_algorithm_says(subject):
    totals = [0, 0, 0, 0]
    for number in (1, 2):
        strategy, seen = begun(subject, number)
        for seed in range(4):
            draws = torch.Generator().manual_seed(seed)
            strategy.writing.asked = 2 * torch.randn(CLASSES, 3, 4, 4, generator=draws)
            strategy.train()
            strategy.begin(seen)
            totals = [a + b for a, b in zip(totals, chosen(strategy, seen), strict=True)]
    assert min(totals) > 0


def chosen(strategy, seen):
    """Counts of the sources, which the targets are compared with one by one."""
    inputs, labels = seen.train.all()
    classes = (-2 - labels[:, -1]).tolist()
    own, asked = written(strategy, inputs), written(strategy, strategy.writing.asked[classes])
    expected, counts = [], [0, 0, 0, 0]
    for c, first, second in zip(classes, own, asked, strict=True):

        def right(answer, c=c):
            return len(answer) < TOKENS and len(answer) > 1 and (answer[1] - WORDS[c][1]) % 2 == 0

        fits = c < CLASSES - 1
        place = 0 if right(first) else 1 if fits and right(second) else 2 if fits else 3
        counts[place] += 1
        expected.append([[*first, END], [*second, END], WORDS[c].tolist(), WORDS[c].tolist()][place])
    found = [[t for t in row if t >= 0] for row in strategy.targets.tolist()]
    assert found == expected
    assert list(sources(strategy)) == counts
    assert sum(counts) == len(seen.train)
    shares = strategy.measurements()
    assert shares["own"] + shares["rewritten"] + shares["given"] == pytest.approx(1)
    assert shares["unfit"] == counts[3] / len(seen.train)
    return counts


def test_prompts_are_the_same_in_the_same_order(subject):
    strategy, seen = begun(subject, 1)
    data = strategy.training_data(seen)
    assert data.inputs is seen.train.inputs
    assert data.rows is seen.train.rows
    assert torch.equal(data.targets(), strategy.targets)
    assert seen.train.targets().shape[1] == WORDS.shape[1] + 1  # as they were


def test_an_answer_chosen_is_no_less_likely_than_the_given_one(subject):
    strategy, seen = begun(subject, rewrite=False)
    inputs, labels = seen.train.all()
    changed = (strategy.targets[:, :3] != labels[:, :3]).any(1) & (strategy.targets >= 0).sum(1).eq(3)
    assert changed.any()
    with torch.no_grad():
        own, given = (strategy.losses(inputs[changed], y[changed]) for y in (strategy.targets, labels))
    assert (own <= given + 1e-6).all()


def test_the_same_is_chosen_again(subject):
    strategy, seen = begun(subject, 1)
    targets, counts = strategy.targets, strategy.counts.clone()
    strategy.begin(seen)
    assert torch.equal(strategy.targets, targets)
    assert torch.equal(strategy.counts, counts)
    assert strategy.training


def test_answers_are_written_to_prompts_as_in_evaluation(subject):
    strategy, seen = begun(subject)
    predict, modes, prepared = strategy.model.predict, [], []
    strategy.model.predict = lambda x: (modes.append(any(m.training for m in strategy.modules())), predict(x))[1]
    strategy._prepare = lambda raw, augmented: prepared.append(augmented) or raw
    strategy.begin(seen)
    assert modes == [False, False]
    assert prepared == [False]
    assert strategy.training


@pytest.fixture
def asked(monkeypatch):
    """Labels for which other words are asked."""
    found, plain = [], Slate.rewriting
    monkeypatch.setattr(
        Slate, "rewriting", lambda self, labels, *more: (found.append(labels), plain(self, labels, *more))[1]
    )
    return found


def test_only_what_was_not_right_is_asked_for_in_other_words(subject, asked):
    strategy, seen = begun(subject, 1)
    own = written(strategy, seen.train.all()[0])
    wrong = [
        len(a) < 2 or len(a) == TOKENS or (a[1] - y[1]) % 2
        for a, y in zip(own, seen.train.targets().tolist(), strict=True)
    ]
    assert 0 < sum(map(bool, wrong)) < len(wrong)
    assert torch.equal(torch.cat(asked), seen.train.targets()[torch.tensor(wrong, dtype=torch.bool)])


def test_ssr_does_not_rewrite(subject, asked):
    strategy, _ = begun(subject, 1, rewrite=False)
    own, rewritten, given, unfit = sources(strategy)
    assert own
    assert given
    assert rewritten == unfit == len(asked) == 0


def test_a_judge_that_says_yes_leaves_own_answers_alone(subject, asked, monkeypatch):
    monkeypatch.setattr(Slate, "score", lambda self, answers, labels: torch.ones(len(labels)))
    monkeypatch.setattr(subject.cls, "_take", ends(subject.cls._take))
    strategy, seen = begun(subject)
    assert sources(strategy) == (len(seen.train), 0, 0, 0)
    assert not asked
    own = written(strategy, seen.train.all()[0])
    assert [[t for t in row if t >= 0][:-1] for row in strategy.targets.tolist()] == [a[: TOKENS - 1] for a in own]
    assert (strategy.targets == END).any(1).all()


def ends(take):
    """Answers all end."""

    def taken(self, inputs, *more):
        predict = self.model.predict
        self.model.predict = lambda x: torch.cat([predict(x)[:, :-1], x.new_full((len(x), 1), -1).long()], 1)
        try:
            return take(self, inputs, *more)
        finally:
            del self.model.predict

    return taken


def test_a_judge_that_says_no_leaves_fine_tuning(subject, monkeypatch):
    monkeypatch.setattr(Slate, "score", lambda self, answers, labels: torch.zeros(len(labels)))
    stream = subject.stream()
    trials = [
        subject.trial(subject.build(stream, cls=cls, **subject.options(), **options), stream, reseed=True)
        for cls, options in ((S3FT, {}), (SequentialLoRA, {"alpha": 16.0}))
    ]
    mine, plain = (subject.finish(trial) for trial in trials)
    states = [State.copy(dict(o.strategy.model.state_dict())) for o in (mine, plain)]
    assert not states[0].differences(states[1])
    assert mine.strategy.measurements()["given"] == 1


def test_an_answer_that_does_not_end_is_not_taken(subject, monkeypatch):
    strategy, _ = begun(subject)
    answers = torch.tensor([[1, 3, 1, 1], [1, 3, 1, -1], [-1, -1, -1, -1]])
    monkeypatch.setattr(Slate, "score", lambda self, answers, labels: torch.ones(len(labels)))
    strategy.model.predict = lambda inputs: answers
    strategy.targets, found = torch.full((3, TOKENS), -1), torch.zeros(3, dtype=torch.int64)
    left = strategy._take(torch.zeros(3), torch.arange(3), torch.zeros(3, 4), 1, found)
    assert left.tolist() == [0]
    assert found.tolist() == [0, 1, 1]
    assert strategy.targets.tolist() == [[-1] * 4, [1, 3, 1, END], [END, -1, -1, -1]]


def test_a_score_counts_from_the_least_one_on(subject, monkeypatch):
    monkeypatch.setattr(Slate, "score", lambda self, answers, labels: torch.full((len(labels),), 0.5))
    assert sources(begun(subject, least_score=0.5)[0])[0] > 0
    assert sources(begun(subject, least_score=0.6)[0])[0] == 0


def test_a_resumed_run_writes_nothing_anew(subject, monkeypatch):
    began, plain = [], S3FT.begin
    monkeypatch.setattr(S3FT, "begin", lambda self, e: (began.append(e.name), plain(self, e))[1])
    stream = subject.stream()
    first = subject.trial(subject.build(stream), stream, stop_at=2)
    with suppress(Interrupted):
        first.run()
    assert began == ["learn_0"]
    stream = subject.stream()
    again = subject.trial(subject.build(stream, seed=5), stream, state=first.latest)
    assert torch.equal(again.strategy.targets, first.strategy.targets)
    assert len(again.strategy.targets) == len(stream[0].train)
    subject.finish(again)
    assert began == ["learn_0", "learn_1", "learn_2"]
    assert len(again.strategy.targets) == 0  # nothing is kept when an experience has ended


@pytest.mark.parametrize(
    ("score", "said"), [(0.0, "the given ones: this is plain fine-tuning"), (1.0, "the own ones: there is next to")]
)
def test_what_is_nearly_no_method_is_said(subject, monkeypatch, score, said):
    monkeypatch.setattr(Slate, "score", lambda self, answers, labels: torch.full((len(labels),), score))
    monkeypatch.setattr(S3FT, "_take", ends(S3FT._take))
    with pytest.warns(UserWarning, match=f"100.0% of the answers of learn_0 .*{said}"):
        begun(subject)


def test_what_does_not_fit_is_said(subject):
    with pytest.warns(UserWarning, match=r"strategy\.form: \d+\.\d% of learn_2 need a prompt that does not fit"):
        begun(subject, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begun(subject, 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"least_score": 0.0}, r"least_score: 0\.0 is out of range \(valid: in \(0, 1\]\)"),
        ({"least_score": 1.1}, r"least_score: 1\.1"),
        ({"form": "Say {answer} again."}, r"form: .* \(valid: a text with \{prompt\} and \{answer\}, or null\)"),
        ({"form": "{prompt}"}, "form: "),
    ],
)
def test_options_out_of_range_are_refused(subject, options, said):
    with pytest.raises(UserError, match=rf"strategy\.{said}"):
        subject.build(subject.stream(), **subject.options(), **options)


def test_a_stream_of_classes_is_refused():
    config = Config(Part("s3ft"), Part("digits"), Part("mlp"))
    (fault,) = check_stream(config, S3FT, TinyStream({Kind.LEARN}))
    assert fault.startswith(
        "strategy: S3FT lets the model write answers, but those of this stream are no free text (valid"
    )
    assert not check_stream(config, S3FT, TinyStream({Kind.LEARN}, writes=True))
