"""The settings of a connection: as fields, as flags, and what comes into force by them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from arcbridge.client.background.connection_settings import read_document, read_words
from arcbridge.errors import ConfigError

BARE = {"XDG_CONFIG_HOME": "/nonexistent", "XDG_STATE_HOME": "/nonexistent"}


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (("--cluster", "a"), ("--cluster", "a")),
        (("--port=0", "-n", "a", "--config=/c"), ("--cluster", "a", "--config", "/c", "--port", "0")),
        (
            ("--relay", "https://b", "--no-resumption", "--relay", "https://a", "--name", "x"),
            ("--cluster", "x", "--relay", "https://b", "--relay", "https://a", "--no-resumption"),
        ),
        (("-n", "a", "-v", "--role", "client", "--token", "SECRET"), ("--cluster", "a")),
    ],
    ids=["one", "forms", "lists and switches", "no settings"],
)
def test_flags_become_fields_and_flags_again(words: tuple[str, ...], written: tuple[str, ...]) -> None:
    settings = read_words(words)
    assert settings.words() == written
    assert read_words(written) == settings
    assert read_document(json.loads(json.dumps(settings.document()))) == settings


@pytest.mark.parametrize("words", [("--nonsense", "x"), ("--port",), ("a",), ("--no-resumption=1",)], ids=" ".join)
def test_flags_that_the_client_does_not_have(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="run `arcbridge connect` again"):
        read_words(words)


def test_what_comes_into_force_whatever_the_environment_says_by_then() -> None:
    words = ("-n", "berlin", "--relay", "https://a", "--kube-context", "mine", "--no-resumption", "--port", "7")
    config = read_words(words).load({**BARE, "ARCBRIDGE_RELAY": "https://other"})
    assert (config.cluster, config.relay_urls(), config.kube_context) == ("berlin", ("https://a",), "mine")
    assert (config.resumption, config.port) == (False, 7)


@pytest.mark.parametrize("words", [("--relay", "https://a"), ("-n", "a", "--port", "many")], ids=["no cluster", "port"])
def test_settings_that_cannot_be(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"cluster: required|flag --port: must be a whole number"):
        read_words(words).load(BARE)


def test_what_is_served_once_and_the_command_that_connects_it() -> None:
    settings = read_words(("--cluster", "a", "--kube-context", "my own", "--port", "1"))
    assert settings.without_context() == read_words(("--cluster", "a", "--port", "1"))
    assert settings.connect_command() == "arcbridge connect a --port 1 --kube-context 'my own'"


@pytest.mark.skipif(sys.platform == "win32", reason="modes and owners are POSIX's")
def test_b43_the_plugin_takes_no_settings_that_another_user_can_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kubectl runs it with the flags of any kubeconfig, and settings name programs."""
    file = tmp_path / "client.toml"
    file.write_text('[login]\ncommand = ["/bin/sh", "-c", "evil"]\n')
    words = ["--config", str(file), "--relay", "https://r.example", "--cluster", "prod"]
    bare = {"XDG_CONFIG_HOME": "/nonexistent", "XDG_STATE_HOME": str(tmp_path)}
    for mode in (0o600, 0o644, 0o664):
        file.chmod(mode)
        assert read_words(words).load(bare).login.command, "the user's own, of a private group too"
    tmp_path.chmod(0o1777)
    assert read_words(words).load(bare).login.command, "its directory may be shared"
    tmp_path.chmod(0o700)
    file.chmod(0o646)
    with pytest.raises(ConfigError, match=r"can be changed by other users, .*: chmod go-w "):
        read_words(words).load(bare)
    with monkeypatch.context() as patch:
        file.chmod(0o664)
        patch.setattr(os, "getegid", lambda: file.stat().st_gid + 1)
        with pytest.raises(ConfigError, match="can be changed by other users"):
            read_words(words).load(bare)
    file.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(file, 4242, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(ConfigError, match="belongs to another user, and the credential plugin takes no settings"):
        read_words(words).load(bare)
    # What is found without a flag is held to the same: a kubeconfig sets the plugin's environment, too.
    (tmp_path / "arcbridge").mkdir()
    file.rename(tmp_path / "arcbridge" / "client.toml")
    with pytest.raises(ConfigError, match="belongs to another user"):
        read_words(words[2:]).load({**bare, "XDG_CONFIG_HOME": str(tmp_path)})


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes with names in a directory")
def test_b43_the_plugin_reads_no_settings_from_a_pipe() -> None:
    """It would be this user's, with what another one writes into it."""
    reading, writing = os.pipe()
    try:
        os.write(writing, b'[login]\ncommand = ["evil"]\n')
        with pytest.raises(ConfigError, match="is no ordinary file"):
            read_words(["--config", f"/dev/fd/{reading}", "--cluster", "prod"]).load(BARE)
    finally:
        os.close(reading)
        os.close(writing)
