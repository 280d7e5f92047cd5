"""Plots as SVG, drawn by matplotlib: the same bytes for the same figures, legible on a light page and on a dark one.

A plot brings its own background. What matplotlib writes has the light colours; a style sheet in the file exchanges them
for dark ones where the reader prefers these, so that a plot can be read also where page and preference differ. What is
drawn is said by the caller; no figure is computed here.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["ours", "peer", "chain"]

WIDTH, COLUMNS, MARGIN, GAP = 900, 2, 16, 28
"""Pixels; panels stand next to each other in two columns."""
ROW, HEAD = 21, 46
"""Pixels of one bar, and of a panel's title with what is below it."""
LABELS, VALUES = 122, 74
"""Pixels left of the bars for the names, and right of them for the figures."""
LINES_HEIGHT, LINES_LABELS = 300, 140

CUT = 5.0
"""A bar longer than so many times the median bar is cut, and marked so: the others would be too short to compare."""

BACK, EDGE, TEXT, SOFT, GRID = "#ffffff", "#d1d9e0", "#1f2328", "#59636e", "#d8dee4"
KINDS: Final[Mapping[Kind, str]] = {"ours": "#4a90e2", "peer": "#9aa4ae", "chain": "#bf8700"}
LINES: Final = (
    *("#0a5bc4", "#b35900", "#1a7f37", "#8250df", "#bf3989"),
    *("#6e7781", "#9a6700", "#1b7c83", "#cf222e", "#4d2d00"),
)
DARK: Final = {
    **{BACK: "#0d1117", EDGE: "#3d444d", TEXT: "#f0f6fc", SOFT: "#9198a1", GRID: "#2a313c"},
    **{"#4a90e2": "#4493f8", "#9aa4ae": "#656c76", "#bf8700": "#d29922"},
    **{"#0a5bc4": "#4493f8", "#b35900": "#f0883e", "#1a7f37": "#3fb950", "#8250df": "#ab7df8", "#bf3989": "#f778ba"},
    **{"#6e7781": "#9ba3ab", "#9a6700": "#e3b341", "#1b7c83": "#39c5cf", "#cf222e": "#f85149", "#4d2d00": "#c9a26d"},
}
"""The colour on a dark background, by the colour on a light one."""


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
    rows = [panels[index : index + COLUMNS] for index in range(0, len(panels), COLUMNS)]
    heights = [HEAD + ROW * max(len(panel.bars) for panel in row) + MARGIN for row in rows]
    width = (WIDTH - 2 * MARGIN - GAP) / COLUMNS if len(panels) > 1 else WIDTH - 2 * MARGIN
    out = io.StringIO()
    with _drawing(sum(heights) + MARGIN, out) as drawing:
        for number, row in enumerate(rows):
            top = MARGIN + sum(heights[:number])
            for column, panel in enumerate(row):
                left = MARGIN + column * (width + GAP)
                room = width - LABELS - VALUES
                axes = drawing.axes(left + LABELS, top + HEAD, room, ROW * len(panel.bars))
                cut = _bars(axes, panel)
                said = filter(None, (f"{panel.better} is better", "what is cut is longer" if cut else "", panel.note))
                drawing.title(left, top, panel.title, ", ".join(said))
    return _with_dark_colours(out.getvalue())


def lines(charts: Sequence[Chart], x_title: str) -> str:
    """Lines over a logarithmic number; one chart per metric, two next to each other, the same colours in all."""
    names = list(dict.fromkeys(name for chart in charts for name in chart.lines))
    colours = {name: LINES[index % len(LINES)] for index, name in enumerate(names)}
    width = (WIDTH - 2 * MARGIN - GAP) / COLUMNS
    out = io.StringIO()
    with _drawing(MARGIN + -(-len(charts) // COLUMNS) * (LINES_HEIGHT + GAP), out) as drawing:
        for index, chart in enumerate(charts):
            left = MARGIN + (index % COLUMNS) * (width + GAP)
            top = MARGIN + (index // COLUMNS) * (LINES_HEIGHT + GAP)
            drawing.title(left, top, chart.title)
            if any(y > 0 for line in chart.lines.values() for y in line.values()):
                axes = drawing.axes(left + 52, top + 28, width - 52 - LINES_LABELS, LINES_HEIGHT - 68)
                _lines(axes, chart, colours, x_title)
    return _with_dark_colours(out.getvalue())


# -- what is drawn --------------------------------------------------------------------------------------------------


def _bars(axes: Axes, panel: Panel) -> bool:
    """Draw the bars of a panel, the first on top; whether one of them is cut."""
    limit = _limit([bar.most for bar in panel.bars])
    axes.set(xlim=(0, limit), ylim=(len(panel.bars) - 0.5, -0.5), xticks=[])
    axes.set_frame_on(False)
    axes.set_yticks(range(len(panel.bars)), [bar.name for bar in panel.bars], color=TEXT, fontsize=9)
    axes.tick_params(length=0, pad=6)
    for y, (bar, label) in enumerate(zip(panel.bars, axes.get_yticklabels(), strict=True)):
        weight = "bold" if bar.kind == "ours" else "normal"
        label.set_fontweight(weight)
        axes.barh(y, min(bar.median, limit), height=0.76, color=KINDS[bar.kind])
        if bar.median > limit:
            axes.plot([0.93, 0.97], [y + 0.5, y - 0.5], transform=axes.get_yaxis_transform(), color=BACK, lw=3)
            axes.lines[-1].set_gid(f"cut {panel.title}: {bar.name}")
        elif bar.most - bar.least > limit / 200:
            reach = [bar.least, min(bar.most, limit)]
            axes.plot(reach, [y, y], color=TEXT, lw=1, marker="|", ms=5, clip_on=False)
            axes.lines[-1].set_gid(f"whisker {panel.title}: {bar.name}")
        end = min(max(bar.most, bar.median), limit)
        axes.annotate(
            *(short(bar.median), (end, y)), xytext=(5, 0), textcoords="offset points", va="center_baseline",
            color=TEXT, fontsize=9, fontweight=weight, annotation_clip=False,
        )  # fmt: skip
    return any(bar.median > limit for bar in panel.bars)


def _limit(values: Sequence[float]) -> float:
    """Where bars end: at the longest that is not far beyond the others."""
    bound = CUT * statistics.median(values)
    return max((value for value in values if value <= bound), default=max(values)) or 1.0


def _lines(axes: Axes, chart: Chart, colours: Mapping[str, str], x_title: str) -> None:
    """Draw the lines of a chart; the names stand beside it in the order in which the lines end."""
    from matplotlib.ticker import LogLocator

    found = {name: {x: y for x, y in sorted(line.items()) if y > 0} for name, line in chart.lines.items()}
    ends = sorted((list(line.values())[-1], name) for name, line in found.items() if line)
    for _, name in reversed(ends):
        width = 2.4 if colours[name] == LINES[0] else 1.3
        marks: Any = {"marker": "o", "ms": 4.5, "markerfacecolor": BACK, "markeredgewidth": 1.5}
        axes.plot(*zip(*found[name].items(), strict=True), color=colours[name], lw=width, label=name, **marks)
    xs = sorted({x for line in found.values() for x in line})
    ys = [y for line in found.values() for y in line.values()]
    axes.set_xscale("log")
    axes.set_xticks(xs, [short(x) for x in xs])
    if max(ys) > 20 * min(ys):
        axes.set_yscale("log", subs=())
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    else:
        axes.set_ylim(0, max(ys) * 1.08)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    axes.set_xlabel(x_title, color=SOFT, fontsize=8.5)
    axes.tick_params(length=0, pad=5, labelcolor=SOFT, labelsize=8.5)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.set_frame_on(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, labelcolor=TEXT, fontsize=8.5)


# -- the file -------------------------------------------------------------------------------------------------------


class _Drawing:
    """A figure whose places are told in pixels from the left and from the top."""

    def __init__(self, figure: Figure, height: float) -> None:
        self._figure = figure
        self._height = height

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        at = (left / WIDTH, 1 - (top + height) / self._height, width / WIDTH, height / self._height)
        return self._figure.add_axes(at, facecolor="none")

    def title(self, left: float, top: float, title: str, said: str = "") -> None:
        x, y = left / WIDTH, 1 - top / self._height
        self._figure.text(x, y - 13 / self._height, title, color=TEXT, fontsize=10.5, fontweight="bold")
        if said:
            self._figure.text(x, y - 30 / self._height, said, color=SOFT, fontsize=8.5)


@contextmanager
def _drawing(height: float, out: io.StringIO) -> Iterator[_Drawing]:
    # Only a report with plots needs it, and it takes as long to import as the rest of a report to make.
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
        "svg.fonttype": "none",
        "svg.hashsalt": "arcbridge",
        "text.parse_math": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH / 100, height / 100), dpi=100, facecolor=BACK, edgecolor=EDGE, linewidth=1)
        yield _Drawing(figure, height)
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})


def _with_dark_colours(svg: str) -> str:
    rules = "".join(
        f'[style*="{what}: {light}"]{{{what}:{dark} !important}}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    )
    return svg.replace("</style>", f"@media (prefers-color-scheme:dark){{{rules}}}</style>", 1)
