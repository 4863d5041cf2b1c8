import math
import random
from xml.etree import ElementTree

import pytest

from prunella.report import charts
from prunella.report.charts import Mark

SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg):
    return ElementTree.fromstring(str(svg))


def titles(svg):
    return [title.text for title in parsed(svg).iter(f"{SVG}title")]


def test_a_heat_map_has_a_named_cell_for_each_value_and_an_empty_one_where_there_is_none():
    values = {("0", "q"): 0.1, ("1", "q"): 0.4, ("0", "k"): None}
    svg = charts.heat("errors", ["q", "k"], ["0", "1"], values, "{:.2f}".format)
    assert titles(svg) == ["errors", "block 0, q: 0.10", "block 1, q: 0.40", "block 0, k: dense", "block 1, k: dense"]
    shades = [
        float(cell.get("fill-opacity"))
        for cell in parsed(svg).iter(f"{SVG}rect")
        if len(cell) and cell.get("fill-opacity")
    ]
    assert shades == [0.06, 1.0]


def test_a_tiny_value_does_not_take_all_the_shades_of_a_logarithmic_heat_map():
    values = {(str(n), "q"): v for n, v in enumerate((1e-9, 0.01, 0.1))}
    svg = charts.heat("errors", ["q"], ["0", "1", "2"], values, "{:.0e}".format, log=True)
    shades = [float(cell.get("fill-opacity")) for cell in parsed(svg).iter(f"{SVG}rect") if len(cell)]
    assert shades == pytest.approx([0.06, 0.06 + 0.94 * 2 / 3, 1.0], abs=1e-3)
    assert "\u2264 1e-04" in str(svg)


def test_lines_leave_out_what_cannot_be_drawn():
    svg = charts.lines("t", {"a": [(0, 1.0), (1, math.nan), (2, 3.0)], "b": [(0, math.inf)], "c": [(1, 2.0)]}, "x", "y")
    lines = [line.get("points").split() for line in parsed(svg).iter(f"{SVG}polyline")]
    assert [len(line) for line in lines] == [2, 1]
    assert charts.lines("t", {"a": [(0, 0.0)]}, "x", "y", log=True) == ""
    assert charts.lines("t", {}, "x", "y") == ""


@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_few_round_and_inside(log):
    generator = random.Random(0)
    for _ in range(300):
        low = 10 ** generator.uniform(-6, 4)
        high = low * 10 ** generator.uniform(0, 6)
        ticks = charts._Scale([low, high], 0, 100, log).ticks()
        assert len(ticks) <= 8
        assert all(low * (1 - 1e-9) <= tick <= high * (1 + 1e-9) for tick in ticks)
        if high > 3 * low:
            assert len(ticks) >= 2 or log
        assert ticks or log


def test_histograms_of_nothing_are_not_drawn():
    assert charts.histogram("t", [0, 0], [0, 0], 4, "rms") == ""
    assert charts.histogram("t", [], [], 4, "rms") == ""
    assert titles(charts.histogram("t", [1, 3], [0, 2], 4, "rms")) == ["t"]


@pytest.mark.parametrize("more", [False, True])
def test_the_front_holds_exactly_the_marks_that_no_other_beats(more):
    generator = random.Random(1)
    marks = [Mark(str(n), "", generator.randint(0, 9), generator.randint(0, 9)) for n in range(40)]
    points = {(m.x, m.y) for m in marks}

    def beaten(x, y):
        return any((a >= x if more else a <= x) and b <= y and (a, b) != (x, y) for a, b in points)

    found = [(m.x, m.y) for m in charts.front(marks, more_is_better=more)]
    assert sorted(found) == sorted(p for p in points if not beaten(*p))


def test_a_scatter_plot_names_every_mark_and_labels_the_front():
    marks = [Mark("a, 50%", "a", 1, 10), Mark("b, 50%", "b", 1, 20), Mark("a, 70%", "a", 2, 5)]
    svg = charts.scatter("t", marks, charts.front(marks), "MB", "perplexity", log=True)
    assert titles(svg)[1:] == [m.label for m in marks]
    texts = [text.text for text in parsed(svg).iter(f"{SVG}text")]
    assert {"a, 50%", "a, 70%"} <= set(texts)
    assert "b, 50%" not in texts


def test_names_are_escaped_everywhere():
    evil = '<script>"&'
    mark = Mark(evil, evil, 1, 2)
    for svg in (
        charts.heat(evil, [evil], [evil], {(evil, evil): 1.0}, lambda _: evil),
        charts.lines(evil, {evil: [(0, 1)]}, evil, evil, lambda _: evil),
        charts.scatter(evil, [mark], [mark], evil, evil),
        charts.histogram(evil, [1], [1], 4, evil),
        charts.legend([evil]),
    ):
        assert "<script" not in svg
        parsed(svg)
