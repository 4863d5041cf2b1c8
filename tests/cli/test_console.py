from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from prunella.cli import console
from prunella.cli.console import clock, meter, print_table, track


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_progress_is_a_line_now_and_then_with_the_time_left(time: Any, capsys: Any) -> None:
    for _ in track(range(5), "pruning", 5):
        time[0] += 30
    assert capsys.readouterr().err.splitlines() == [
        "prunella: pruning: 1 of 5 blocks, 0:30 elapsed, 2:00 left",
        "prunella: pruning: 2 of 5 blocks, 1:00 elapsed, 1:30 left",
        "prunella: pruning: 3 of 5 blocks, 1:30 elapsed, 1:00 left",
        "prunella: pruning: 4 of 5 blocks, 2:00 elapsed, 0:30 left",
        "prunella: pruning: 5 of 5 blocks, 2:30 elapsed, 0:00 left",
    ]


def test_what_is_quick_is_not_told(time: Any, capsys: Any) -> None:
    for _ in track(range(90), "pruning", 90):
        time[0] += 0.1
    assert capsys.readouterr().err == ""
    for _ in track(range(90), "pruning", 90):
        time[0] += 1
    assert len(capsys.readouterr().err.splitlines()) == 9


def test_training_is_timed_from_its_first_step(time: Any, capsys: Any) -> None:
    with meter() as tell:
        time[0] += 3600  # pruning, say
        tell(1, 101, None)
        time[0] += 20
        tell(11, 101, 3.25)
        time[0] += 3600
        tell(1, 101, 4.0)  # another round
        time[0] += 20
        tell(2, 101, None)
    assert capsys.readouterr().err.splitlines() == [
        "prunella: healing: 11 of 101 steps, loss 3.250, 0:20 elapsed, 3:00 left",
        "prunella: healing: 2 of 101 steps, 0:20 elapsed, 33:00 left",
    ]


def test_one_of_several_processes_speaks(time: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    for _ in track(range(2), "pruning", 2):
        time[0] += 30
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_for_each_loop_and_none_is_left_running(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, force_interactive=True, width=100)
    monkeypatch.setattr(console, "err", terminal)
    with meter() as tell:
        for _ in track(range(3), "pruning", 3):
            pass
        for step in (1, 2):
            tell(step, 2, 1.5)
        for _ in track(range(3), "evaluating", 3):
            pass
        tell(1, 2, None)
    assert all(word in shown.getvalue() for word in ("pruning", "3/3", "healing", "2/2", "loss 1.500", "evaluating"))
    assert not terminal._live_stack


def test_a_narrow_terminal_still_shows_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=shown, force_terminal=True, force_interactive=True, width=60))
    for _ in track(range(3), "perplexity", 3):
        pass
    assert "…" not in shown.getvalue()


def test_a_table_sends_nothing_that_a_terminal_would_obey(capsys: Any) -> None:
    print_table(("a",), [("\x1b[2Jone\x07",), ("two\nlines [b]",)])
    shown = capsys.readouterr().out
    assert not {"\x1b", "\x07"} & set(shown)
    assert "\N{REPLACEMENT CHARACTER}[2Jone" in shown
    assert "lines [b]" in shown


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (11045, "3:04:05")])
def test_seconds_are_read_like_a_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown
