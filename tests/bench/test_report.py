"""The report and its plots, from a made-up result."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bench.goals import goals
from bench.machine import REPOSITORY, neutral
from bench.plot import BACK, DARK, Bar, Chart, Panel, bars, lines, short
from bench.report import goal_lines, plots, report, write
from tests.bench.synthetic import SCENARIOS, result

SVG = "{http://www.w3.org/2000/svg}"


def words(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_the_same_result_makes_the_same_bytes(tmp_path: Path) -> None:
    first, second = write(result(), tmp_path / "a"), write(result(), tmp_path / "b")
    names = sorted(file.name for file in first.parent.iterdir())
    assert names == sorted(["report.md", *(f"{name}.svg" for name in SCENARIOS)])
    for name in names:
        assert (first.parent / name).read_bytes() == (second.parent / name).read_bytes()
    text = first.read_text()
    for name in names[:-1]:
        if name.endswith(".svg"):
            assert f"]({name})" in text


def test_goals_come_first_and_what_is_missing_is_said_before_them() -> None:
    text = report(result())
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings[:3] == ["# Benchmark", "## Goals", "## bulk"]
    assert headings[-3:] == ["## Systems", "## Left out", "## Failures"]
    assert text.index("**Left out: konnectivity**") < text.index("## Goals")
    assert text.index("**1 measurements failed**") < text.index("## Goals")
    row = next(line for line in text.splitlines() if line.startswith("| **P1**"))
    assert row.endswith(
        "| 900 MB/s | rathole-stunnel: 600 MB/s (beside: rathole-tls, which has no client: 650 MB/s) "
        "| 1.50 × | ≥ 1.5 × the best peer | **yes** |"
    )
    assert "* konnectivity: needs go \\| apt-get install golang" in text, "a bar would end a cell"
    assert "| *arcbridge / best peer* | 1.50 × (higher is better), rathole-stunnel |" in text
    assert "| **arcbridge** | 900 (810–1\u00a0080) |" in text
    assert "Path between client and relay: 100 ms." in text
    assert "## Study: kubernetes" in text
    assert "![" not in text, "without plots no pictures"


def test_the_tables_of_growing_numbers() -> None:
    text = report(result())
    assert (
        "| CPU per request, µs | 1 streams | 10 streams | 100 streams | 1\u00a0000 streams | 5\u00a0000 streams |"
        in text
    )
    assert words(plots(result())["streams.svg"]).count("arcbridge") == 4


def test_a_part_that_is_missed_is_told_in_the_terminal() -> None:
    told = goal_lines(goals(result()))
    missed = next(index for index, line in enumerate(told) if line.startswith("P4 "))
    assert "NOT MET" in told[missed]
    assert told[missed + 1].strip().startswith("256 streams: 43\u00a0000 /s, goal ≥ 2 × the best peer (1.95 × chisel)")
    nothing = goal_lines(goals(result({}, {})))
    assert nothing[1].strip() == "the scenario bulk was not run"


def test_bars_show_who_is_best_and_how_far_runs_lie_apart() -> None:
    svg = plots(result())["bulk.svg"]
    names = [word for word in words(svg) if word in SCENARIOS["bulk"]]
    assert names[:6] == ["arcbridge", "stunnel-haproxy", "rathole-tls", "rathole-stunnel", "openssh", "chisel"]
    assert "direct" not in names, "it would leave the others too short"
    assert any("not drawn: direct 5\u00a0800" in word for word in words(svg))
    groups = [group.get("id") or "" for group in ElementTree.fromstring(svg).iter(f"{SVG}g")]
    assert len([name for name in groups if name.startswith("whisker ")]) == 17
    assert [name for name in groups if name.startswith("cut ")] == ["cut relay CPU, s/GB: chisel"]


@pytest.mark.parametrize(
    "drawn",
    [
        bars([Panel("a & b <c>", "lower", (Bar("x", 0.0, 0.0, 0.0),))]),
        bars([Panel("wide", "higher", (Bar("x", 5.0, 5.0, 5.0), Bar("y", 1e9, 1e9, 1e9)))] * 3),
        lines([Chart("empty", {}), Chart("one", {"x": {7: 3.0}}), Chart("zero", {"x": {1: 0.0, 2: 0.0}})], "n"),
        lines([Chart("many", {f"s{i}": {1: 1.0, 2: 2.0} for i in range(12)})], "n"),
    ],
    ids=["nothing", "far apart", "few points", "more than colours"],
)
def test_odd_figures_are_drawn_too(drawn: str) -> None:
    root = ElementTree.fromstring(drawn)
    assert root.tag == f"{SVG}svg"
    assert "nan" not in drawn
    assert "inf" not in drawn
    height = float((root.get("height") or "0").removesuffix("pt"))
    assert all(0 < float(text.get("y") or -1) < height for text in root.iter(f"{SVG}text"))


def test_names_stand_in_the_order_in_which_lines_end_and_do_not_cover_each_other() -> None:
    svg = lines([Chart("many", {f"s{i}": {1: 1.0, 2: 2.0 + i / 100} for i in range(8)})], "n")
    heights = {
        text.text: float(text.get("y") or 0)
        for text in ElementTree.fromstring(svg).iter(f"{SVG}text")
        if (text.text or "").startswith("s")
    }
    assert sorted(heights, key=heights.__getitem__) == [f"s{i}" for i in reversed(range(8))]
    assert all(after - before >= 9 for before, after in itertools.pairwise(sorted(heights.values()))), "a line's height"


def test_every_colour_has_one_for_a_dark_page() -> None:
    for svg in plots(result()).values():
        rules, drawn = svg.split("</style>", 1)
        assert "prefers-color-scheme:dark" in rules
        colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", drawn))
        assert BACK in colours
        assert colours <= DARK.keys()
        assert all(f'[style*="fill: {colour}"]{{fill:{DARK[colour]} !important}}' in rules for colour in colours)
        unpainted = [text for text in re.findall(r"<text ([^>]*)>", drawn) if "fill: #" not in text]
        assert unpainted == [], "black on a dark page"


def test_figures_for_people() -> None:
    assert [short(value) for value in (0.123456, 12.34, 999.4, 1234567.0)] == [
        "0.123",
        "12.3",
        "999",
        "1\u00a0234\u00a0567",
    ]


def test_messages_keep_no_path_of_this_machine(tmp_path: Path) -> None:
    text = f"{tmp_path}/relay.log, {REPOSITORY}/bench/run.py, {Path.home()}/.cache/x"
    assert neutral(text, tmp_path) == "DIR/relay.log, ./bench/run.py, ~/.cache/x"
