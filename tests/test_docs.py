"""The documentation says what is so: its commands are accepted, its files run, its links and tables hold.

A fenced block with a title is a file; the blocks in `bash` are command lines; those in `python` without a title run.
"""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import clplat
from clplat.cli import COMMANDS
from clplat.commands.arguments import parse_names, parse_seeds, parser_for, split
from clplat.config import discovery
from clplat.config.resolve import expand, find_config, read_yaml
from clplat.testing import run_checks

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PLACEHOLDERS = {"RUN_DIR", "CONFIG", "NAME", "PATH_OR_NAME"}


def load(file, name):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load(ROOT / "docs" / "generate.py", "docs_generate")


def blocks(page, language, titled=None):
    """(title, text) of the fenced blocks in a language; with or without titles, or both."""
    found = [(title, text) for lang, title, text in BLOCK.findall(page.read_text()) if lang == language]
    return [b for b in found if titled is None or bool(b[0]) == titled]


def commands(page):
    """Command lines in bash blocks and in code spans, whole; options in square brackets are left out."""
    text = page.read_text()
    lines = [line for _, block in blocks(page, "bash") for line in block.splitlines()]
    lines += [re.sub(r"\[[^]]*\]|\.\.\.", "", c) for c in re.findall(r"`(clplat [a-z][^`]*)`", BLOCK.sub("", text))]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


SAID = [(name, words) for page, name in zip(PAGES, NAMES, strict=True) for words in commands(page)]
CLPLAT = [(name, words[words.index("clplat") + 1 :]) for name, words in SAID if "clplat" in words]
TITLED = {title: text for page in PAGES for lang in ("python", "yaml") for title, text in blocks(page, lang, True)}
STRATEGIES = ["l2_init.py:L2Init", "ema_replay.py:EMAReplay", "negative_gradient.py:NegativeGradient"]


@pytest.fixture
def same_environment():
    """Undoes what importing avalanche-lib leaves in it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of someone who has saved all files of the documentation."""
    for title, text in TITLED.items():
        (tmp_path / title).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("clplat.run.launch._tracker", lambda *args: None)
    return tmp_path


def check_command(words):
    """Raises what the command would say about its arguments; runs nothing."""
    command, *rest = words
    assert command in COMMANDS
    module = __import__(f"clplat.commands.{command}", fromlist=["x"])
    parser = parser_for(command, COMMANDS[command], module)
    own, keys = split(rest, parser)
    assert not keys or module.TAKES_KEYS
    if not rest or PLACEHOLDERS & set(rest) or "--help" in rest:
        return
    args = parser.parse_args(own)
    if command == "check":
        assert module.groups_of(args.part)
    elif command == "cp":
        find_config(args.name)
    elif command == "list":
        from clplat.commands.list import GROUPS

        assert args.group in (None, *GROUPS)
    elif command == "sweep":
        from clplat.sweep.check import check
        from clplat.sweep.study import _plan

        plan = _plan(args.config, keys, args.trials, quiet=True)
        check(plan, plan.keys)
    elif command in ("run", "validate") and (keys or args.config):
        seeds = parse_seeds(args.seeds) if getattr(args, "seeds", None) else None
        assert expand(keys, args.config, seeds, parse_names(getattr(args, "only", None)))


def test_there_is_something_to_check():
    assert len(CLPLAT) > 50
    assert len(TITLED) >= 8


@pytest.mark.parametrize(("page", "words"), CLPLAT, ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_command_is_accepted(page, words, folder):
    check_command(words)


def test_a_wrong_command_is_refused(folder):
    with pytest.raises(clplat.errors.UserError, match=r"strategy\.memry"):
        check_command(shlex.split("run --strategy er --strategy.memry 3"))


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {w for p in PAGES for words in commands(p) if words[0] == "make" for w in words[1:]}
    used |= {w for p in PAGES for w in re.findall(r"`make ([\w-]+)`", p.read_text())}
    assert {"demo", "test"} <= used <= targets


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    headings = {}
    for link in LINK.findall(BLOCK.sub("", page.read_text())):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if page.parent.name == "docs":  # a page of the site can't leave it
            assert (ROOT / "docs") in target.resolve().parents, link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", target.read_text()), re.MULTILINE)
            headings[target] = {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}
            assert anchor in headings[target], link


@pytest.mark.parametrize("name", NAMES)
def test_files_named_in_code_exist(name):
    """`experiments/…`, `tests/…`, and the like, where no placeholder stands in them."""
    text = BLOCK.sub("", (ROOT / name).read_text())
    folders = "clplat|docs|experiments|mlflow|strategies|streams|tests|benchmarks"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


def test_generated_parts_are_current():
    """To renew them: python docs/generate.py"""
    pages = generate.pages()
    assert len(pages) >= 4
    assert [p.name for p, text in pages.items() if p.read_text() != text] == []


def test_readme_shows_every_strategy_and_methods_its_equation():
    readme, methods = (ROOT / "README.md").read_text(), (ROOT / "docs" / "methods.md").read_text()
    for name, entry in discovery.entries("strategies").items():
        assert f"strategies/{name}.py" in readme
        section = methods.partition(f"## `{name}`\n")[2].partition("\n## ")[0]
        assert entry.paper in section
        assert "=" in section or "θ" in section or "experience" in section


def test_demo_results_are_of_the_demo_as_it_is():
    """To renew them: make demo; python docs/generate.py --demo runs/demo"""
    found = {(r["name"], r["seed"]): r for r in json.loads(generate.RESULTS.read_text())["runs"]}
    configs = {(c.name, c.seed): json.loads(json.dumps(c.to_dict())) for c in expand(config="demo/digits")}
    assert found.keys() == configs.keys()
    for key, config in configs.items():
        result = found[key]
        assert result["status"] == "complete"
        for part in ("strategy", "stream", "backbone", "head", "loop", "fabric"):
            shared = config[part].keys() & result["config"][part].keys()  # an option that is new changes nothing
            assert {k: config[part][k] for k in shared} == {k: result["config"][part][k] for k in shared}


def test_public_names_are_documented():
    text = (ROOT / "docs" / "api.md").read_text()
    assert [n for n in clplat.__all__ if f"clplat.{n}" not in text] == []


def test_modules_named_in_api_exist():
    text = (ROOT / "docs" / "api.md").read_text()
    for module in re.findall(r"`clplat\.([a-z_]+)`", text):
        assert module in clplat.__all__ or importlib.util.find_spec(f"clplat.{module}"), module


def test_hooks_are_documented():
    from clplat.strategy import HOOKS, LIFECYCLE

    text = (ROOT / "docs" / "strategy.md").read_text()
    for hook in {*LIFECYCLE, *(h for hooks in HOOKS.values() for h in hooks)}:
        assert f"`{hook}(" in text, hook


def test_checks_are_documented():
    from clplat.testing import CHECKS

    text = (ROOT / "docs" / "strategy.md").read_text()
    assert [c for c in CHECKS if f"`{c}`" not in text] == []


def test_checks_of_streams_are_documented():
    from clplat.testing import STREAM_CHECKS

    text = (ROOT / "docs" / "streams.md").read_text()
    assert [c for c in STREAM_CHECKS if f"`{c}`" not in text] == []


def test_stream_of_the_tutorial_passes_its_checks(folder):
    results = run_checks("learn_then_forget.py", group="streams")
    assert [r for r in results if r.status != "passed"] == []


def test_exit_codes_are_documented():
    from clplat import errors

    codes = {e.exit_code for e in vars(errors).values() if hasattr(e, "exit_code")} | {0}
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "running.md").read_text(), re.MULTILINE)
    assert {int(r) for r in rows} == codes


def test_version_has_an_entry_in_the_changelog():
    assert f"## {clplat.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", [*NAMES, "mkdocs.yml", "docs/generate.py", "experiments/demo/results.json"])
def test_nothing_names_a_path_of_someones_machine(name):
    assert not re.search(r"(?<![\w.])/(?:work|tmp|home|root|Users)/", (ROOT / name).read_text())


# --- the files of the tutorial run --------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategy_passes_the_quick_checks(strategy, folder):
    results = run_checks(strategy, ["hooks", "arguments", "state", "growth", "frozen_backbone", "mechanism", "memory"])
    assert [r for r in results if r.status != "passed"] == []


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategy_passes_all_checks(strategy, folder):
    assert [r for r in run_checks(strategy) if r.status == "failed"] == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategy_runs_on_digits(strategy, folder):
    stream = "learn_then_forget.py" if "negative" in strategy else "digits"
    result = clplat.run(strategy=strategy, stream=stream, loop={"max_steps": 4}, quiet=True)
    assert result.status == "complete"
    assert result.metrics["average_accuracy"] is not None
    assert (result.metrics["h_mean"] is not None) == ("negative" in strategy)


def test_strategy_of_the_tutorial_learns_more_than_fine_tuning(folder):
    scores = [
        clplat.run(strategy=s, loop={"max_epochs": 2}, quiet=True).metrics["average_accuracy"]
        for s in ("naive", "ema_replay.py:EMAReplay")
    ]
    assert scores[0] < 0.3 < 0.5 < scores[1]


def test_test_file_of_the_tutorial_passes(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    module = load(folder / "test_ema_replay.py", "test_ema_replay")
    tests = [f for name, f in vars(module).items() if name.startswith("test_")]
    assert len(tests) == 3
    try:
        for test in tests:
            test()
    finally:
        sys.modules.pop("ema_replay", None)


def test_own_data_make_a_stream(folder):
    subprocess.run([sys.executable, "make_wine.py"], check=True)
    keys = next(words for _, words in CLPLAT if "wine.npz" in words)[1:]
    (config,) = expand(keys)
    result = clplat.run(config.to_dict(), loop={"max_steps": 2}, quiet=True)
    assert len(result.accuracy_matrix) == 4


@pytest.mark.parametrize("name", [n for p, n in zip(PAGES, NAMES, strict=True) if blocks(p, "python", False)])
def test_python_examples_run(name, folder):
    for _, text in blocks(ROOT / name, "python", False):
        exec(compile(text, name, "exec"), {})


def test_yaml_files_of_the_tutorial_are_sound(folder):
    for title in (t for t in TITLED if t.endswith(".yaml")):
        if "sweep" not in read_yaml(folder / title):
            several = "seeds" in read_yaml(folder / title)
            assert len(expand(config=folder / title)) == (9 if several else 1)


# What is shown to be run on this machine alone.
ELSEWHERE = {"--help", "--fabric.devices", "--fabric.num_nodes", "--launcher"}
SHOWN = [w for _, w in CLPLAT if w[:2] == ["run", "--strategy"] and not ELSEWHERE & set(w)]


@pytest.mark.slow
@pytest.mark.parametrize("words", SHOWN, ids=" ".join)
def test_run_command_takes_two_steps(words, folder):
    from clplat.cli import main

    if "wine.npz" in words:
        subprocess.run([sys.executable, "make_wine.py"], check=True)
    assert main([*words, *(["--dry-run"] if "--dry-run" not in words else [])]) == 0


# What the table of strategies says runs on any backbone.
ON_ANY = [
    n for n, e in discovery.entries("strategies").items() if "learn" in e.kinds and generate.backbones_of(e) == "any"
]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["mlp", "cnn", "vit_micro"])
@pytest.mark.parametrize("strategy", ON_ANY)
def test_any_backbone_is_any_backbone(strategy, backbone, folder, same_environment):
    loop = {"max_steps": 2, "stop_after": 2}
    result = clplat.run(strategy=strategy, backbone=backbone, loop=loop, quiet=True)
    assert result.status == "complete"
