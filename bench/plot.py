"""Plots as SVG, written by hand: the same bytes for the same figures, legible on a light page and on a dark one.

Each plot brings its own background and takes both its colours from the reader's preference, so that it can be read
also where page and preference differ.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.sax.saxutils import escape

Kind = Literal["ours", "peer", "chain"]

WIDTH = 900
COLUMNS = 2
MARGIN = 16
GAP = 28
ROW = 21
LABELS = 122
"""Width of the names left of the bars."""
VALUES = 74
"""Width of the figures right of them."""
HEAD = 46
"""Height of a panel's title and what is below it."""

CUT = 5.0
"""A bar longer than so many times the median bar is cut, and marked so: the others would be too short to compare."""

LINES_HEIGHT = 300
LINES_LABELS = 118

STYLE = """
.back{fill:#ffffff;stroke:#d1d9e0}.text{fill:#1f2328}.soft{fill:#59636e}.grid{stroke:#d8dee4}
.ours{fill:#4a90e2}.peer{fill:#9aa4ae}.chain{fill:#bf8700}.whisker{stroke:#1f2328}.gap{stroke:#ffffff}
.line{fill:none}
.c0{stroke:#0a5bc4}.c1{stroke:#b35900}.c2{stroke:#1a7f37}.c3{stroke:#8250df}.c4{stroke:#bf3989}
.c5{stroke:#59636e}.c6{stroke:#9a6700}.c7{stroke:#1b7c83}.c8{stroke:#cf222e}.c9{stroke:#4d2d00}
@media (prefers-color-scheme:dark){
.back{fill:#0d1117;stroke:#3d444d}.text{fill:#f0f6fc}.soft{fill:#9198a1}.grid{stroke:#2a313c}
.ours{fill:#4493f8}.peer{fill:#656c76}.chain{fill:#d29922}.whisker{stroke:#f0f6fc}.gap{stroke:#0d1117}
.c0{stroke:#4493f8}.c1{stroke:#f0883e}.c2{stroke:#3fb950}.c3{stroke:#ab7df8}.c4{stroke:#f778ba}
.c5{stroke:#9198a1}.c6{stroke:#d29922}.c7{stroke:#39c5cf}.c8{stroke:#f85149}.c9{stroke:#d4a72c}}
"""

COLOURS = 10


@dataclass(frozen=True, slots=True)
class Bar:
    """One system's median and the spread of its runs."""

    name: str
    median: float
    least: float
    most: float
    kind: Kind = "peer"


@dataclass(frozen=True, slots=True)
class Panel:
    """One metric of all systems, the best first."""

    title: str
    better: Literal["higher", "lower"]
    bars: tuple[Bar, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """One metric against a growing number: `lines[name] = {x: y}`."""

    title: str
    lines: Mapping[str, Mapping[int, float]]


def short(value: float) -> str:
    """A figure for people: three digits, thousands apart."""
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u00a0")  # a space that does not break
    return f"{value:.3g}"


def bars(panels: Sequence[Panel]) -> str:
    """Bars with whiskers from the least to the most of the runs; one panel per metric, two next to each other."""
    width = (WIDTH - 2 * MARGIN - GAP) / COLUMNS if len(panels) > 1 else WIDTH - 2 * MARGIN
    drawn: list[str] = []
    top = float(MARGIN)
    for row in range(0, len(panels), COLUMNS):
        both = panels[row : row + COLUMNS]
        for column, panel in enumerate(both):
            drawn += _panel(panel, MARGIN + column * (width + GAP), top, width)
        top += HEAD + ROW * max(len(panel.bars) for panel in both) + MARGIN
    return _svg(top, drawn)


def lines(charts: Sequence[Chart], x_title: str) -> str:
    """Lines over a logarithmic number; one chart per metric, two next to each other, the same colours in all."""
    names = list(dict.fromkeys(name for chart in charts for name in chart.lines))
    colours = {name: f"c{index % COLOURS}" for index, name in enumerate(names)}
    width = (WIDTH - 2 * MARGIN - GAP) / COLUMNS
    drawn: list[str] = []
    for index, chart in enumerate(charts):
        column, row = index % COLUMNS, index // COLUMNS
        drawn += _chart(
            chart, MARGIN + column * (width + GAP), MARGIN + row * (LINES_HEIGHT + GAP), width, colours, x_title
        )
    return _svg(MARGIN + math.ceil(len(charts) / COLUMNS) * (LINES_HEIGHT + GAP), drawn)


# -- bars -----------------------------------------------------------------------------------------------------------


def _panel(panel: Panel, left: float, top: float, width: float) -> list[str]:
    zero, room = left + LABELS, width - LABELS - VALUES
    limit = _limit([bar.most for bar in panel.bars])
    cut = "what is cut is longer" if any(bar.median > limit for bar in panel.bars) else ""
    said = ", ".join(filter(None, (f"{panel.better} is better", cut, panel.note)))
    drawn = [
        _text(left, top + 13, panel.title, "text", size=14, weight=600),
        _text(left, top + 30, said, "soft", size=11),
    ]
    for index, bar in enumerate(panel.bars):
        y = top + HEAD + index * ROW
        middle = y + ROW / 2 - 2
        length = room * min(bar.median / limit, 1.0)
        weight = 700 if bar.kind == "ours" else 400
        drawn.append(_text(zero - 8, middle + 4, bar.name, "text", anchor="end", weight=weight))
        drawn.append(
            f'<rect class="{bar.kind}" x="{zero:.1f}" y="{y:.1f}" width="{length:.1f}" height="{ROW - 5}" rx="2"/>'
        )
        if bar.median > limit:
            drawn.append(
                f'<path class="gap" stroke-width="4" d="M{zero + room - 22:.1f} {y + ROW - 2:.1f}l8 {-ROW - 2:.1f}"/>'
            )
        else:
            drawn += _whisker(zero, room, limit, bar, middle)
        end = zero + room * min(max(bar.most, bar.median) / limit, 1.0)
        drawn.append(_text(end + 7, middle + 4, short(bar.median), "text", weight=weight))
    return drawn


def _whisker(zero: float, room: float, limit: float, bar: Bar, middle: float) -> list[str]:
    least, most = (zero + room * min(value / limit, 1.0) for value in (bar.least, bar.most))
    if most - least < 1:
        return []
    return [
        f'<path class="whisker" stroke-width="1.3" '
        f'd="M{least:.1f} {middle:.1f}H{most:.1f}M{least:.1f} {middle - 4:.1f}v8M{most:.1f} {middle - 4:.1f}v8"/>'
    ]


def _limit(values: Sequence[float]) -> float:
    """Where bars end: at the longest that is not far beyond the others."""
    bound = CUT * statistics.median(values)
    return max((value for value in values if value <= bound), default=max(values)) or 1.0


# -- lines ----------------------------------------------------------------------------------------------------------


def _chart(chart: Chart, left: float, top: float, width: float, colours: Mapping[str, str], x_title: str) -> list[str]:
    xs = sorted({x for line in chart.lines.values() for x in line})
    ys = [y for line in chart.lines.values() for y in line.values() if y > 0]
    drawn = [_text(left, top + 13, chart.title, "text", size=14, weight=600)]
    if not xs or not ys:
        return drawn
    steep = max(ys) > 20 * min(ys)
    x0, x1 = left + 52, left + width - LINES_LABELS
    y0, y1 = top + LINES_HEIGHT - 40, top + 30
    ticks = _decades(min(ys), max(ys)) if steep else _steps(max(ys))
    low, high = (math.log(ticks[0]), math.log(ticks[-1])) if steep else (0.0, ticks[-1])

    def at_x(x: float) -> float:
        span = math.log(xs[-1] / xs[0]) or 1.0
        return x0 + (x1 - x0) * math.log(x / xs[0]) / span

    def at_y(y: float) -> float:
        return y0 - (y0 - y1) * ((math.log(y) if steep else y) - low) / (high - low)

    for tick in ticks:
        drawn.append(f'<path class="grid" d="M{x0:.1f} {at_y(tick):.1f}H{x1:.1f}"/>')
        drawn.append(_text(x0 - 7, at_y(tick) + 4, short(tick), "soft", anchor="end", size=11))
    for x in xs:
        drawn.append(_text(at_x(x), y0 + 17, short(x), "soft", anchor="middle", size=11))
    drawn.append(_text((x0 + x1) / 2, y0 + 34, x_title, "soft", anchor="middle", size=11))
    ends: list[tuple[float, str]] = []
    for name, line in chart.lines.items():
        points = [(at_x(x), at_y(y)) for x, y in sorted(line.items()) if y > 0]
        if not points:
            continue
        colour, thick = colours[name], 3 if colours[name] == "c0" else 1.6
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        drawn.append(f'<path class="line {colour}" stroke-width="{thick}" d="M{path}"/>')
        drawn += [
            f'<circle class="back {colour}" stroke-width="2" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points
        ]
        ends.append((points[-1][1], name))
    for y, name in _apart(ends, 14, top + LINES_HEIGHT - 40):
        drawn.append(f'<path class="line {colours[name]}" stroke-width="3" d="M{x1 + 9:.1f} {y:.1f}h10"/>')
        drawn.append(_text(x1 + 23, y + 4, name, "text", size=11, weight=700 if colours[name] == "c0" else 400))
    return drawn


def _decades(least: float, most: float) -> list[float]:
    first, last = math.floor(math.log10(least)), math.ceil(math.log10(most))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def _steps(most: float) -> list[float]:
    rough = most / 4
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough)
    return [step * index for index in range(math.ceil(most / step - 1e-9) + 1)]


def _apart(ends: Sequence[tuple[float, str]], distance: float, lowest: float) -> list[tuple[float, str]]:
    """Names at the heights of their lines' ends, moved so that they do not cover each other."""
    placed: list[tuple[float, str]] = []
    for y, name in sorted(ends):
        placed.append((max(y, placed[-1][0] + distance) if placed else y, name))
    over = placed[-1][0] - lowest if placed else 0.0
    if over > 0:
        limit = lowest
        for index in range(len(placed) - 1, -1, -1):
            y, name = placed[index]
            placed[index] = (min(y, limit), name)
            limit = placed[index][0] - distance
    return placed


# -- SVG ------------------------------------------------------------------------------------------------------------


def _text(
    x: float, y: float, text: str, colour: str, *, anchor: str = "start", size: int = 12, weight: int = 400
) -> str:
    return (
        f'<text class="{colour}" x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )


def _svg(height: float, drawn: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
            f"height=\"{height:.0f}\" font-family=\"system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif\">",
            f"<style>{STYLE.strip()}</style>",
            f'<rect class="back" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:.0f}" rx="6"/>',
            *drawn,
            "</svg>",
            "",
        ]
    )
