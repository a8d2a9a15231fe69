"""The report of one run and of many, of every status and kind."""

import csv
import json
import re
import time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
import yaml
from boards import amend

import clplat
from clplat.errors import UserError
from clplat.report import report_command, write_report
from clplat.report.compare import Group, load_summaries
from clplat.report.dashboard import Folders, view
from clplat.report.dashboard_page import build_dashboard
from clplat.report.data import titles
from clplat.report.naming import cut_apart
from clplat.report.tables import console_comparison, plain

VOID = {"meta", "br", "link", "img", "input"}


class Outline(HTMLParser):
    """Text, tags, attributes, and whether every tag is closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.links, self.words, self.styles = [], [], [], [], 0
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data", "poster")]
        self.styles += any(k == "style" or k.startswith("on") for k, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture
def report(tmp_path):
    def make(run_dirs, **options):
        return Outline(write_report(run_dirs, tmp_path / "out", **options).read_text())

    return make


def test_one_run_tells_what_it_was_and_what_came_of_it(fabricate, report):
    run = fabricate(strategy="er", seed=3)
    accuracy = json.loads((run / "summary.json").read_text())["metrics"]["average_accuracy"]
    page = report([run])
    assert "er on digits" in page.text
    assert f"{accuracy:.3f}" in page.text
    for part in ("Accuracy matrix", "Accuracy on each experience", "Average accuracy over experiences", "Anytime",
                 "Health of the representation", "Everything measured", "Configuration", "complete"):  # fmt: skip
        assert part in page.text
    assert "mean over test sets of the accuracy on everything learned" in page.text
    assert "the stream has no experience that online_error needs" in page.text
    assert "ran on the CPU" in page.text


def test_many_runs_are_compared(fabricate, report):
    runs = [fabricate(strategy=s, seed=k) for s in ("er", "naive", "ilora") for k in range(4)]
    page = report(runs)
    assert "3 strategies on digits" in page.text
    assert "ilora minus each other strategy" in page.text
    assert "Plasticity against stability" in page.text
    assert "±" in page.text
    buttons = [a for tag, a in page.tags if tag == "button"]
    assert [b["aria-pressed"] for b in buttons] == ["true"] * 3


def test_what_tuned_a_number_stands_beside_it_wherever_it_is_read(fabricate, report, tmp_path):
    said = "study er-digits: tuned on the first 2 experiences; 5 trials, 5 runs, 31 s in training and evaluation"
    tuned, other = (fabricate(strategy=s, stream="a_b") for s in ("er", "naive"))
    amend(tuned, tags={"tuned": said})
    line = f"er is tuned: {said}."
    assert line in report([tuned]).text
    assert report([tuned, other]).text.count("is tuned") == 1
    tables = tmp_path / "out" / "tables"
    assert [r["tuned"] for r in read_csv(tables / "runs.csv")] == [said, ""]
    assert {r["tuned"] for r in read_csv(tables / "metrics.csv") if r["group"] == "er"} == {line}
    assert line in (tables / "a-b.md").read_text()
    assert line in (tables / "a-b.tex").read_text()
    assert line in " ".join(plain(console_comparison(load_summaries([tuned, other])), width=400).split())
    assert line in clplat.compare([tuned, other])._repr_html_()
    board = build_dashboard(view(Folders([tmp_path])), lambda run: None, served=False)
    assert line in board
    assert board.count(" run, tuned<") == 1


def test_page_is_self_contained_and_accessible(fabricate, report):
    page = report([fabricate(strategy=s, seed=k) for s in ("er", "naive") for k in range(2)])
    assert [link for link in page.links if not link.startswith("#")] == []
    assert page.styles == 0
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert next(a for tag, a in page.tags if tag == "html")["lang"] == "en"
    assert all(len(a["aria-label"]) > 20 for tag, a in page.tags if tag == "svg" and a.get("role") == "img")
    assert page.count("caption") == page.count("table") > 3
    assert all("scope" in a for tag, a in page.tags if tag == "th")
    assert page.count("figure") == page.count("figcaption") > 4


def test_names_are_escaped_everywhere(fabricate, tmp_path):
    evil = "<script>alert(1)</script>\"'&"
    runs = [fabricate(strategy=evil, stream=f"{evil}s", backbone=evil, seed=k, options={evil: evil}) for k in range(2)]
    runs += [fabricate(strategy="er", stream=f"{evil}s", seed=k) for k in range(2)]
    summary = json.loads((runs[0] / "summary.json").read_text())
    summary["experiences"][0]["name"] = summary["status"] = summary["git_commit"] = evil
    summary["why_null"]["h_mean"] = evil
    summary["metrics"][evil] = 0.5
    (runs[0] / "summary.json").write_text(json.dumps(summary))
    path, _ = report_command(runs, tmp_path / "out")
    page = path.read_text()
    assert page.count("<script>") == 1  # the page's own
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    Outline(page)
    for figure in (tmp_path / "out" / "figures").glob("*.svg"):
        ET.parse(figure)


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_incomplete_runs_are_shown_with_what_they_have(fabricate, report, status):
    page = report([fabricate(status=status)])
    assert status in page.text
    assert "Accuracy matrix" in page.text


def test_a_run_that_measured_nothing_is_shown(fabricate, report):
    run = fabricate(status="failed")
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"accuracy_matrix": [], "representation": {}, "metrics": dict.fromkeys(summary["metrics"]), "cost": {}}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "metrics.jsonl").write_text("")
    assert "Nothing was measured" in report([run]).text


def test_a_run_killed_before_its_summary_is_shown(fabricate, report):
    run = fabricate()
    (run / "summary.json").unlink()
    assert "interrupted" in report([run, fabricate(seed=1)]).text


def test_a_torn_last_line_of_the_log_is_left_out(fabricate, report):
    run = fabricate()
    log = run / "metrics.jsonl"
    log.write_text(log.read_text() + '{"axis": "step", "step": 99')
    assert "Anytime accuracy" in report([run]).text


@pytest.mark.parametrize("kind", ["forget", "adapt", "interact"])
def test_other_kinds_with_null_columns(fabricate, report, kind):
    runs = [fabricate(strategy=s, kind=kind, seed=k) for s in ("er", "naive") for k in range(3)]
    main = {"forget": "h_mean", "adapt": "online_error", "interact": "normalized_return"}[kind]
    for k, run in enumerate(runs):
        summary = json.loads((run / "summary.json").read_text())
        width = len(summary["experiences"])
        summary["accuracy_matrix"] = [[None] * width for _ in range(width + 1)]
        summary["metrics"] = dict.fromkeys(summary["metrics"]) | {main: 0.4 + 0.01 * k * k}
        (run / "summary.json").write_text(json.dumps(summary))
        steps = [{"axis": "step", "step": i, "time": 0, "metrics": {"interact/return": i * 1.5}} for i in range(9)]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
    page = report(runs)
    assert "Accuracy matrix" not in page.text
    assert f"{main.replace('_', ' ').capitalize()} {'↓' if kind == 'adapt' else '↑'}: " in page.text
    assert "Interact return" in page.text


def test_one_test_set_among_many_experiences_is_a_line_and_no_matrix(fabricate, report):
    run = fabricate(kind="adapt")
    summary = json.loads((run / "summary.json").read_text())
    summary["accuracy_matrix"] = [[row[0], *[None] * (len(row) - 1)] for row in summary["accuracy_matrix"]]
    (run / "summary.json").write_text(json.dumps(summary))
    page = report([run])
    assert "Accuracy matrix" not in page.text
    assert "source data" in page.text


def test_streams_have_sections_of_their_own(fabricate, report, tmp_path):
    runs = [
        fabricate(stream=s, strategy=m, seed=k) for s in ("digits", "text") for m in ("er", "naive") for k in (0, 1)
    ]
    page = report(runs)
    assert "2 strategies on 2 streams" in page.text
    assert page.text.count("Is the difference real?") == 2
    assert {"#stream-0", "#stream-1"} <= set(page.links)
    assert {p.stem for p in (tmp_path / "out" / "tables").glob("*.tex")} == {"digits", "text", "stream_ranks"}


def name_runs(folder, **changes):
    """Change config.yaml: dotted keys to values."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for key, value in changes.items():
        *parts, last = key.split("__")
        node = config
        for part in parts:
            node = node[part]
        node[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_streams_of_one_name_are_told_apart_everywhere(fabricate, report, tmp_path):
    runs = [name_runs(fabricate(), stream__scenario="class"), name_runs(fabricate(), stream__scenario="domain"),
            name_runs(fabricate(), stream__scenario="class", loop__evaluate_on="valid")]  # fmt: skip
    page = report(runs)
    labels = {"digits (scenario class)", "digits (scenario domain)", "digits on validation data"}
    assert {words.strip() for words in page.words} >= labels
    assert "er on 3 streams" in page.text
    tables = tmp_path / "out" / "tables"
    rows, metrics = read_csv(tables / "runs.csv"), read_csv(tables / "metrics.csv")
    assert {r["stream"] for r in rows} == {m["stream"] for m in metrics} == labels
    assert [r["evaluated_on"] for r in rows] == ["test", "test", "valid"]
    assert len({tuple(m[k] for k in ("stream", "group", "metric")) for m in metrics}) == len(metrics)
    assert len(list(tables.glob("*.md"))) == 3
    assert [p.name for p in tables.glob("*.md") if "validation data" in p.read_text()] == [
        "digits-on-validation-data.md"
    ]
    assert "digits on validation data" in (tables / "digits-on-validation-data.tex").read_text()


def test_a_single_run_on_validation_data_says_so(fabricate, report):
    run = name_runs(fabricate(), loop__evaluate_on="valid")
    assert "er on digits on validation data" in report([run]).text
    assert "Comparison on digits on validation data" in plain(console_comparison(load_summaries([run])))


def test_settings_are_not_counted_as_strategies(fabricate, report):
    runs = [fabricate(options={"memory": m}) for m in (50, 100)]
    assert "2 settings of er on digits" in report(runs).text
    assert "3 settings of 2 strategies on digits" in report([*runs, fabricate(strategy="naive")]).text


def test_runs_have_the_names_that_the_user_gave_them(fabricate, report, tmp_path):
    runs = [name_runs(fabricate(options={"memory": m}), name=f"mine/{key}") for key, m in (("few", 50), ("many", 500))]
    runs.append(name_runs(fabricate(options={"memory": 500}), name="mine/again"))  # as `many`, under another key
    page = report(runs)
    assert [r["group"] for r in read_csv(tmp_path / "out" / "tables" / "runs.csv")] == ["few", "many", "again"]
    assert "er (memory" not in page.text
    assert "3 settings of er on digits" in page.text


def test_long_labels_stay_different_where_they_are_cut():
    rows = [f"prototype_replay (memory {m}, lr 0.1)" for m in (50, 100, 200)]
    for length in (14, 16, 21):
        found = cut_apart(rows, length)
        assert len(set(found)) == 3
        assert max(map(len, found)) <= length
    ends = [f"a{'x' * 20}{k}{'y' * 20}" for k in range(3)]
    assert len(set(cut_apart(ends, 14))) == 3
    assert cut_apart(["short", "short", "a longer name"], 8) == ["short", "short", "a longe…"]


def test_long_streams_and_many_groups(fabricate, report):
    runs = [
        fabricate(strategy="er", seed=k, experiences=30, options={"memory": m}) for m in range(12) for k in range(2)
    ]
    page = report(runs)
    assert "12 of 30 test sets are drawn" in page.text
    assert "er (memory 11)" in page.text


def test_of_a_very_long_stream_the_matrix_shows_some_each_beside_its_own_row(fabricate, tmp_path):
    page = write_report([fabricate(experiences=150)], tmp_path / "out").read_text()
    assert "60 of 150 experiences are drawn, evenly spaced" in Outline(page).text
    own = re.findall(r'class="own"[^<]*/><title>after (digits \d+, \d+), test set (digits \d+, \d+): ', page)
    assert len(own) == 60
    assert all(row == column for row, column in own)
    assert [own[0][0], own[-1][0]] == ["digits 0, 1", "digits 298, 299"]


def test_sixty_runs_take_little_time_and_space(fabricate, tmp_path):
    runs = [fabricate(strategy="er", seed=k, options={"memory": m}) for m in range(12) for k in range(5)]
    start = time.process_time()
    page = write_report(runs, tmp_path / "out")
    assert time.process_time() - start < 6
    assert page.stat().st_size < 1_500_000


def test_one_run_is_fast_and_small(fabricate, tmp_path):
    run = fabricate()
    write_report([run], tmp_path / "first")
    start = time.process_time()
    page = write_report([run], run)
    assert time.process_time() - start < 1.5
    assert page == run / "report.html"
    assert page.stat().st_size < 200_000
    assert not list((run / "figures").glob("*.png"))


def test_python_compares_runs_and_folders_of_runs(fabricate, tmp_path):
    runs = [fabricate(seed=seed) for seed in (0, 1, 2)]
    page = clplat.report(*runs, dest=tmp_path / "own")
    assert page == tmp_path / "own" / "report.html"
    assert list((tmp_path / "own").rglob("*.png"))
    with pytest.raises(clplat.UserError, match="is no folder of a run"):
        clplat.report(tmp_path / "nowhere")
    with pytest.raises(clplat.UserError, match="name runs"):
        clplat.report()


def test_command_writes_figures_and_tables(fabricate, tmp_path):
    runs = [fabricate(strategy=s, seed=k) for s in ("er", "naive") for k in range(2)]
    path, text = report_command(runs, tmp_path / "out")
    assert path == tmp_path / "out" / "report.html"
    assert "average accuracy" in text
    names = {p.stem for p in (path.parent / "figures").glob("*.svg")}
    assert {"accuracy-matrix", "average-accuracy", "plasticity-stability", "representation", "cost"} <= names
    for ending, begins in (("png", b"\x89PNG\r\n\x1a\n"), ("pdf", b"%PDF-")):
        files = list((path.parent / "figures").glob(f"*.{ending}"))
        assert names == {p.stem for p in files}
        assert all(file.read_bytes().startswith(begins) for file in files)
        assert not any(b"/Type3" in file.read_bytes() for file in files)
    rows = read_csv(path.parent / "tables" / "runs.csv")
    assert len(rows) == 4
    summary = json.loads((runs[0] / "summary.json").read_text())
    assert float(rows[0]["average_accuracy"]) == summary["metrics"]["average_accuracy"]
    assert rows[0]["online_error"] == ""
    tests = read_csv(path.parent / "tables" / "comparisons.csv")
    (test,) = [r for r in tests if r["metric"] == "average_accuracy"]
    assert (test["first"], test["second"], test["n"]) == ("er", "naive", "2")


def test_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="RUN_DIR"):
        write_report([], tmp_path)
    with pytest.raises(UserError, match=r"no summary\.json"):
        write_report([tmp_path], tmp_path)


def test_latex_and_markdown_escape_and_mark_the_best(fabricate, tmp_path):
    runs = [fabricate(strategy=s, seed=k) for s in ("e_r & 50%", "naive") for k in range(3)]
    write_report(runs, tmp_path / "out")
    latex = (tmp_path / "out" / "tables" / "digits.tex").read_text()
    assert r"e\_r \& 50\%" in latex
    assert r"\toprule" in latex
    assert re.search(r"\\textbf\{0\.\d{3} \$\\pm\$ \d+\.\d{3}\}", latex)
    markdown = (tmp_path / "out" / "tables" / "digits.md").read_text()
    assert len({line.count("|") for line in markdown.splitlines()}) == 1
    assert "**" in markdown


def test_what_differs_from_the_best_has_a_dagger_and_two_seeds_say_that_nothing_was_tested(fabricate, tmp_path):
    runs = {n: [fabricate(strategy=s, seed=k) for s in ("er", "ilora", "naive") for k in range(n)] for n in (5, 2)}
    write_report(runs[5], tmp_path / "five")
    rows = read_csv(tmp_path / "five" / "tables" / "metrics.csv")
    marks = {r["group"]: r["mark"] for r in rows if r["metric"] == "average_accuracy"}
    tested = read_csv(tmp_path / "five" / "tables" / "comparisons.csv")
    p_of_naive = next(r["p_t_holm"] for r in tested if (r["metric"], r["second"]) == ("average_accuracy", "naive"))
    assert float(p_of_naive) < 0.05
    assert marks["ilora"] == "best"
    assert marks["naive"] == "differs"
    assert {r["mark"] for r in rows if r["metric"] == "worst_case_accuracy"} == {""}
    latex = (tmp_path / "five" / "tables" / "digits.tex").read_text()
    line = next(line for line in latex.splitlines() if line.startswith("    naive"))
    assert r"$^{\dagger}$" in line
    assert r"$^{\dagger}$: differs from it (paired t-test over shared seeds, Holm-corrected" in latex
    write_report(runs[2], tmp_path / "two")
    latex = (tmp_path / "two" / "tables" / "digits.tex").read_text()
    assert "dagger" not in latex
    assert "Not tested: 2 shared seeds" in latex


def test_several_streams_are_ranked_and_two_say_that_nothing_can_be_told(fabricate, report, tmp_path):
    strategies = ("joint", "er", "naive")
    runs = [fabricate(strategy=s, stream=f"stream_{i}", log=False) for i in range(3) for s in strategies]
    page = report(runs)
    out = tmp_path / "out"
    assert "Ranks by average accuracy over streams" in page.text
    rows = read_csv(out / "tables" / "stream_ranks.csv")
    means = {r["strategy"]: float(r["rank"]) for r in rows if r["stream"] == "mean"}
    assert means == {"joint": 1, "er": 2, "naive": 3}
    for row in read_csv(out / "tables" / "stream_ranks_pairs.csv"):
        assert float(row["p_friedman"]) == pytest.approx(1 / 36)
    assert (out / "figures" / "ranks.svg").is_file()
    assert r"$\chi$$^2$ = 6.00" in (out / "tables" / "stream_ranks.tex").read_text()
    assert "Nothing can be told from 2 streams" in report(runs[:6]).text


def test_test_sets_are_named_by_what_they_are_of_where_all_runs_agree(fabricate, report):
    """One seed drew other classes into its second experience; no title: the name; two of one title: both."""
    own_titles = [["cat, dog", "bird, owl", "", "elk", "elk"], ["cat, dog", "owl, bird", "", "elk", "elk"]]
    runs = [fabricate(strategy="er", seed=seed) for seed in range(2)]
    for run, own in zip(runs, own_titles, strict=True):
        known = json.loads((run / "summary.json").read_text())["experiences"]
        amend(run, experiences=[{**e, "title": t} if t else e for e, t in zip(known, own, strict=True)])
    assert report(runs[:1]).text.count("digits 2, 3") == 1  # its name, in the table of experiences
    page = report(runs)
    (heat,) = (a["aria-label"] for tag, a in page.tags if tag == "svg" and a.get("aria-label", "").startswith("er."))
    assert heat
    tips = re.findall(r"test set ([^:]+): 0\.", page.text)
    assert set(tips) == {"cat, dog", "digits 2, 3", "digits 4, 5", "digits 6, 7 (elk)", "digits 8, 9 (elk)"}
    assert page.text.count("owl") == 0
    known = [{"name": "first", "title": "second"}, {"name": "second", "title": ""}]  # one is called what another is of
    run = {"experiences": known}
    assert titles([Group("er", "er", "digits", "mlp", (run,), (run,))]) == ["first (second)", "second"]
