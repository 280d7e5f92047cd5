"""What is connected, in one file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arcbridge.client.background.connection_settings import read_words
from arcbridge.client.background.connections import Connection, Connections, repair_all
from arcbridge.client.kubeconfig.entries import Entry, Kubeconfig
from arcbridge.client.state import StateDirectory
from arcbridge.errors import ConfigError, StateError

BERLIN = Connection(read_words(("--cluster", "berlin")), "berlin", "berlin", ("/home/u/.kube/config",))
MUNICH = Connection(read_words(("--cluster", "munich")), "munich", "m", ("/home/u/.kube/config",), static=True)


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
    other = Connection(
        read_words(("--cluster", "berlin", "--relay", "https://r")), "berlin", "berlin", BERLIN.kubeconfig
    )
    kept.add(other)
    assert kept.all() == [other]
    bare = Connection(BERLIN.settings, "berlin", "berlin")
    kept.add(bare)
    kept.add(bare)
    assert kept.all() == [other, bare]


def test_one_whose_kubeconfig_is_gone_gives_way(tmp_path: Path) -> None:
    """Jobs on one machine connect with a kubeconfig of their own each: the list, and each start, grew with them."""
    kept, stays = Connections(tmp_path / "connections.json"), tmp_path / "stays"
    stays.touch()
    others = [
        Connection(BERLIN.settings, "berlin", "berlin", (str(stays),)),
        Connection(BERLIN.settings, "berlin", "berlin", (str(tmp_path / "gone"),), static=True),
        Connection(MUNICH.settings, "munich", "munich", (str(tmp_path / "gone"),)),
    ]
    for one in others:
        kept.add(one)
    for number in range(3):
        job = Connection(BERLIN.settings, "berlin", "berlin", (str(tmp_path / str(number)),))
        kept.add(job)
        assert kept.all() == [*others, job]


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}', '[{"cluster": "x"}]'])
def test_damage_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "connections.json").write_text(text)
    with pytest.raises(StateError, match="is damaged: remove it"):
        Connections(tmp_path / "connections.json").all()


def test_flags_as_former_releases_kept_them(tmp_path: Path) -> None:
    """What tree 0f239dc of November 2026 wrote; this test goes with what it tests, on 2027-03-01."""
    flags = ["--cluster", "berlin", "--config", "/c.toml", "--no-resumption", "--relay", "https://a", "--port", "0"]
    former = [
        {"arguments": flags, "cluster": "berlin", "context": "b", "kubeconfig": ["/k"], "static": True},
        {"arguments": ["--gone", "x"], "cluster": "munich", "context": "m", "kubeconfig": [], "static": False},
    ]
    file = tmp_path / "connections.json"
    file.write_text(json.dumps(former, indent=1))
    berlin, munich = Connections(file).all()
    assert berlin == Connection(read_words(flags), "berlin", "b", ("/k",), static=True)
    assert dict(berlin.settings.values) == {
        "cluster": ("berlin",), "relays": ("https://a",), "port": "0", "resumption": True,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="run `arcbridge connect` again"):
        munich.settings.load({"HOME": str(tmp_path)})
    Connections(file).remove(munich)
    assert "arguments" not in file.read_text()
    assert Connections(file).all() == [berlin]


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
