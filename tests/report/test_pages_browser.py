"""Reports in a real browser, opened in all their parts: no text lies on another or is cut, at any width."""

from __future__ import annotations

import json

import pytest
from browsing import BOXES, browser
from mixed import mixed_config

import clplat
from clplat.report import write_report
from clplat.report.erasure import write_erasure

pytestmark = pytest.mark.browser

WIDTHS = (420, 1280, 1920)
OPEN = "document.querySelectorAll('details').forEach((part) => (part.open = true))"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as found:
        if found is None:
            pytest.skip("no Chromium on PATH")
        yield found


@pytest.fixture
def comparison(fabricate, tmp_path):
    """Three strategies under three seeds, on test sets two of which are of the same classes."""
    runs = [fabricate(strategy=s, seed=k) for s in ("er", "naive", "ilora") for k in range(3)]
    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        for i, experience in enumerate(summary["experiences"]):
            experience["title"] = f"zero, one, two, three, four and {max(i, 1)}"
        (run / "summary.json").write_text(json.dumps(summary))
    return write_report(runs, tmp_path / "out")


@pytest.fixture
def erasure(tmp_path):
    """The erasure report of a small run, compared with itself."""
    config = mixed_config(tmp_path / "runs")
    config["loop"] |= {"stop_after": 3}
    run_dir = clplat.run(config, quiet=True).run_dir
    return write_erasure(run_dir, run_dir)


@pytest.mark.parametrize("kind", ["comparison", pytest.param("erasure", marks=pytest.mark.slow)])
def test_no_text_lies_on_another_or_is_cut(chromium, request, kind):
    chromium.open(request.getfixturevalue(kind).as_uri())
    chromium.value(OPEN)
    for width in WIDTHS:
        chromium.resize(width)
        found = chromium.value(BOXES)
        assert found["faults"] == [], width
        assert (found["wide"], found["room"]) == (width, width)
        assert found["texts"] > 100
    assert chromium.complaints() == []
    assert chromium.asked() == []
