"""Progress on the screen: what a notebook shows, and the time that is said to be left."""

import re
from typing import Any

import pytest

from clplat.run import display
from clplat.run.display import Display
from clplat.stream import Experience, Kind


class Handle:
    """Stands for IPython's: keeps what was shown."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def update(self, data: dict[str, str], raw: bool) -> None:
        assert raw
        self.texts.append(data["text/plain"])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its number is the time."""
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def handles(monkeypatch: pytest.MonkeyPatch) -> list[Handle]:
    """The outputs that were opened in a cell; consoles believe that they are in a notebook."""
    import IPython.display

    made: list[Handle] = []

    def opened(data: Any, *, raw: bool, display_id: bool) -> Handle:
        made.append(Handle())
        return made[-1]

    monkeypatch.setattr(IPython.display, "display", opened)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    return made


def experience(index: int) -> Experience:
    return Experience(index, f"split_{index}", Kind.LEARN, (0,))


def test_a_notebook_shows_one_line_that_changes_and_ends_with_what_came_out(clock, handles, capsys):
    shown = Display("er, seed 0", 40, 2)
    shown.describe(experience(0))
    for step in range(1, 11):
        clock[0] += 1
        shown.advance(step)
    shown.show({"train/loss": 0.25})
    clock[0] += 1
    shown.advance(11)
    (handle,) = handles
    assert handle.texts[-1] == "er, seed 0  1/2 learn split_0  step 11 of 40  loss 0.250  [11 s, about 29 s left]"
    shown.advance(12)  # at the same moment: not drawn
    assert len(handle.texts) == 11
    shown.experience(1, {"average_accuracy": 0.5})
    assert handle.texts[-1] == "er, seed 0  1/2  average accuracy 0.500  [11 s, about 11 s left]"
    shown.experience(2, {"average_accuracy": 0.75, "forgetting": 0.1})
    shown.close()
    assert handle.texts[-1] == "er, seed 0  2/2  average accuracy 0.750, forgetting 0.100  [11 s]"
    assert len(handles) == 1
    assert capsys.readouterr() == ("", "")


def test_what_is_stopped_no_longer_says_that_time_is_left(clock, handles):
    shown = Display("er, seed 0", 40, 2)
    shown.describe(experience(0))
    clock[0] += 1
    shown.advance(1)
    shown.close()
    assert handles[0].texts[-1] == "er, seed 0  1/2 learn split_0  step 1 of 40    [1 s]"


def test_the_time_left_of_a_run_that_is_gone_on_with_counts_what_was_done_now(clock, handles, capsys, monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: False)
    shown = Display("er, seed 0", 100, 5)
    shown.describe(experience(3))  # three were done before
    clock[0] += 10
    shown.experience(4, {})
    assert re.search(r"4/5 .*\[10 s, about 10 s left\]", capsys.readouterr().err)
    shown.experience(5, {})
    assert "[10 s]" in capsys.readouterr().err


def test_lines_break_a_silence_of_a_minute_and_say_what_is_scored(clock, capsys):
    shown = Display("er, seed 0", 40, 2)
    shown.describe(experience(0))
    for step in range(1, 31):
        clock[0] += 5
        shown.advance(step)
    shown.experience(1, {})
    for done in range(0, 320, 32):
        clock[0] += 10
        shown.scoring(done, 320)
    assert capsys.readouterr().err.splitlines() == [
        "er, seed 0  1/2 learn split_0  step 13 of 40    [65 s, about 135 s left]",
        "er, seed 0  1/2 learn split_0  step 26 of 40    [130 s, about 70 s left]",
        "er, seed 0  1/2    [150 s, about 150 s left]",
        "er, seed 0  1/2 learn split_0  scoring 192 of 320  [220 s]",
    ]
