"""The dashboard: what it counts, ranks, leaves out and says; its page; its server; its command."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from boards import STUDY, amend

from clplat.cli import main
from clplat.errors import UserError
from clplat.report.compare import load_summaries, split_streams
from clplat.report.dashboard import Folders, view
from clplat.report.dashboard_figures import MATRICES, front_figure
from clplat.report.dashboard_page import build_dashboard
from clplat.report.dashboard_served import make_server, write_dashboard


@pytest.fixture
def seen(fabricate, tmp_path):
    """`seen(wanted)`: the view of all runs fabricated so far."""
    return lambda wanted=None: view(Folders([tmp_path / "runs"]), wanted)


def means(found, metric="average_accuracy"):
    return {g.label: g.estimate(metric).mean for s in found.standings for g in s.groups}


def test_its_numbers_are_the_reports_and_the_best_mean_is_first(fabricate, seen, tmp_path):
    folders = [fabricate(strategy=s, seed=k) for s in ("naive", "joint", "er") for k in range(3)]
    (standing,) = seen().standings
    (groups,) = split_streams(load_summaries(folders))
    reported = {g.label: g.estimate("average_accuracy") for g in groups}
    assert {g.label: g.estimate("average_accuracy") for g in standing.groups} == reported
    assert [g.label for g in standing.groups] == sorted(reported, key=lambda label: -reported[label].mean)
    assert standing.ranks == [1.0, 2.0, 3.0]
    assert standing.figures[0].panels[0].title == standing.groups[0].label


def test_of_an_error_the_least_is_first_and_equal_means_share_a_rank(fabricate, seen):
    for name, error in (("tent", 0.5), ("cotta", 0.3), ("source", 0.5)):
        amend(fabricate(strategy=name, kind="adapt"), metrics={"online_error": error})
    (standing,) = seen().standings
    assert standing.metric == "online_error"
    assert [(g.label, r) for g, r in zip(standing.groups, standing.ranks, strict=True)] == [
        ("cotta", 1.0), ("tent", 2.5), ("source", 2.5)
    ]  # fmt: skip


def test_runs_that_did_not_complete_are_named_and_enter_no_mean(fabricate, seen):
    for seed in range(3):
        fabricate(strategy="er", seed=seed)
    before = means(seen())["er"]
    fabricate(strategy="er", seed=3, status="failed")
    fabricate(strategy="joint", seed=0, status="interrupted")
    killed = fabricate(strategy="lwf", seed=0)
    (killed / "summary.json").unlink()
    found = seen()
    assert means(found)["er"] == before
    assert [(g.label, r) for s in found.standings for g, r in zip(s.groups, s.ranks, strict=True)] == [
        ("er", 1.0), ("joint (incomplete)", None), ("lwf (incomplete)", None)
    ]  # fmt: skip
    page = build_dashboard(found, lambda run: None, served=False)
    assert "#1 of 1, 3 of 4 runs" in page
    assert page.count("no rank,") == 2
    assert page.count('<span class="why">not in the means</span>') == 1
    assert "joint (incomplete)" in page
    assert 'class="num best"' not in page


def test_validation_data_and_other_options_are_streams_of_their_own(fabricate, seen):
    fabricate(strategy="er")
    fabricate(strategy="er", experiences=3)
    valid = fabricate(strategy="er")
    (valid / "config.yaml").write_text(
        (valid / "config.yaml").read_text().replace("evaluate_on: test", "evaluate_on: valid")
    )
    found = seen()
    assert len(found.standings) == 3
    assert sum("on validation data" in s.stream for s in found.standings) == 1
    assert [label for label, _ in found.rows] == ["er"]
    assert sorted(found.rows[0][1]) == [0, 0, 0]


def test_a_choice_is_made_before_means_are(fabricate, seen):
    for seed in range(4):
        amend(fabricate(strategy="er", seed=seed), git_commit=("a" if seed < 3 else "b") * 40, tags={"team": "x"})
    fabricate(strategy="naive")
    found = seen({"commit": ["aaaaaa"]})
    group = found.standings[0].groups[0]
    assert ([r["seed"] for r in group.counted], group.estimate("forgetting").n) == ([0, 1, 2], 3)
    assert (len(found.runs), found.total) == (3, 5)
    assert found.choices["commit"] == ["89abcdef01", "aaaaaaaaaa", "bbbbbbbbbb"]
    assert {r["strategy"] for r in seen({"tag": ["team=x"], "strategy": ["er", "naive"]}).runs} == {"er"}


@pytest.mark.parametrize(
    ("wanted", "fault"),
    [
        ({"strategy": ["err"]}, r"^dashboard: --strategy err: no run has it \(did you mean er\?\)$"),
        ({"commit": ["ffff"]}, r"^dashboard: --commit ffff: no run has it \(there are: 89abcdef01\)$"),
        ({"tag": ["team=x"]}, r"^dashboard: --tag team=x: no run has it \(there are: none\)$"),
        ({"strategy": ["er"], "stream": ["images"]}, r"^dashboard: no run has all of --stream images --strategy er$"),
    ],
)
def test_what_no_run_has_is_refused_in_one_line(fabricate, seen, wanted, fault):
    fabricate(strategy="er")
    fabricate(strategy="naive", stream="images")
    with pytest.raises(UserError, match=fault):
        seen(wanted)


def test_trials_of_sweeps_are_left_to_their_study_and_that_is_said(fabricate, seen, tmp_path):
    fabricate(strategy="er")
    amend(fabricate(strategy="naive"), tags={"sweep": "s1"})
    (tmp_path / "runs" / "sweep.json").write_text(json.dumps(STUDY))
    found = seen()
    assert list(means(found)) == ["er"]
    assert found.notes == ["1 runs are trials of sweeps, on validation data, and not ranked here: the tag sweep shows "
                           "those of a study."]  # fmt: skip
    assert found.studies == [STUDY]
    assert list(means(seen({"tag": ["sweep=s1"]}))) == ["naive"]


def test_a_study_under_way_is_told_by_its_trials(fabricate, seen):
    tags = {
        "sweep": "s1",
        "sweep_objectives": "plasticity:maximize train_seconds:minimize",
        "sweep_protocol": "optimistic",
    }
    for number, (plasticity, seconds) in enumerate([(0.5, 9.0), (0.9, 9.5), (0.4, 2.0)]):
        for seed in range(2 if number < 2 else 1):
            folder = fabricate(strategy="er", seed=seed, options={"lr": 0.1 * (number + 1)}, log=False)
            amend(folder, tags=tags, metrics={"plasticity": plasticity + 0.02 * seed}, cost={"train_seconds": seconds})
            config = (folder / "config.yaml").read_text().replace("name: null", f"name: s1-trial-000{number}")
            (folder / "config.yaml").write_text(config)
    (study,) = seen({"stream": ["digits"]}).studies
    assert [t["values"] for t in study["trials"]] == [pytest.approx([0.51, 9.0]), pytest.approx([0.91, 9.5])]
    assert [t["label"] for t in study["trials"]] == ["lr 0.1", "lr 0.2"]
    assert [t["number"] for t in study["front"]] == [0, 1]  # the third lacks a seed
    assert study["effort"] == "3 trials, 5 runs, 39 s in training and evaluation; 2 trials have all their runs"
    assert seen().choices["tag"] == ["sweep=s1"]
    assert "s1" in build_dashboard(seen(), lambda run: None, served=False)


def test_a_front_is_joined_and_tells_its_trials(fabricate):
    figure = front_figure(STUDY)
    (panel,) = figure.panels
    assert panel.path == [(0.6, 3.0), (0.9, 14.0)]
    assert (panel.x_unit, panel.y_unit) == ("fraction", "seconds")
    assert sorted((p.group, p.x.mean) for p in panel.points) == [(0, 0.6), (0, 0.9), (1, 0.5), (2, 0.7)]
    assert "tuned on the first 2 experiences" in figure.caption.lower()
    assert "5 trials" in figure.caption
    assert front_figure({**STUDY, "metrics": ["plasticity"]}) is None


def test_many_matrices_are_cut_and_that_is_said(fabricate, seen):
    for memory in range(MATRICES + 2):
        fabricate(strategy="er", options={"memory": memory}, log=False)
    (standing,) = seen().standings
    figure = next(f for f in standing.figures if f.slug == "accuracy-matrix")
    assert len(figure.panels) == MATRICES
    assert f"The best {MATRICES} of {MATRICES + 2} are drawn" in figure.caption


def test_every_kind_has_its_panels(all_kinds):
    found = view(Folders([all_kinds]))
    drawn = {s.name: {f.slug for f in s.figures} for s in found.standings}
    common = {"accuracy-matrix", "average-accuracy", "over-steps", "cost"}
    assert drawn["digits"] >= common | {"plasticity-stability", "stability-gap"}
    assert drawn["unlearning"] >= {"forget-accuracy-retain-accuracy", "erasure"}
    assert drawn["corruptions"] >= {"online-error-by-corruption", "online-error-by-round", "adaptation"}
    assert drawn["pendulum"] >= {"returns", "probe", "scores-over-runs", "interaction"}
    assert [r.metric for r in found.rankings] == ["average_accuracy"]
    assert "accuracy-per-experience" not in set().union(*drawn.values())


def test_names_are_not_taken_for_markup(fabricate, seen):
    amend(fabricate(strategy="er"), tags={"note": "</script><b>x"})
    page = build_dashboard(seen(), lambda run: None, served=True)
    assert "</script><b>" not in page
    assert json.loads(page.partition('id="facts">')[2].partition("</script>")[0])["runs"][0]["tag"] == [
        "note=</script><b>x"
    ]


def test_a_file_links_to_reports_where_they_lie(fabricate, tmp_path):
    folder = fabricate(strategy="er")
    other = fabricate(strategy="naive")
    (folder / "report.html").write_text("the report")
    file = write_dashboard(Folders([tmp_path / "runs"]), {}, tmp_path / "out" / "page.html")
    page = file.read_text()
    assert f'href="../runs/{folder.name}/report.html"' in page
    assert f'runs/{other.name}<span class="why">no report</span>' in page
    assert "http://" not in page
    assert page.count("<h1>") == 1


@contextmanager
def served(folder, wanted=None):
    server = make_server(Folders([folder]), wanted or {}, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def get(path, host=None):
        request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}{path}")
        if host:
            request.add_header("Host", host)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    try:
        yield get, server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_server_reads_anew_filters_and_leads_to_reports(fabricate, tmp_path):
    folder = fabricate(strategy="er")
    (folder / "report.html").write_text("the report of er")
    with served(tmp_path / "runs", {"strategy": ["er"]}) as (get, server):
        assert server.server_address[0] == "127.0.0.1"
        code, page = get("/")
        assert (code, page.count("<tr data-run=")) == (200, 1)
        fabricate(strategy="naive")
        assert get("/")[1].count("<tr data-run=") == 1
        assert get("/?strategy=&stream=digits")[1].count("<tr data-run=") == 2
        assert get(page.partition('href="/report/')[2].partition('"')[0].join(["/report/", ""])) == (
            200,
            "the report of er",
        )
        assert get("/report/../config.yaml")[0] == 404
        code, page = get("/?strategy=nobody")
        assert code == 400
        assert "--strategy nobody: no run has it" in page
        assert get("/", host=f"evil.example:{server.server_port}")[0] == 403


@pytest.mark.parametrize(
    ("argv", "code", "fault"),
    [
        (["nowhere"], 2, "dashboard: nowhere is no folder of a run or of runs (there is no summary.json in it)"),
        ([], 3, "dashboard: there is no store {here}/mlflow.db (valid: --uri, or folders of runs)"),
        (
            ["--uri", "sqlite:///no.db"],
            3,
            "dashboard: there is no store {here}/no.db (valid: --uri, or folders of runs)",
        ),
        (["--uri", "ftp://x"], 2, "tracking.uri (or $MLFLOW_TRACKING_URI): 'ftp://x' is no tracking store"),
        (["runs", "--port", "99999"], 2, "dashboard: --port 99999: is out of range (valid: 0..65535)"),
        (["runs", "--output", "page"], 2, "dashboard: --output page: is no name of a page (valid: FILE.html)"),
        (["runs", "--output", "runs/x.html/y.html"], 2, "dashboard: --output runs/x.html/y.html: can't be written"),
        (["runs", "--uri", "sqlite:///no.db"], 2, "dashboard: --uri has no meaning beside folders of runs"),
        (["runs", "--stream", "digit"], 2, "dashboard: --stream digit: no run has it (did you mean digits?)"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(fabricate, tmp_path, monkeypatch, capsys, argv, code, fault):
    fabricate(strategy="er", log=False)
    (tmp_path / "runs" / "x.html").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["dashboard", *argv]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert fault.format(here=tmp_path) in line


def test_a_taken_port_is_one_line(fabricate, tmp_path):
    fabricate(strategy="er", log=False)
    with served(tmp_path / "runs") as (_, server), pytest.raises(UserError, match=r"can't listen on .*--port N"):
        make_server(Folders([tmp_path / "runs"]), {}, server.server_port)
