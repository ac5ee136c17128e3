import json
from html import unescape
from xml.etree import ElementTree

import pytest

from first_stage.report.charts import (
    Series,
    histogram,
    line_chart,
    number,
    share_chart,
    ticks,
)


def svg_of(figure: str) -> ElementTree.Element:
    return ElementTree.fromstring(figure[figure.index("<svg") : figure.index("</svg>") + 6])


def data_of(figure: str) -> dict:
    start = figure.index('data-chart="') + len('data-chart="')
    return json.loads(unescape(figure[start : figure.index('"', start)]))


def points_of(figure: str) -> list[tuple[float, float]]:
    line = next(e for e in svg_of(figure).iter() if e.tag == "polyline")
    return [tuple(map(float, p.split(","))) for p in line.get("points", "").split()]


def test_points_lie_where_their_values_are() -> None:
    figure = line_chart("Loss", [Series("a", [(0, 0.0), (50, 5.0), (100, 10.0)])], "step", (0, 10))
    (x0, y0), (x1, y1), (x2, y2) = points_of(figure)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y2  # up is less in SVG


def test_logarithmic_where_values_span_decades() -> None:
    figure = line_chart("KL", [Series("a", [(0, 1.0), (1, 100.0), (2, 10000.0)])], "step")
    ys = [y for _, y in points_of(figure)]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert "Logarithmic" in figure
    assert "Logarithmic" not in line_chart("x", [Series("a", [(0, 1.0), (1, 2.0)])], "step")


def test_gaps_zeros_and_lone_points_do_not_break_a_chart() -> None:
    assert line_chart("x", [Series("a", [])], "step") == ""
    assert line_chart("x", [Series("a", [(0, None)])], "step") == ""
    assert len(points_of(line_chart("x", [Series("a", [(0, 1.0), (1, None), (2, 1.0)])], "s"))) == 2
    assert "<circle" in line_chart("x", [Series("a", [(5, 1.0)])], "step")
    constant = line_chart("x", [Series("a", [(0, 0.0), (1, 0.0)])], "step")
    svg_of(constant)
    svg_of(line_chart("x", [Series("a", [(0, 0.0), (1, 1e-9), (2, 1.0)])], "s", log=True))


def test_long_runs_are_thinned_to_means() -> None:
    points = [(float(k), float(k % 2)) for k in range(10_000)]
    found = data_of(line_chart("x", [Series("a", points)], "step"))["series"][0]["points"]
    assert len(found) <= 240
    assert found[-1][0] == 9999
    assert all(0.4 < y < 0.6 for _, y in found)


def test_shares_are_stacked_to_the_whole() -> None:
    figure = share_chart(
        "Share", [Series("a", [(0, 0.25), (1, 1.0)]), Series("b", [(0, 0.75)], 1)], "step"
    )
    lower, upper = (e for e in svg_of(figure).iter() if e.tag == "polygon")
    ys = [[float(p.split(",")[1]) for p in e.get("points", "").split()] for e in (lower, upper)]
    base, top = max(ys[0]), min(ys[1])
    assert ys[1][0] == top  # a + b is all at step 0
    assert ys[0][0] == pytest.approx(base - 0.25 * (base - top), abs=0.2)


def test_titles_are_escaped() -> None:
    figure = line_chart("<script>", [Series('"&', [(0, 1.0), (1, 2.0)])] * 2, "<b>")
    assert "<script>" not in figure
    assert data_of(figure)["series"][0]["name"] == '"&'
    svg_of(figure)
    svg_of(histogram([1, 2, 0], -1, 1, 'a "<'))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 900, [0, 200, 400, 600, 800]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)  # fmt: skip
def test_ticks_are_round(low, high, expected) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_ticks_of_decades() -> None:
    assert ticks(1, 1000, log=True) == [1, 10, 100, 1000]
    assert len(ticks(2, 9, log=True)) >= 1
    assert len(ticks(1e-12, 1e6, log=True)) <= 7


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (1234.5, "1234"), (45_000, "45k"), (5_000, "5000"),
     (8.37e7, "83.7M"), (0.00012, "1.2e-4"), (-2.5, "-2.5"), (0.1 + 0.2, "0.3")],
)  # fmt: skip
def test_numbers_are_short(value, text) -> None:
    assert number(value) == text
