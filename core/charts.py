"""Curves as SVG charts: positions of points, axes with round numbers, line styles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

LEFT, RIGHT, TOP, BOTTOM = 44, 320, 10, 146  # plot area in a chart of 340 by 170
MAX_POINTS = 100  # maximum groups of neighbouring points in a curve
# Coprime, so that the first 30 lines of a chart all differ.
NUM_COLOURS, NUM_DASHES = 6, 5

Point = tuple[float, float]  # (step, value)


@dataclass
class Line:
    name: str
    number: int  # selects colour and dashes
    is_evaluation: bool  # few points, each with a marker
    points: list[Point]
    positions: list[tuple[str, str]] = field(default_factory=list)  # (x, y) in the chart

    @property
    def look(self) -> str:
        """CSS classes. Lines differ by dashes too, for people who cannot distinguish colours."""
        return f"c{self.number % NUM_COLOURS} d{self.number % NUM_DASHES}"

    @property
    def last_value(self) -> float:
        return self.points[-1][1]


@dataclass
class Chart:
    title: str
    notes: list[tuple[str, str]]  # (metric, what it means); the name is empty if it is the title
    lines: list[Line]
    x_ticks: list[tuple[str, str]]  # (position, label)
    y_ticks: list[tuple[str, str]]


def build_chart(title: str, notes: list[tuple[str, str]], lines: list[Line]) -> Chart:
    """A chart of lines with their positions, and axes with round numbers."""
    steps, values = [], []
    for line in lines:
        steps += [step for step, _ in line.points]
        values += [value for _, value in line.points]
    first, last = min(steps), max(steps)
    y_numbers = round_numbers(min(values), max(values))
    bottom, top = y_numbers[0], y_numbers[-1]
    width = (last - first) or 1  # in steps
    height = top - bottom

    def x_of(step: float) -> str:
        x = LEFT + (RIGHT - LEFT) * (step - first) / width
        return f"{x:.1f}"

    def y_of(value: float) -> str:
        y = BOTTOM - (BOTTOM - TOP) * (value - bottom) / height
        return f"{y:.1f}"

    for line in lines:
        for step, value in thin_out(line.points):
            line.positions.append((x_of(step), y_of(value)))
    x_ticks = []
    for step in round_numbers(first, last):
        if first <= step <= last and step == int(step):
            x_ticks.append((x_of(step), f"{step:,.0f}"))
    y_ticks = [(y_of(value), f"{value:,.6g}") for value in y_numbers]
    return Chart(title, notes, lines, x_ticks, y_ticks)


def thin_out(points: Sequence[Point]) -> list[Point]:
    """The lowest and the highest point in each group of neighbours of a long curve, so that no
    spike is lost."""
    size = math.ceil(len(points) / MAX_POINTS)
    visible: list[Point] = []
    for start in range(0, len(points), size):
        neighbours = points[start : start + size]
        lowest = min(neighbours, key=value_of)
        highest = max(reversed(neighbours), key=value_of)
        visible += sorted({lowest, highest})  # by step
    return visible


def value_of(point: Point) -> float:
    return point[1]


def round_numbers(low: float, high: float) -> list[float]:
    """At most about five round numbers from below `low` to above `high`, spaced by 1, 2 or 5 times
    a power of ten."""
    span = (high - low) or abs(low) or 1
    smallest = span / 4.1
    power = 10.0 ** math.floor(math.log10(smallest))
    step = power
    for factor in (2, 5, 10):
        if step <= smallest:
            step = factor * power
    tolerance = 1e-6  # of a step, against rounding
    first = math.floor(low / step + tolerance)
    last = math.ceil(high / step - tolerance)
    last = max(last, first + 1)
    return [step * n for n in range(first, last + 1)]
