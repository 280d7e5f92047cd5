"""The report and its plots, from a result that is kept in the repository."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from bench.machine import REPOSITORY, neutral
from bench.report import report, write
from tests.bench.test_goals import KEPT

SVG = "{http://www.w3.org/2000/svg}"


def test_the_same_result_makes_the_same_bytes(tmp_path: Path) -> None:
    few = {**KEPT, "scenarios": {name: KEPT["scenarios"][name] for name in ("resumption", "streams")}}
    first, second = write(few, tmp_path / "a"), write(few, tmp_path / "b")
    names = sorted(file.name for file in first.parent.iterdir())
    assert names == ["report.md", "resumption.svg", "streams.svg"]
    for name in names:
        assert (first.parent / name).read_bytes() == (second.parent / name).read_bytes()
    assert all(f"]({name})" in first.read_text() for name in names[1:])
    streams = ElementTree.fromstring((first.parent / "streams.svg").read_text()).iter(f"{SVG}text")
    assert [element.text for element in streams].count("arcbridge") == 5, "one for each metric that grows"


def test_goals_come_first_and_what_is_missing_is_said_before_them() -> None:
    left_out = {"konnectivity": "needs go | apt-get install golang"}
    text = report({**KEPT, "left_out": left_out, "failures": ["round 2, open, chisel: a connection gave no byte"]})
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings[:3] == ["# Benchmark", "## Goals", "## bulk"]
    assert headings[-3:] == ["## Systems", "## Left out", "## Failures"]
    assert text.index("**Left out: konnectivity**") < text.index("## Goals")
    assert text.index("**1 measurements failed**") < text.index("## Goals")
    row = next(line for line in text.splitlines() if line.startswith("| **P1**"))
    assert row.endswith("| 668 MB/s | openssh: 525 MB/s | 1.27 × | ≥ 1.5 × the best peer | **no** |")
    assert "* konnectivity: needs go \\| apt-get install golang" in text, "a bar would end a cell"
    assert "| *arcbridge / best peer* | 1.27 × (higher is better), openssh |" in text
    assert "| **arcbridge** | 668 (573–694) |" in text
    assert "Path between client and relay: long-100-ms." in text
    assert (
        "| CPU per request, µs | 1 streams | 10 streams | 100 streams | 1\u00a0000 streams | 5\u00a0000 streams |"
        in text
    )
    assert "## Study: kubernetes" in text
    assert "![" not in text, "without plots no pictures"


def test_messages_keep_no_path_of_this_machine(tmp_path: Path) -> None:
    text = f"{tmp_path}/relay.log, {REPOSITORY}/bench/run.py, {Path.home()}/.cache/x"
    assert neutral(text, tmp_path) == "DIR/relay.log, ./bench/run.py, ~/.cache/x"
