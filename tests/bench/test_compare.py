"""Checkouts take turns, and what differs between them is told with the figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import compare
from bench.machine import REPOSITORY


def test_turns_medians_and_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []

    def measure(checkout: Path, loads: str, seconds: float) -> dict[str, float]:
        order.append(checkout.name)
        return {"up_mb_per_s": float(len(order))}

    monkeypatch.setattr(compare, "_measure", measure)
    out = tmp_path / "result.json"
    for name in ("before", "after"):
        (tmp_path / name / "arcbridge").mkdir(parents=True)
    places = [f"{name}={tmp_path / name}" for name in ("before", "after")]
    assert compare.main([*places, "--rounds", "3", "--loads", "up", "--out", str(out)]) == 0
    assert order == ["before", "after", "after", "before", "before", "after"]
    result = json.loads(out.read_text())
    assert result["runs"]["before"] == [{"up_mb_per_s": 1.0}, {"up_mb_per_s": 4.0}, {"up_mb_per_s": 5.0}]
    assert result["medians"] == {"before": {"up_mb_per_s": 4.0}, "after": {"up_mb_per_s": 3.0}}
    assert str(tmp_path) not in out.read_text(), "no path of the machine"
    assert capsys.readouterr().out.splitlines() == ["before up_mb_per_s 4", "after up_mb_per_s 3"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([f"a={REPOSITORY}", "--loads", "sideways"], "no load is called sideways"),
        (["a=/nowhere"], "'a=/nowhere' is not NAME=PATH"),
    ],
)
def test_what_is_no_checkout_or_no_load(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main(arguments)
    assert says in capsys.readouterr().err
