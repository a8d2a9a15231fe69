"""The dashboard in a real browser: every plot has data, no text lies on another or is cut, at any width."""

import pytest
from browsing import BOXES, browser

from clplat.report.dashboard import Folders
from clplat.report.dashboard_served import write_dashboard

pytestmark = pytest.mark.browser

WIDTHS = (420, 1280, 1920)
# Panels that draw nothing: neither lines nor marks nor bars nor cells with a position.
EMPTY = """[...document.querySelectorAll(".panel svg")].filter((svg) =>
  ![...svg.querySelectorAll(".line, .dot, .bar, .heat")].some((e) => e.getBoundingClientRect().width > 0)
).map((svg) => svg.getAttribute("aria-label"))"""
NAMELESS = """[...document.querySelectorAll("svg[role=img], select, [role=region], [role=group], nav, form")]
  .filter((e) => !(e.getAttribute("aria-label") || e.closest("label"))).length"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as found:
        if found is None:
            pytest.skip("no Chromium on PATH")
        yield found


@pytest.fixture(scope="module")
def page(all_kinds, tmp_path_factory):
    return write_dashboard(Folders([all_kinds]), {}, tmp_path_factory.mktemp("page") / "page.html").as_uri()


def test_every_plot_has_data_and_no_text_lies_on_another_or_is_cut(chromium, page):
    chromium.open(page)
    assert chromium.value(EMPTY) == []
    assert chromium.value("document.querySelectorAll('.panel svg').length") > 60
    assert chromium.value(NAMELESS) == 0
    for width in WIDTHS:
        chromium.resize(width)
        found = chromium.value(BOXES)
        assert found["faults"] == [], width
        assert (found["wide"], found["room"]) == (width, width)
        assert found["texts"] > 1000
    assert chromium.complaints() == []
    assert chromium.asked() == []


def test_its_own_measure_sees_what_is_wrong(chromium, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<p style='position:absolute;left:0;top:0'>one<p style='position:absolute;left:4px;top:5px'>two"
                    "<p style='position:absolute;left:1200px;width:300px'>three three three</p>"
                    "<div class=panel><svg aria-label=x></svg></div><script>console.error('bad')</script>"
                    "<img src='data:image/png;base64,x'>")  # fmt: skip
    chromium.open(page.as_uri(), 1280)
    assert {f.partition(":")[0] for f in chromium.value(BOXES)["faults"]} == {"overlap", "cut"}
    assert chromium.value(EMPTY) == ["x"]
    assert any("bad" in line for line in chromium.complaints())


def test_a_choice_hides_what_does_not_match_and_says_what_it_cannot_split(chromium, page):
    chromium.open(page)
    shown = "[...document.querySelectorAll('%s')].filter((e) => e.getBoundingClientRect().width > 0).length"
    pick = "(() => { const s = document.querySelector('[name=%s]'); s.value = '%s'; s.form.requestSubmit(); })()"
    status = "document.querySelector('[role=status]').textContent"
    rows = chromium.value(shown % "#runs tbody tr")
    chromium.value(pick % ("strategy", "er"))
    assert chromium.value(shown % ".board tbody tr") == 1
    assert chromium.value(shown % ".stream") == 2  # digits and images
    drawn = chromium.value((shown % "#stream-0 .panel .s").replace(".length", ".map((e) => e.dataset.g)"))
    assert len(drawn) > 5
    assert len(set(drawn)) == 1
    assert chromium.value(shown % "#runs tbody tr") == 6 < rows
    chromium.value(pick % ("commit", "a" * 10))
    assert chromium.value(status).startswith("2 of 15 entries")
    chromium.value(pick % ("strategy", "naive"))  # each of its two groups has one run of another commit
    assert chromium.value(status).startswith("0 of 15 entries")
    assert "2 more have some" in chromium.value(status)
    assert chromium.value(shown % "#runs tbody tr") == 4
    for facet in ("strategy", "commit"):
        chromium.value(pick % (facet, ""))
    assert chromium.value(shown % "#runs tbody tr") == rows
    assert chromium.complaints() == []


def test_the_keyboard_reaches_fields_tables_and_legends_in_order(chromium, page):
    chromium.open(page)
    reached = []
    for _ in range(14):
        for kind in ("rawKeyDown", "keyUp"):
            chromium.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        reached.append(chromium.value("(({ activeElement: e }) => e.name || e.ariaLabel || e.tagName)(document)"))
    assert reached[:5] == ["stream", "strategy", "commit", "tag", "BUTTON"]
    assert "Leaderboard" in reached
    ring = "getComputedStyle(document.activeElement).outlineStyle"
    assert chromium.value(ring) == "solid"


def test_light_and_dark_are_both_readable(chromium, page):
    ratio = """(() => {
      const light = (c) => c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
        .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
      const of = (e, what) => light(getComputedStyle(e)[what]);
      const ground = of(document.querySelector(".card"), "backgroundColor");
      return Math.min(...[...document.querySelectorAll(".card .why, .card td, .card caption, .card .t")].map((e) => {
        const ink = of(e, e.ownerSVGElement ? "fill" : "color");
        return e.matches(".v, .chip *") ? 99 : (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
      }));
    })()"""
    grounds = set()
    for dark in (False, True):
        chromium.open(page, dark=dark)
        assert chromium.value(ratio) >= 4.5
        grounds.add(chromium.value("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2
