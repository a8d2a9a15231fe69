"""Calls that the documentation names in tables and in running text: each has the signature that it says, and is made.

All of them are about one run of two steps. A call that is named and not made here fails.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml

import clplat
from clplat.strategy import HOOKS, LIFECYCLE, Strategy

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
CALL = re.compile(r"^[a-z][\w.]*\(.*\)$", re.IGNORECASE)


def calls(page):
    """(code span, whether in a table) of each that is a call, outside of fenced blocks."""
    for line in FENCED.sub("", page.read_text()).splitlines():
        for span in re.findall(r"`([^`]+)`", line):
            if CALL.match(span):
                yield span, line.startswith("|")


IN_TABLES = sorted({s for page in PAGES if page.name != "methods.md" for s, table in calls(page) if table})
SIGNATURES = [s for s in IN_TABLES if s.startswith("clplat.") and "," in s.replace("*", "")]
ALL_HOOKS = {*LIFECYCLE, *(h for hooks in HOOKS.values() for h in hooks), "predicting"}
GIVEN = {"strategy": {"name": "gradient_ascent", "lr": 0.01}, "stream": {"name": "digits", "experiences": 2},
         "loop": {"max_steps": 2}, "tracking": {"enabled": False}}  # fmt: skip

# name → a call of it, and what must hold of what it `gives`; the names in a call are those of `made`.
MADE = {
    "clplat.run": ("clplat.run(given, seeds=[0], resume=True, quiet=True)", "gives[0].run_dir == result.run_dir"),
    "clplat.resume": ("clplat.resume(run_dir, quiet=True)", "gives.status == 'complete'"),
    "clplat.load": ("clplat.load(run_dir)", "gives(inputs).ids.shape == (3,)"),
    "clplat.forget": (
        "clplat.forget(run_dir, 'class:7', purge=True, quiet=True)",
        "gives(inputs).scores.shape[0] == 3",
    ),
    "clplat.report": ("clplat.report(result, dest='report')", "gives.is_file()"),
    "clplat.compare": (
        "clplat.compare([result])",
        "{*gives.frame()['strategy']} == {'gradient_ascent'} and len(gives.tests()) == 0",
    ),
    "clplat.sweep": (
        "clplat.sweep('study.yaml', trials=1, quiet=True)",
        "list(gives.frame()['state']) == ['complete']",
    ),
    "clplat.list": ("clplat.list('strategies')", "'er' in set(gives.frame()['name'])"),
    "clplat.export": ("clplat.export(run_dir, to='safetensors', dest='out')", "(gives / 'learner.json').is_file()"),
    "clplat.require": ("clplat.require('lr', 1.0, 1.0 > 0, '> 0')", "gives is None"),
    "clplat.trainable": ("clplat.trainable(model)", "set(gives) == {'weight', 'bias'}"),
    "clplat.second_gradient": ("clplat.second_gradient(loss, parameters, 1)", "gives.shape == (8,)"),
    "run_checks": ("clplat.testing.run_checks('naive', ['hooks'])", "[r.status for r in gives] == ['passed']"),
    "write_report": ("clplat.report.write_report([run_dir], 'page')", "gives.is_file()"),
    "frame": ("[x.frame() for x in (result, clplat.list('heads'))]", "len(gives[0]) == 3"),
    "tests": ("clplat.compare([result]).tests()", "len(gives) == 0"),
    "add": ("memory.add(inputs, labels, logits=logits)", "len(memory) == 3"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The run, and what the calls name."""
    import clplat.testing

    folder = tmp_path_factory.mktemp("calls")
    given = {**GIVEN, "output": str(folder / "runs")}
    result = clplat.run(given, seed=0, quiet=True)
    space = {"strategy.lr": {"low": 0.001, "high": 0.1, "log": True}}
    protocol = {"stream": {**GIVEN["stream"], "validation": 0.2}, "sweep": {"trials": 1, "space": space}}
    (folder / "study.yaml").write_text(yaml.safe_dump(given | protocol))
    model = torch.nn.Linear(3, 2)
    inputs = torch.zeros(3, 8, 8, dtype=torch.uint8)
    return {
        "clplat": clplat, "given": given, "result": result, "run_dir": result.run_dir, "folder": folder,
        "model": model, "parameters": list(model.parameters()), "loss": model(torch.ones(1, 3)).sum(),
        "inputs": inputs, "labels": torch.arange(3), "logits": torch.zeros(3, 4), "memory": clplat.Reservoir(5),
    }  # fmt: skip


def test_every_call_in_a_table_is_made_here_or_is_a_hook():
    named = {s.partition("(")[0] for s in IN_TABLES}
    assert named - ALL_HOOKS - {"on_after_backward", "on_before_optimizer_step"} == MADE.keys()


@pytest.mark.parametrize("name", MADE)
def test_call_in_a_table_gives_what_is_said(name, made, monkeypatch):
    monkeypatch.chdir(made["folder"])
    call, holds = MADE[name]
    gives = eval(call, dict(made))
    assert eval(holds, made | {"gives": gives}), f"{call} gave {gives!r}"


@pytest.mark.parametrize("span", SIGNATURES)
def test_signature_in_a_table_is_that_of_the_code(span):
    name, _, arguments = span.removeprefix("clplat.").partition("(")
    parts = inspect.signature(getattr(clplat.api, name, None) or resolve(f"clplat.{name}")).parameters.values()
    plain = [p.replace(annotation=p.empty) for p in parts]
    assert str(inspect.Signature(plain)).replace("'", '"') == f"({arguments}"


@pytest.mark.parametrize("span", [s for s in IN_TABLES if s.partition("(")[0] in ALL_HOOKS])
def test_hook_in_a_table_has_the_arguments_of_a_strategy_that_has_it(span):
    name = span.partition("(")[0]
    homes = [*(getattr(importlib.import_module(f"clplat.strategies.{m}"), c) for m, c in HAVE.items()), Strategy]
    home = next(getattr(h, name) for h in homes if hasattr(h, name))
    said = [a.id for a in ast.parse(span, mode="eval").body.args]
    assert said == list(inspect.signature(home).parameters)[1:]


HAVE = {"naive": "Naive", "gradient_ascent": "GradientAscent", "tent": "Tent", "wsrl": "WSRL"}
IN_TEXT = sorted({s for page in PAGES for s, table in calls(page) if s.startswith("clplat.") and not table})


@pytest.mark.parametrize("span", IN_TEXT)
def test_call_in_the_text_has_arguments_that_are_taken(span):
    tree = ast.parse(span, mode="eval").body
    signature = inspect.signature(resolve(ast.unparse(tree.func)))
    signature.bind(*tree.args, **{k.arg: k.value for k in tree.keywords})


def resolve(dotted):
    """What a dotted name stands for."""
    if hasattr(clplat, name := dotted.removeprefix("clplat.")):
        found = getattr(clplat, name)
        return getattr(importlib.import_module(found.function_in), name) if inspect.ismodule(found) else found
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)
