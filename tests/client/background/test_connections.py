"""What is connected, in one file."""

from __future__ import annotations

from pathlib import Path

import pytest

from arcbridge.client.background.connections import Connection, Connections
from arcbridge.errors import StateError

BERLIN = Connection(("--cluster", "berlin"), "berlin", "berlin", ("/home/u/.kube/config",))
MUNICH = Connection(("--cluster", "munich"), "munich", "m", ("/home/u/.kube/config",), static=True)


def test_kept_and_removed(tmp_path: Path) -> None:
    file = tmp_path / "state" / "connections.json"
    kept = Connections(file)
    assert kept.all() == []
    kept.add(BERLIN)
    kept.add(MUNICH)
    kept.add(BERLIN)
    assert sorted(Connections(file).all(), key=lambda one: one.cluster) == [BERLIN, MUNICH]
    assert file.stat().st_mode & 0o777 == 0o600
    kept.remove(BERLIN)
    kept.remove(BERLIN)
    assert kept.all() == [MUNICH]


def test_a_context_has_one_connection(tmp_path: Path) -> None:
    kept = Connections(tmp_path / "connections.json")
    kept.add(BERLIN)
    other = Connection(("--cluster", "berlin", "--relay", "https://r"), "berlin", "berlin", BERLIN.kubeconfig)
    kept.add(other)
    assert kept.all() == [other]
    bare = Connection(BERLIN.arguments, "berlin", "berlin")
    kept.add(bare)
    kept.add(bare)
    assert kept.all() == [other, bare]


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}', '[{"cluster": "x"}]'])
def test_damage_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "connections.json").write_text(text)
    with pytest.raises(StateError, match="is damaged: remove it"):
        Connections(tmp_path / "connections.json").all()
