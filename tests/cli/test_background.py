"""The commands of the background process, as far as they need none; the rest is in tests/e2e/test_background.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from arcbridge.cli.background import kept_arguments, naming_relays, settings_of
from arcbridge.cli.flags import CLIENT
from arcbridge.cli.parser import parse
from arcbridge.client.background.connections import Connection, Connections
from arcbridge.client.kubeconfig.entries import Entry, Kubeconfig
from arcbridge.client.state import StateDirectory
from arcbridge.errors import ConfigError
from arcbridge.pki.private_files import try_lock
from arcbridge.settings.config import ClientConfig


def kept(*words: str, environment: dict[str, str] | None = None) -> tuple[str, ...]:
    return kept_arguments(
        parse(["connect", *words], CLIENT), {"XDG_CONFIG_HOME": "/nonexistent", **(environment or {})}
    )


def test_settings_become_flags() -> None:
    words = ("berlin", "--relay", "https://a", "--relay", "https://b", "--oidc-client-id", "cli", "--no-resumption")
    assert kept(*words) == (
        *("--relay", "https://a", "--relay", "https://b"),
        *("--oidc-client-id", "cli", "--no-resumption"),
    )


def test_those_of_the_environment_too_and_paths_are_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    environment = {
        "ARCBRIDGE_RELAY": "https://a, https://b",
        "ARCBRIDGE_ID_TOKEN_FILE": "id",
        "ARCBRIDGE_CONFIG": "c.toml",
        "ARCBRIDGE_NO_RESUMPTION": "0",
        "ARCBRIDGE_LOG_LEVEL": "debug",
    }
    assert kept("--access-token-file", "access", "--state-dir", "~/s", environment=environment) == (
        *("--config", str(tmp_path / "c.toml"), "--relay", "https://a", "--relay", "https://b"),
        *("--access-token-file", str(tmp_path / "access"), "--id-token-file", str(tmp_path / "id")),
        *("--state-dir", os.path.expanduser("~/s")),
    )


@pytest.mark.skipif(
    sys.platform == "win32", reason="modes and owners are POSIX's; tests/settings/test_windows_owner.py"
)
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
        assert settings_of(words, bare).login.command, "the user's own, of a private group too"
    tmp_path.chmod(0o1777)
    assert settings_of(words, bare).login.command, "its directory may be shared"
    tmp_path.chmod(0o700)
    file.chmod(0o646)
    with pytest.raises(ConfigError, match=r"can be changed by other users, .*: chmod go-w "):
        settings_of(words, bare)
    with monkeypatch.context() as patch:
        file.chmod(0o664)
        patch.setattr(os, "getegid", lambda: file.stat().st_gid + 1)
        with pytest.raises(ConfigError, match="can be changed by other users"):
            settings_of(words, bare)
    file.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(file, 4242, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(ConfigError, match="belongs to another user, and the credential plugin takes no settings"):
        settings_of(words, bare)
    # What is found without a flag is held to the same: a kubeconfig sets the plugin's environment, too.
    (tmp_path / "arcbridge").mkdir()
    file.rename(tmp_path / "arcbridge" / "client.toml")
    with pytest.raises(ConfigError, match="belongs to another user"):
        settings_of(words[2:], {**bare, "XDG_CONFIG_HOME": str(tmp_path)})


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes with names in a directory")
def test_b43_the_plugin_reads_no_settings_from_a_pipe() -> None:
    """It would be this user's, with what another one writes into it."""
    reading, writing = os.pipe()
    try:
        os.write(writing, b'[login]\ncommand = ["evil"]\n')
        with pytest.raises(ConfigError, match="is no ordinary file"):
            settings_of(["--config", f"/dev/fd/{reading}", "--cluster", "prod"], {"XDG_CONFIG_HOME": "/nonexistent"})
    finally:
        os.close(reading)
        os.close(writing)


def test_neither_one_command_s_business_nor_a_secret_is_kept() -> None:
    words = ("--file", "kc", "--no-context-switch", "--trust-first-use", "-n", "x", "--observe-listen", "127.0.0.1:1")
    assert kept(*words, environment={"ARCBRIDGE_TOKEN": "secret"}) == ()
    assert kept("--token", "secret") == ()


def test_the_relays_are_always_named() -> None:
    config = ClientConfig(relays=("https://a", "https://b"))
    assert naming_relays(("--no-resumption",), config) == (
        *("--no-resumption", "--relay", "https://a", "--relay", "https://b"),
    )
    assert naming_relays(("--relay", "https://c"), config) == ("--relay", "https://c")
    assert naming_relays(("--config", "/c.toml"), config) == (
        *("--config", "/c.toml", "--relay", "https://a", "--relay", "https://b"),
    )


def test_and_back_again_whatever_the_environment_says_by_then() -> None:
    arguments = ("--cluster", "berlin", *kept("--relay", "https://a", "--kube-context", "mine"))
    config = settings_of(arguments, {"ARCBRIDGE_RELAY": "https://other", "XDG_CONFIG_HOME": "/nonexistent"})
    assert (config.cluster, config.relay_urls(), config.kube_context) == ("berlin", ("https://a",), "mine")


@pytest.mark.parametrize("arguments", [("--nonsense",), ("--relay", "https://a")], ids=["unknown", "no cluster"])
def test_arguments_that_say_nothing(arguments: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        settings_of(arguments, {"XDG_CONFIG_HOME": "/nonexistent"})


def arcbridge(home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "XDG_STATE_HOME": str(home / "state"),
        "XDG_CONFIG_HOME": str(home / "config"),
        **environment,
    }
    command = [sys.executable, "-m", "arcbridge", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


def test_where_no_process_runs(tmp_path: Path) -> None:
    done = arcbridge(tmp_path, "status")
    assert done.stdout == "No background process runs; kubectl starts it when a context needs it.\n"
    assert json.loads(arcbridge(tmp_path, "status", "-o", "json").stdout) == {"process": None, "clusters": []}
    assert arcbridge(tmp_path, "stop").stdout == "No background process runs.\n"
    assert arcbridge(tmp_path, "logs").stdout == "There is no log: no background process has run.\n"
    done = arcbridge(tmp_path, "disconnect", "berlin")
    assert (done.returncode, done.stderr) == (2, 'error: "berlin" is not connected; connected: none\n')
    assert arcbridge(tmp_path, "disconnect", "--all").stdout == "No cluster is connected.\n"


@pytest.mark.parametrize("words", [("status",), ("connect", "berlin", "--relay", "https://127.0.0.1:1")])
def test_what_a_killed_run_left_is_removed(tmp_path: Path, words: tuple[str, ...]) -> None:
    runtime = tmp_path / "runtime"
    for name in ("left", "living"):
        (runtime / f"arcbridge-run-{name}").mkdir(parents=True, mode=0o700)
        for file in ("kubeconfig", "lock"):
            (runtime / f"arcbridge-run-{name}" / file).write_text("")
    runtime.chmod(0o700)
    lock = try_lock(runtime / "arcbridge-run-living" / "lock")
    assert lock is not None
    try:
        arcbridge(tmp_path, *words, XDG_RUNTIME_DIR=str(runtime))
        assert os.listdir(runtime) == ["arcbridge-run-living"]
        assert (runtime / "arcbridge-run-living" / "kubeconfig").exists()
    finally:
        os.close(lock)


def left_by_a_killed_proxy(home: Path, state: Path, name: str) -> Path:
    """A kubeconfig with a context whose process is gone, known in one state directory."""
    file = home / f"{name}.yaml"
    entry = Entry(name, name, "https://127.0.0.1:9", "CA", "CERT", "KEY", relays=("r:443",), process="1-gone")
    Kubeconfig([file]).merge(entry, switch=True)
    StateDirectory(state, state / "cache").add_kubeconfig([file])
    return file


@pytest.mark.parametrize("words", [("status",), ("stop",), ("disconnect", "none")])
def test_what_is_known_is_repaired_wherever_it_is(tmp_path: Path, words: tuple[str, ...]) -> None:
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
        kept.add(Connection(("--cluster", name, *words_of), name, name, (str(tmp_path / f"{name}.yaml"),)))
    files = [
        left_by_a_killed_proxy(tmp_path, tmp_path / letter, name) for letter, name in (("a", "berlin"), ("b", "munich"))
    ]
    done = arcbridge(tmp_path, *words)
    for file, name in zip(files, ("berlin", "munich"), strict=True):
        assert f'what served context "{name}" had ended; the kubeconfig says so now' in done.stderr
        assert "--ended" in file.read_text()
    for name in ("paris", "rome"):
        assert f'the kubeconfigs of "{name}" were not looked at: ' in done.stderr
        assert f"`arcbridge disconnect {name}` forgets it" in done.stderr


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give a file away")
def test_w11_a_list_of_another_user_is_not_used(tmp_path: Path) -> None:
    """docs/threats.md#W11: its arguments name files that this process would write."""
    connections = tmp_path / "state" / "arcbridge" / "connections.json"
    Connections(connections).add(Connection(("--cluster", "berlin"), "berlin", "berlin"))
    assert "berlin" in arcbridge(tmp_path, "status").stdout
    os.chown(connections, 12345, 12345)
    assert "berlin" not in arcbridge(tmp_path, "status").stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("connect",), "name the clusters to connect"),
        (("connect", "Bad_Name", "--relay", "https://127.0.0.1:1"), "Bad_Name"),
        (("connect", "a", "b", "--port", "1", "--relay", "https://127.0.0.1:1"), "flag --port: fits one cluster"),
        (("connect", "a", "--file", "-", "--relay", "https://127.0.0.1:1"), "flag --file"),
        (("connect", "a", "--token", "x", "--relay", "https://127.0.0.1:1"), "--token-file"),
        (("disconnect", "a", "--all"), "flag --all"),
        (("connect", "a"), "relays: none is set, and none was logged in at; run `arcbridge login https://RELAY`"),
    ],
    ids=["no name", "bad name", "port", "stdout", "token", "all", "no relay"],
)
def test_mistakes_are_one_clear_line(tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    done = arcbridge(tmp_path, *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.startswith("error: ")
    assert not (tmp_path / "state").exists() or not list((tmp_path / "state").rglob("control"))
