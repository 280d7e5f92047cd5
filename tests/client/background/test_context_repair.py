"""Kubeconfigs that a killed process has left are put right, wherever their state directory is."""

from __future__ import annotations

from pathlib import Path

from arcbridge.client.background.connection_settings import read_words
from arcbridge.client.background.connections import Connection, Connections
from arcbridge.client.background.context_repair import repair_all
from arcbridge.client.kubeconfig.entries import Entry, Kubeconfig
from arcbridge.client.state import StateDirectory


def left_by_a_killed_proxy(home: Path, state: Path, name: str) -> Path:
    """A kubeconfig with a context whose process is gone, known in one state directory."""
    file = home / f"{name}.yaml"
    entry = Entry(name, name, "https://127.0.0.1:9", "CA", "CERT", "KEY", relays=("r:443",), process="1-gone")
    Kubeconfig([file]).merge(entry, switch=True)
    StateDirectory(state, state / "cache").add_kubeconfig([file])
    return file


def test_what_is_known_is_repaired_wherever_it_is(tmp_path: Path) -> None:
    """The state directory of a connection is in its own flags, or in its settings file."""
    (tmp_path / "settings.toml").write_text(f'state_dir = "{tmp_path / "b"}"\n')
    flags = {
        "berlin": ("--state-dir", str(tmp_path / "a")),
        "munich": ("--config", str(tmp_path / "settings.toml")),
        "paris": ("--config", str(tmp_path / "missing.toml")),
        "rome": ("--config", str(tmp_path / "missing.toml")),
    }
    kept = Connections(tmp_path / "state" / "arcbridge" / "connections.json")
    for name, words_of in flags.items():
        kept.add(Connection(read_words(("--cluster", name, *words_of)), name, name, (str(tmp_path / f"{name}.yaml"),)))
    files = [
        left_by_a_killed_proxy(tmp_path, tmp_path / letter, name) for letter, name in (("a", "berlin"), ("b", "munich"))
    ]
    environment = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}
    sentences = list(repair_all(None, environment))
    assert len(sentences) == 4
    for file, name in zip(files, ("berlin", "munich"), strict=True):
        assert f'what served context "{name}" had ended; the kubeconfig says so now' in sentences
        assert "--ended" in file.read_text()
    for name in ("paris", "rome"):
        (sentence,) = [one for one in sentences if f'the kubeconfigs of "{name}" were not looked at: ' in one]
        assert sentence.endswith(f"`arcbridge disconnect {name}` forgets it")
