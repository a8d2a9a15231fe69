"""The report in a real browser: it draws, its script runs, it asks the network for nothing, in the sandbox too."""

import json
import re
import shutil
import subprocess

import pytest
from mixed import mixed_config

import clplat
from clplat.report import write_report
from clplat.report.erasure import write_erasure

pytestmark = pytest.mark.browser

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--enable-logging=stderr",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--v=0",
         "--virtual-time-budget=3000")  # fmt: skip


def requested(log):
    """URLs over the network with an origin behind them; the browser's own requests say "not an origin"."""
    try:
        events = json.loads(log)["events"]
    except ValueError:  # not closed when the browser went
        events = json.loads(log.rstrip().rstrip(",") + "]}")["events"]
    starts = [e["params"] for e in events if "initiator" in e.get("params", {})]
    return {p["url"] for p in starts if p["initiator"] != "not an origin" and p["url"].startswith("http")}


@pytest.fixture
def chromium(tmp_path):
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on PATH")

    def open_page(page, *options):
        """The DOM after scripts, console messages, and the URLs that the page (not the browser itself) asked for."""
        log = tmp_path / "net.json"
        call = [program, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", *options]
        done = subprocess.run([*call, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return done.stdout, console, requested(log.read_text())

    return open_page


@pytest.fixture
def page(fabricate, tmp_path):
    runs = [fabricate(strategy=s, seed=k) for s in ("er", "naive", "ilora") for k in range(3)]
    return write_report(runs, tmp_path / "out")


def test_it_draws_without_errors_or_requests(chromium, page):
    dom, console, urls = chromium(page, "--dump-dom")
    assert console == []
    assert urls == set()
    assert dom.count('role="img"') > 12
    assert dom.count('class="tip off"') == 1  # the script ran under the page's own policy
    assert "data-tip=" in dom
    assert "<polyline" in dom


OUTSIDE = """<script>
for (const card of document.querySelectorAll(".card"))
    for (const text of card.querySelectorAll("svg .t"))
        if (text.getBoundingClientRect().left < card.getBoundingClientRect().left + 8)
            console.error("outside: " + text.textContent)
</script>"""


@pytest.mark.parametrize("width", [420, 1280])
def test_no_text_of_a_figure_leaves_its_card(chromium, fabricate, tmp_path, width):
    runs = [fabricate(seed=k) for k in range(3)]
    for run in runs:
        facts = (run / "summary.json").read_text()
        (run / "summary.json").write_text(re.sub(r'"digits (\d), \d"', r'"rotated_\1_22deg"', facts))
    page = write_report(runs, tmp_path / "out")
    page.write_text(page.read_text().replace("http-equiv", "data-was") + OUTSIDE)
    _, console, _ = chromium(page, "--dump-dom", f"--window-size={width},2000")
    assert console == []


def test_the_legend_hides_a_strategy_in_every_figure(chromium, page, tmp_path):
    clicked = tmp_path / "clicked.html"
    content = page.read_text().replace("http-equiv", "data-was")  # the policy would refuse the test's own script
    clicked.write_text(content + "<script>document.querySelector('.legend button').click()</script>")
    dom, console, _ = chromium(clicked, "--dump-dom")
    assert console == []
    drawn = page.read_text().count('data-g="0"') - 2  # all but the button and the row of results
    assert len(re.findall(r'class="[^"]* off" data-g="0"', dom)) == drawn > 5
    assert not re.search(r'class="[^"]* off" data-g="1"', dom)
    assert len(re.findall(r'<button[^>]* aria-pressed="false"', dom)) == 1


def test_a_request_or_an_error_would_be_seen(chromium, tmp_path):
    page = tmp_path / "leaky.html"
    page.write_text('<img src="http://clplat.invalid/x.png"><script>console.error("bad")</script>')
    _, console, urls = chromium(page, "--dump-dom")
    assert urls == {"http://clplat.invalid/x.png"}
    assert any("bad" in line for line in console)


def test_it_works_in_a_sandboxed_frame(chromium, page, tmp_path):
    outer = tmp_path / "outer.html"
    outer.write_text(f'<iframe sandbox="allow-scripts" src="{page.as_uri()}" width="900" height="900"></iframe>')
    shot = tmp_path / "shot.png"
    # In a process of its own the frame may be painted only after the picture is taken.
    one_process = ("--disable-site-isolation-trials", "--disable-features=IsolateSandboxedIframes")
    _, console, urls = chromium(outer, f"--screenshot={shot}", "--window-size=920,920", *one_process)
    assert console == []
    assert urls == set()
    from matplotlib.image import imread

    pixels = imread(shot)
    assert len({tuple(p) for p in (pixels[::7, ::7, :3] * 255).astype(int).reshape(-1, 3)}) > 10


@pytest.fixture
def erasure(tmp_path):
    """The erasure report of a small run, compared with itself."""
    config = mixed_config(tmp_path / "runs")
    config["loop"] |= {"stop_after": 3}
    run_dir = clplat.run(config, quiet=True).run_dir
    return write_erasure(run_dir, run_dir)


def test_the_erasure_report_draws_without_errors_or_requests(chromium, erasure):
    dom, console, urls = chromium(erasure, "--dump-dom")
    assert console == []
    assert urls == set()
    assert dom.count("<polyline") >= 2
    assert "data-tip=" in dom
    assert dom.count('class="tip off"') == 1


@pytest.mark.parametrize("width", [500, 1280])
def test_nothing_of_the_erasure_report_sticks_out(chromium, erasure, tmp_path, width):
    """The page itself does not scroll sideways: wide tables scroll in their frames. 500: no window is narrower."""
    measured = tmp_path / "measured.html"
    script = "document.title = document.documentElement.scrollWidth + ' in ' + innerWidth"
    content = erasure.read_text().replace("http-equiv", "data-was")
    measured.write_text(f"{content}<script>{script}</script>")
    dom, console, _ = chromium(measured, "--dump-dom", f"--window-size={width},900")
    assert console == []
    inner, outer = map(int, re.search(r"<title>(\d+) in (\d+)</title>", dom).groups())
    assert outer == width
    assert inner <= outer


def test_the_erasure_report_prints_all_it_holds(chromium, erasure, tmp_path):
    """Closed parts too."""
    content = erasure.read_text()
    closed = tmp_path / "closed.html"
    closed.write_text(content.replace("<details open>", "<details>"))
    pages = []
    for name, page in (("open", erasure), ("closed", closed)):
        file = tmp_path / f"{name}.pdf"
        chromium(page, f"--print-to-pdf={file}", "--no-pdf-header-footer")
        pages.append(len(re.findall(rb"/Type\s*/Page\b", file.read_bytes())))
    assert pages[0] == pages[1] > 1
