"""Which connections a name means, and what is left when one is gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from arcbridge.client.background.connection_settings import read_words
from arcbridge.client.background.connections import Connection, Connections
from arcbridge.client.background.removal import choose, remove_connection
from arcbridge.client.kubeconfig.entries import Entry, Kubeconfig
from arcbridge.errors import ConfigError

BERLIN = Connection(read_words(("--cluster", "berlin")), "berlin", "berlin")
MINE = Connection(read_words(("--cluster", "berlin", "--kube-context", "mine")), "berlin", "mine")
MUNICH = Connection(read_words(("--cluster", "munich")), "munich", "munich")


def test_by_context_then_by_cluster() -> None:
    assert choose([BERLIN, MINE, MUNICH], ["mine", "munich"], every=False) == [MINE, MUNICH]
    assert choose([MINE, MUNICH], ["berlin"], every=False) == [MINE]
    assert choose([MINE, MUNICH], [], every=True) == [MINE, MUNICH]
    assert choose([MINE], [], every=False) == [MINE]
    assert choose([], [], every=True) == choose([], [], every=False) == []


@pytest.mark.parametrize(
    ("known", "names", "words"),
    [
        ([BERLIN, MUNICH], [], "which cluster\\? name one of berlin, munich, or give --all"),
        ([BERLIN, MUNICH], ["munch"], '"munch" is not connected; did you mean munich\\?'),
        ([BERLIN], ["zzz"], '"zzz" is not connected; connected: berlin'),
        ([], ["zzz"], '"zzz" is not connected; connected: none'),
    ],
    ids=["which", "near", "far", "nothing"],
)
def test_what_is_not_meant(known: list[Connection], names: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose(known, names, every=False)


@pytest.mark.parametrize("readable", [True, False])
def test_context_port_and_record_go(tmp_path: Path, readable: bool) -> None:
    file = tmp_path / "config"
    words = ("--cluster", "berlin", "--relay", "https://relay")
    connection = Connection(read_words(words), "berlin", "berlin", (str(file),))
    connections = Connections(tmp_path / "connections.json")
    connections.add(connection)
    entry = Entry("berlin", "berlin", "https://127.0.0.1:1", "A", "B", "C", process="background", plugin=True)
    Kubeconfig([file]).merge(entry, switch=True)
    if not readable:
        (tmp_path / "arcbridge").mkdir()
        (tmp_path / "arcbridge" / "client.toml").write_text("damaged")
    remove_connection(connection, connections, {"XDG_CONFIG_HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)})
    assert connections.all() == []
    assert not Kubeconfig([file]).has_ours()
