"""Pages of experiments/real: every generated part is that of the results beside it."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent / "experiments" / "real"
_spec = importlib.util.spec_from_file_location("collect_real", HERE / "collect.py")
assert _spec is not None
assert _spec.loader is not None
collect = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = collect  # dataclasses look their module up
_spec.loader.exec_module(collect)


@pytest.mark.parametrize("name", list(collect.PAGES))
def test_a_page_shows_its_results(name: str) -> None:
    page = collect.PAGES[name]
    text = (HERE / page.readme).read_text(encoding="utf-8")
    results = json.loads((HERE / page.results).read_text(encoding="utf-8"))
    assert results["experiment"] == f"real/{name}"
    found = dict(re.findall(r"<!-- generated: (\S+) -->\n\n(.*?)\n\n<!-- end: \1 -->", text, re.DOTALL))
    assert found == collect.parts_of(page, results)


def _groups(**arms: list[float]) -> dict:
    """Arms, each with its average accuracy under seeds 0, 1, ..."""
    runs = [
        {"name": f"real-x/{name}", "strategy": name, "seed": seed, "metrics": {"average_accuracy": value}}
        for name, values in arms.items()
        for seed, value in enumerate(values)
    ]
    return collect.groups_of({"runs": runs})


def test_above_is_beyond_the_interval() -> None:
    ten, other, below, few = [0.3, 0.4, 0.5], [0.3, 0.3, 0.41], [0.1, 0.2, 0.3], [0.9, 0.9]
    groups = _groups(lora=[0.2, 0.3, 0.4], olora=ten, ilora=other, moram=below, svd_orthogonal=few)
    (said,) = collect.adapters_answer(groups).splitlines()
    assert said.split("; ")[1:] == [
        "above it beyond the interval: `olora` (+10.0 ± 0.0)",
        "not: `ilora` (+3.7 ± 13.7), `moram` (-10.0 ± 0.0)",
        "too few seeds to say: `svd_orthogonal` (+65.0)",
    ]


def test_differences_are_taken_within_seeds() -> None:
    groups = _groups(lora=[0.2, 0.3, 0.4], olora=[0.3, 0.4, 0.5])
    assert collect.percent(collect.more(groups, "olora", "lora"), "+") == "+10.0 ± 0.0"


def test_studies_are_shown_by_what_they_searched() -> None:
    def study(name: str, key: str, values: dict[float, float], best: float) -> dict:
        trials = [{"params": {key: k}, "value": v, "strategy": name} for k, v in values.items()]
        return {"best": {"params": {key: best}}, "trials": trials}

    rates = [study("er", "strategy.lr", {0.1: 0.5, 0.01: 0.25}, 0.1), study("lora", "strategy.lr", {0.001: 0.4}, 0.001)]
    said = collect.sweeps_table([*rates, study("acil", "strategy.gamma", {10.0: 0.8}, 10.0)])
    first, second = said.split("\n\n")
    assert first.splitlines()[2:] == ["| `er` |  | 25.0 | **50.0** |", "| `lora` | **40.0** |  |  |"]
    assert second.splitlines()[0] == "| arm, `strategy.gamma` | 10 |"
