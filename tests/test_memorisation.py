"""TOFU's and MUSE's measures of runs, against the same measures made by hand with transformers alone."""

import json
import math

import numpy as np
import pytest
import torch
from forgetting import tofu_row, write_lines, write_tofu
from scipy.stats import hmean, ks_2samp
from sklearn.metrics import roc_auc_score

import clplat
from clplat.data.unlearning_sets import Question
from clplat.errors import MissingError, UserError
from clplat.metrics.text import rouge_l, rouge_l_recall
from clplat.report.evidence import evidence
from clplat.run import memorisation, reader

pytestmark = pytest.mark.slow  # two runs that learn by heart

WRITTEN = 12  # tokens of an answer, below what the product takes, which would take long here


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The data root, a run that was asked to forget, and one that never had what it forgot."""
    root = tmp_path_factory.mktemp("memorisation")
    write_tofu(root / "tofu")
    config = {
        "backbone": {"name": "language_model", "dim": 32, "depth": 1, "heads": 2},
        "data_root": str(root),
        "loop": {"batch_size": 12, "max_epochs": 40, "checkpoint_seconds": None},
        "fabric": {"accelerator": "cpu"},
        "tracking": {"enabled": False},
        "output": str(root / "runs"),
    }
    learned = {"optimizer": "adamw", "lr": 1e-2}
    whole = {"name": "tofu", "max_answer": WRITTEN, "test_questions": 1}
    kept = {"name": "text", "benchmark": "tofu", "tasks": ["retain90"], "evaluate": "generate", "max_answer": WRITTEN,
            "test_per_class": 1}  # fmt: skip
    made = [
        clplat.run({**config, "strategy": {"name": name, **learned}, "stream": stream}, quiet=True)
        for name, stream in (("finetune_retained", whole), ("naive", kept))
    ]
    return root, *made


class Hand:
    """A run's model, asked by transformers alone. Bytes plus 3 are its ids, 1 begins, 2 ends."""

    def __init__(self, result):
        self.net = clplat.load(result.run_dir).model.backbone.net.eval()

    @torch.no_grad()
    def told(self, prompt, answer, end=True):
        """Tokens of an answer, their log-probabilities, and the most likely token at each place."""
        before, tokens = ids(prompt), [*ids(answer)[1:], *([2] if end else [])]
        scores = self.net(torch.tensor([before + tokens])).logits[0].log_softmax(-1)[len(before) - 1 : -1]
        return tokens, [float(scores[i, t]) for i, t in enumerate(tokens)], scores.argmax(1).tolist()

    def loss(self, question, answer):
        return -np.mean(self.told(asked(question), answer)[1])

    @torch.no_grad()
    def written(self, prompt, count=WRITTEN):
        found = ids(prompt)
        start = len(found)
        while len(found) < start + count and found[-1] != 2:
            found.append(int(self.net(torch.tensor([found])).logits[0, -1].argmax()))
        return bytes(i - 3 for i in found[start:] if 3 <= i < 259).decode(errors="replace")

    def least_likely(self, prompt, text):
        """Min-K% of a text, 40 % of its tokens, without an end."""
        scores = sorted(self.told(prompt, text, end=False)[1])
        return -np.mean(scores[: max(1, int(len(scores) * 0.4))])


def ids(text):
    return [1, *(byte + 3 for byte in text.encode())]


def asked(question):
    return f"Question: {question}\nAnswer:"


def rows(root, name):
    return [json.loads(line) for line in (root / f"{name}.json").read_text().splitlines()]


def by_hand(model, root):
    """TOFU's measures of one model, and its truth ratios."""
    found, parts = {}, []
    for name in ("forget10", "retain", "real_authors", "world_facts"):
        content = rows(root, f"{name}_perturbed")
        probability, recall, ratios = [], [], []
        for row in content:
            own = math.exp(-model.loss(row["question"], row["answer"]))
            wrong = [model.loss(row["question"], answer) for answer in row["perturbed_answer"]]
            right = model.loss(row["question"], row.get("paraphrased_answer", row["answer"]))
            among = own / (own + sum(math.exp(-loss) for loss in wrong))
            probability.append(own if "paraphrased_answer" in row else among)
            recall.append(rouge_l_recall(model.written(asked(row["question"])), row["answer"]))
            ratios.append(math.exp(-np.mean(wrong)) / math.exp(-right))
        kept = [max(0, 1 - r) for r in ratios] if name != "forget10" else [min(r, 1 / r) for r in ratios]
        short = name.rstrip("10")
        found |= {f"{short}_probability": np.mean(probability), f"{short}_rouge": np.mean(recall),
                  f"{short}_truth_ratio": np.mean(kept)}  # fmt: skip
        parts.append(ratios)
    found["model_utility"] = hmean([v for k, v in found.items() if not k.startswith("forget")])
    exact, strength = [], []
    for row in rows(root, "forget10_perturbed"):
        tokens, _, greedy = model.told(asked(row["question"]), row["answer"], end=False)
        same = [a == b for a, b in zip(tokens, greedy, strict=True)]
        exact.append(np.mean(same))
        strength.append(max(i for i in range(len(same) + 1) if all(same[len(same) - i :])) / len(same))
    found |= {"exact_memorisation": np.mean(exact), "extraction_strength": np.mean(strength)}
    scores = [[model.least_likely(asked(row["question"]), row["answer"]) for row in rows(root, name)]
              for name in ("forget10_perturbed", "holdout10")]  # fmt: skip
    found["text_auc"] = roc_auc_score([0] * len(scores[0]) + [1] * len(scores[1]), [*scores[0], *scores[1]])
    return found, parts[0]


def test_tofu_is_measured_as_by_hand(runs, monkeypatch):
    root, run, kept = runs
    monkeypatch.setattr(memorisation, "ANSWER", WRITTEN)
    found = clplat.memorisation(run, kept)
    (mine, ratios), (theirs, others) = (by_hand(Hand(r), root / "tofu") for r in (run, kept))
    assert found["run"] == pytest.approx(mine, rel=1e-4)
    assert found["retrained"] == pytest.approx(theirs, rel=1e-4)
    assert found["forget_quality"] == pytest.approx(ks_2samp(ratios, others).pvalue)
    assert found["asked"] == {"forget10": 3, "retain": 3, "real_authors": 2, "world_facts": 4, "holdout": 3}
    assert found["forget"] == "forget10"
    assert found["privacy_leakage"] == leakage(mine, theirs)
    assert not found["notes"]


def leakage(mine, theirs):
    """MUSE's, in per cent; None where it would divide by nothing."""
    a, b = 1 - mine["text_auc"], 1 - theirs["text_auc"]
    return pytest.approx(100 * (a - b) / b) if b > 0 else None


def write_muse(folder):
    """MUSE, two or three of each."""
    names = ("author0", "author3")
    qa = {n: [{"question": tofu_row(n, i)["question"], "answer": tofu_row(n, i)["answer"]} for i in range(2)]
          for n in (*names, "poet")}  # fmt: skip
    sets = {
        "verbmem/forget": [{"prompt": f"Question: {n} 1?\nAnswer:", "gt": f"a1 {n}, who wrote"} for n in names],
        "knowmem/forget_qa": qa["author3"], "knowmem/forget_qa_icl": qa["poet"],
        "knowmem/retain_qa": qa["author0"], "knowmem/retain_qa_icl": qa["author0"],
        "privleak/forget": [{"text": t} for t in ("Question: author3 0?", "a2 author3", "b")],
        "privleak/holdout": [{"text": t} for t in ("River 7 is far away.", "Answer: zz")],
    }  # fmt: skip
    for name, content in sets.items():
        write_lines(folder / f"{name}.json", content)
    return sets


def muse_by_hand(model, sets):
    found = {}
    verbatim = sets["verbmem/forget"]
    goes_on = [row["gt"].encode()[:WRITTEN].decode() for row in verbatim]
    written = [model.written(row["prompt"]) for row in verbatim]
    found["verbatim_memory"] = np.mean([rouge_l(w, g) for w, g in zip(written, goes_on, strict=True)])
    for key, name in (("knowledge_memory", "forget_qa"), ("retained_knowledge", "retain_qa")):
        shown = "".join(f"{asked(r['question'])} {r['answer']}\n\n" for r in sets[f"knowmem/{name}_icl"])
        answers = [model.written(shown + asked(r["question"])).split("\n\n")[0] for r in sets[f"knowmem/{name}"]]
        found[key] = np.mean([rouge_l(a, r["answer"]) for a, r in zip(answers, sets[f"knowmem/{name}"], strict=True)])
    seen = [model.told(row["prompt"], row["gt"], end=False) for row in verbatim]
    same = [[a == b for a, b in zip(tokens, greedy, strict=True)] for tokens, _, greedy in seen]
    found["exact_memorisation"] = np.mean([np.mean(row) for row in same])
    tails = [next((i for i, right in enumerate(row[::-1]) if not right), len(row)) for row in same]
    found["extraction_strength"] = np.mean([t / len(row) for t, row in zip(tails, same, strict=True)])
    erased, unseen = ([model.least_likely("", r["text"]) for r in sets[f"privleak/{n}"]] for n in ("forget", "holdout"))
    found["text_auc"] = roc_auc_score([0] * len(erased) + [1] * len(unseen), erased + unseen)
    return found


def test_muse_is_measured_as_by_hand(runs, monkeypatch, tmp_path):
    _, run, kept = runs
    for name in ("VERBATIM", "SHORT"):
        monkeypatch.setattr(memorisation, name, WRITTEN)
    sets = write_muse(tmp_path)
    found = clplat.memorisation(run.run_dir, str(kept.run_dir), benchmark="muse", path=tmp_path, batch_size=1)
    mine, theirs = (muse_by_hand(Hand(r), sets) for r in (run, kept))
    assert found["run"] == pytest.approx(mine, rel=1e-4)
    assert found["retrained"] == pytest.approx(theirs, rel=1e-4)
    assert found["privacy_leakage"] == leakage(mine, theirs)
    assert "forget_quality" not in found


def test_without_a_retrained_run_nothing_stands_in_its_place_and_the_report_has_the_rest(runs, monkeypatch):
    root, run, _ = runs
    monkeypatch.setattr(memorisation, "ANSWER", WRITTEN)
    (root / "tofu" / "holdout10.json").rename(root / "aside.json")
    try:
        found = clplat.memorisation(run, most=1)
    finally:
        (root / "aside.json").rename(root / "tofu" / "holdout10.json")
    assert set(found["asked"].values()) == {1}
    assert found["forget_quality"] is found["privacy_leakage"] is found["retrained"] is found["run"]["text_auc"] is None
    assert found["why_null"]["forget_quality"].startswith("no reference")
    assert "holdout" in found["why_null"]["text_auc"]
    assert json.loads((run.run_dir / "memorisation.json").read_text()) == found
    assert json.loads((run.run_dir / "erasure.json").read_text())["memorisation"] == found
    assert "Memorisation, as TOFU measures it" in (run.run_dir / "erasure.html").read_text()
    stale = json.dumps(found | {"checkpoint_sha256": "of an earlier learner"})
    (run.run_dir / "memorisation.json").write_text(stale)
    assert evidence(run.run_dir)["memorisation"] is None


def test_what_does_not_fit_is_cut_and_said(runs, monkeypatch, tmp_path):
    _, run, _ = runs
    monkeypatch.setattr(memorisation, "SHORT", 2)
    monkeypatch.setattr(reader, "MOST", 80)
    sets = write_muse(tmp_path)
    write_lines(tmp_path / "privleak" / "holdout.json", [{"text": "far away " * 20}, {"text": "near"}])
    notes = clplat.memorisation(run, benchmark="muse", path=tmp_path)["notes"]
    assert len(sets["knowmem/forget_qa_icl"]) == 2
    assert "1 of 2 examples before forget_qa are shown: no more fit" in notes
    assert "1 of 2 texts lose their end: 80 tokens are read" in notes


def test_what_can_not_be_measured_is_refused(runs, tmp_path):
    root, run, _ = runs
    for given, fault in (
        ({"benchmark": "wmdp"}, r"benchmark: 'wmdp' is unknown \(valid: tofu, muse\)"),
        ({"forget": "forget20"}, r"forget: 'forget20' is unknown \(valid: forget01, forget05, forget10\)"),
        ({"benchmark": "muse", "path": root, "forget": "forget10"}, r"forget: 'forget10' has no meaning with muse"),
        ({"most": 0}, r"most: 0 is out of range \(valid: ≥ 1, or None\)"),
        ({"batch_size": 0}, r"batch_size: 0 is out of range"),
        ({"device": "abacus"}, r"device: 'abacus' is not here"),
    ):
        with pytest.raises(UserError, match=fault):
            clplat.memorisation(run, **given)
    with pytest.raises(MissingError, match=r"muse is no folder: put the files of muse-bench/MUSE-News or MUSE-Books"):
        clplat.memorisation(run, benchmark="muse")
    digits = clplat.run(strategy="naive", quiet=True, tracking={"enabled": False}, output=str(tmp_path),
                        loop={"max_steps": 1})  # fmt: skip
    with pytest.raises(UserError, match=r"memorisation: .* on stream digits writes no text \(valid: a run of backbone"):
        clplat.memorisation(digits, path=root / "tofu")


def test_an_answer_ends_where_the_next_question_begins():
    class Written:
        notes, room = {}, staticmethod(lambda prompts: True)
        write = staticmethod(lambda prompts, tokens, what: ["a1 poet\n\nb c", "a2 poet\nQuestion: d"])

    questions = [Question("who?", "a1 poet"), Question("who else?", "a2 poet")]
    assert memorisation._knowledge(Written(), {"forget_qa": questions, "forget_qa_icl": []}, "forget_qa") == 1
