"""The report and its plots, from a made-up result."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from bench.machine import REPOSITORY, neutral
from bench.report import plots, report, write
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


def test_messages_keep_no_path_of_this_machine(tmp_path: Path) -> None:
    text = f"{tmp_path}/relay.log, {REPOSITORY}/bench/run.py, {Path.home()}/.cache/x"
    assert neutral(text, tmp_path) == "DIR/relay.log, ./bench/run.py, ~/.cache/x"
