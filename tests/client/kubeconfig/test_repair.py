"""Repairing every kubeconfig of a user."""

from __future__ import annotations

from pathlib import Path

import yaml

from arcbridge.client.kubeconfig.entries import Entry, Kubeconfig
from arcbridge.client.kubeconfig.repair import repair_kubeconfigs, running_of
from arcbridge.client.state import StateDirectory


def test_each_file_is_repaired_and_one_without_entries_of_ours_is_forgotten(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path / "state", tmp_path / "cache")
    running = running_of(state, {"HOME": str(tmp_path)})
    mine, gone, damaged = tmp_path / "mine", tmp_path / "gone", tmp_path / "damaged"
    for file, process in ((mine, running.begin()), (gone, "999-killed")):
        entry = Entry("prod", "prod", "https://127.0.0.1:47011", "CA", "CERT", "KEY", process=process)
        Kubeconfig([file]).merge(entry, switch=True)
        state.add_kubeconfig([file])
    damaged.write_text("a: [")
    state.add_kubeconfig([damaged])
    state.add_kubeconfig([tmp_path / "absent"])
    assert repair_kubeconfigs(state, running) == ["prod"]
    assert yaml.safe_load(mine.read_text())["current-context"] == "prod"
    assert "current-context" not in yaml.safe_load(gone.read_text())
    assert state.kubeconfigs() == [[mine], [gone], [damaged]]
