"""The study of idle scale: what fits into the descriptors, and a small one of it all."""

from __future__ import annotations

from pathlib import Path

from bench.studies.scale import Scale


def test_a_small_one(tmp_path: Path) -> None:
    found = Scale(sessions=12, agents=5, idle=1.0).run(tmp_path, rounds=1, seconds=0.0)
    values = found["values"]
    assert (values["sessions"], values["agents"], values["sessions_lost"]) == (12, 5, 0)
    assert values["idle_percent_of_a_core"] >= 0
    assert values["pairing_per_s"] > 0
    assert any("blind" in note for note in found["notes"])
