"""What is taken away, what is left, and what stops it; with processes and logins: tests/e2e/test_uninstall.py."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from arcbridge.client.background import caller
from arcbridge.client.background.connection_settings import read_words
from arcbridge.client.background.connections import Connection, Connections
from arcbridge.client.background.lock_holder import is_held
from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.client.commands import sign_in
from arcbridge.client.commands import uninstall as module
from arcbridge.client.commands.uninstall import Installed, survey, uninstall
from arcbridge.client.credentials import proof_keys
from arcbridge.client.credentials.identity_summary import cache_of
from arcbridge.client.credentials.token_cache import TokenSet
from arcbridge.client.kubeconfig.entries import Entry, Kubeconfig
from arcbridge.client.kubeconfig.running import running_of
from arcbridge.client.relay.relay_profile import RelayProfiles
from arcbridge.client.state import StateDirectory
from arcbridge.errors import StateError
from arcbridge.pki.pins import PinStore
from arcbridge.pki.private_files import locked, make_private, try_lock, write_private
from arcbridge.settings.config import ClientConfig, LoginConfig
from tests.client.relay.test_relay_profile import PROFILE, SECOND
from tests.pki.test_succession import ANNOUNCED, KNOWN

CONFIG = ClientConfig()
LOGIN = LoginConfig(issuer="https://own.example", client_id="cli")
OWN = ClientConfig(relay="relay.example:443", login=LOGIN)
PIN = f"sha256:{'0' * 64}"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {
        "HOME": str(tmp_path),
        **{f"XDG_{kind}_HOME": str(tmp_path / kind.lower()) for kind in ("STATE", "CACHE", "CONFIG")},
    }


def used(
    environment: dict[str, str], file: Path, explicit: Path | None = None, cluster: str = "prod"
) -> StateDirectory:
    """A state directory out of which a proxy has served, with all that commands of the client keep in one."""
    state = StateDirectory.find(explicit, environment)
    config = ClientConfig(relay="relay.example:443", state_dir=explicit, login=LOGIN)
    state.keep_cluster_names([cluster])
    write_private(state.cache / "update-notice", b"1764409545\n")
    state.remember_port(("relay:443",), cluster, 47011)
    PinStore(state.pins_file, relay="relay:443").remember(cluster, PIN)
    state.successions.keep(KNOWN.pins[0], ANNOUNCED.list)
    ca_pem = state.certificates(cluster, "relay:443", time.time()).ca_pem
    RelayProfiles(state.path).save(PROFILE)
    cache = cache_of(config, state)
    cache.save(TokenSet(access_token="a", refresh_token="r"))
    with locked(cache.path.with_suffix(".lock")):
        proof_keys.load_or_make(cache.key_path)
    state.add_kubeconfig([file])
    Kubeconfig([file]).merge(Entry(cluster, cluster, "https://127.0.0.1:1", ca_pem, "CERT", "KEY"), switch=True)
    return state


async def taken_away(config: ClientConfig, found: Installed, environment: dict[str, str]) -> list[str]:
    return [sentence async for sentence in uninstall(config, found, environment)]


def files(directory: Path) -> set[Path]:
    return {path for path in directory.rglob("*") if not path.is_dir()}


@pytest.fixture(autouse=True)
def revoked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The issuers that were asked to void a refresh token."""
    issuers = []

    async def revoke(config: LoginConfig, tokens: TokenSet, environment: Any) -> str:
        issuers.extend([config.issuer] if tokens.refresh_token else [])
        return ""

    monkeypatch.setattr(sign_in, "revoke", revoke)
    return issuers


async def test_all_that_arcbridge_makes_goes(environment: dict[str, str], tmp_path: Path) -> None:
    state, place = used(environment, tmp_path / "kubeconfig"), BackgroundPaths.find(environment)
    place.make()
    Connections(Path(place.connections)).add(Connection(read_words(("--cluster", "prod")), "prod", "prod"))
    for path in (place.socket, place.silent, place.told, place.start_lock, place.process_lock, place.log):
        make_private(Path(path))
    make_private(Path(f"{place.log}.1"))
    (state.path / "running").mkdir(mode=0o700)
    make_private(state.path / "running" / f"999-{'0' * 16}")
    make_private(state.path / f".ports.json.{'0' * 16}")
    (program := state.cache / "program" / f"arcbridge-1.0-{'0' * 16}").mkdir(parents=True, mode=0o700)
    (state.cache / "program").chmod(0o700)
    make_private(program / "arcbridge")
    found = survey(OWN, environment)
    # A state directory whose name is too long for a socket has it elsewhere.
    made = files(state.path) | files(state.cache) | files(Path(place.runtime))
    assert {*found.paths} - {program} == made - {program / "arcbridge"}
    assert {getattr(place, name) for name in place.__slots__} - {place.runtime, place.state} <= {*map(str, found.paths)}
    said = await taken_away(OWN, found, environment)
    assert said == [
        *('context "prod"', 'context "prod"', "the login at https://own.example"),
        f"keys, pins, ports and tokens in {state.path} and {state.cache}",
    ]
    assert not state.path.exists()
    assert not state.cache.exists()
    assert not Kubeconfig([tmp_path / "kubeconfig"]).has_ours()
    assert found.left == []
    assert await taken_away(OWN, survey(OWN, environment), environment) == []


async def test_what_arcbridge_made_goes_and_nothing_else(environment: dict[str, str], tmp_path: Path) -> None:
    state = used(environment, tmp_path / "kubeconfig")
    own = state.path / "own.txt"
    own.write_text("mine")
    settings = tmp_path / "config" / "arcbridge" / "client.toml"
    settings.parent.mkdir(parents=True)
    settings.write_text("")
    found = survey(OWN, environment)
    assert found.left == [f"settings that you wrote: {settings}"]
    assert (await taken_away(OWN, found, environment))[0] == 'context "prod"'
    assert found.left[1:] == [f"what else is in {state.path}: own.txt"]
    assert not state.cache.exists()
    assert list(state.path.iterdir()) == [own]
    assert not Kubeconfig([tmp_path / "kubeconfig"]).has_ours()
    own.unlink()
    again = survey(CONFIG, environment)
    assert await taken_away(CONFIG, again, environment) == []
    assert not state.path.exists()


@pytest.mark.parametrize("whole", [True, False])
async def test_w23_what_another_program_has_in_the_directory_stays(
    environment: dict[str, str], tmp_path: Path, whole: bool
) -> None:
    directory = tmp_path / "project"
    names = (
        *("pins.toml", "ports.json", "kubeconfigs.json", "connections.json", "background.log", ".build.lock"),
        *("clusters/prod.json", f"clusters/x@{'0' * 16}.json", "relays/profile.json", "relays/a_1/profile.json"),
        *(
            "run/pid",
            "run-tests/report",
            "run-0a1b2c3d/control",
            "running/notes",
            "local-ca/ca.key",
            "successions/x.pem",
        ),
        *("tokens/x", "cache/clusters", "cache/program/main", "cache/update-notice"),
        *("cache/tokens/notes.json", f"cache/tokens/{'0' * 32}.json", f"cache/tokens/{'0' * 32}.key"),
        f"cache/program/arcbridge-1-{'0' * 16}/arcbridge",
    )
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text('["it is mine"]')
    (directory / "cache" / "clusters").chmod(0o600)
    (directory / "running" / "empty").mkdir()
    before = {*directory.rglob("*")}
    config = ClientConfig(state_dir=directory)
    found = survey(config, environment, whole=whole)
    assert found.paths == []
    assert await taken_away(config, found, environment) == []
    assert {*directory.rglob("*")} == before
    assert found.left[-1].startswith(f"what else is in {directory}: .build.lock, ")
    assert {path.read_text() for path in files(directory)} == {'["it is mine"]'}


async def test_w23_one_directory_goes_and_not_the_rest_of_this_user(
    environment: dict[str, str], tmp_path: Path, revoked: list[str]
) -> None:
    kubeconfig, directory = tmp_path / "kubeconfig", tmp_path / "other"
    mine = used(environment, kubeconfig)
    other = used(environment, kubeconfig, directory, "test")
    place = BackgroundPaths.find(environment)
    Connections(Path(place.connections)).add(Connection(read_words(("--cluster", "prod")), "prod", "prod"))
    unit = tmp_path / "config" / "systemd" / "user" / module.UNIT
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\n")
    before = files(mine.path) | files(mine.cache) | {unit}
    config = ClientConfig(relay="relay.example:443", state_dir=directory, login=LOGIN)
    found = survey(config, environment, whole=False)
    said = await taken_away(config, found, environment)
    assert said == [
        'context "test"',
        "the login at https://own.example",
        f"keys, pins, ports and tokens in {other.path} and {other.cache}",
    ]
    assert list(directory.iterdir()) == []
    assert before <= files(tmp_path)
    assert "prod" in kubeconfig.read_text()
    assert revoked == ["https://own.example"]
    assert found.left == [
        f"the background process and what it keeps in {place.state}: `arcbridge uninstall` alone",
        f"entries of arcbridge in {kubeconfig} that are not from here, or edited",
        f"{directory}, which is empty",
    ]


async def test_w23_contexts_that_are_served_out_of_another_directory_stay(
    environment: dict[str, str], tmp_path: Path
) -> None:
    kubeconfig, directory = tmp_path / "kubeconfig", tmp_path / "other"
    used(environment, kubeconfig)
    other = used(environment, kubeconfig, directory, "test")
    cluster_less = yaml.safe_load(kubeconfig.read_text())
    Kubeconfig([kubeconfig]).merge(Entry("old", "old", "https://127.0.0.1:1", "CA", "CERT", "KEY"), switch=False)
    document = yaml.safe_load(kubeconfig.read_text())
    kubeconfig.write_text(json.dumps({**document, "clusters": cluster_less["clusters"]}))
    running = running_of(other, environment)
    running.begin()  # a proxy
    try:
        said = await taken_away(OWN, found := survey(OWN, environment), environment)
    finally:
        running.end()
    assert [one for one in said if one.startswith("context")] == ['context "old"', 'context "prod"']
    document = yaml.safe_load(kubeconfig.read_text())
    assert [one["name"] for one in document["contexts"]] == ["test"]
    assert f"entries of arcbridge in {kubeconfig} that are not from here, or edited" in found.left


async def test_w23_a_directory_without_a_ca_has_no_contexts(environment: dict[str, str], tmp_path: Path) -> None:
    """Also none of those that name no CA, as where another program has taken the cluster's entry out."""
    kubeconfig, directory = tmp_path / "kubeconfig", tmp_path / "other"
    used(environment, kubeconfig)
    document = yaml.safe_load(kubeconfig.read_text())
    kubeconfig.write_text(json.dumps({**document, "clusters": []}))
    StateDirectory.find(directory, environment).add_kubeconfig([kubeconfig])
    config = ClientConfig(state_dir=directory)
    said = await taken_away(config, survey(config, environment, whole=False), environment)
    assert [sentence for sentence in said if "context" in sentence] == []
    assert Kubeconfig([kubeconfig]).has_ours()


def test_a_directory_that_a_connection_needs_is_not_taken_alone(environment: dict[str, str], tmp_path: Path) -> None:
    directory = tmp_path / "other"
    words = ("--cluster", "prod", "--state-dir", str(directory))
    Connections(Path(BackgroundPaths.find(environment).connections)).add(Connection(read_words(words), "prod", "prod"))
    config = ClientConfig(state_dir=directory)
    with pytest.raises(StateError, match="`arcbridge disconnect prod`"):
        survey(config, environment, whole=False)
    survey(ClientConfig(state_dir=tmp_path / "third"), environment, whole=False)
    (settings := tmp_path / "client.toml").write_text(f'state_dir = "{tmp_path / "fourth"}"\n')
    settings.chmod(0o600)
    words = ("--cluster", "test", "--config", str(settings))
    Connections(Path(BackgroundPaths.find(environment).connections)).add(Connection(read_words(words), "test", "test"))
    others = [
        f"the state directory {other}: `arcbridge uninstall --state-dir {other}`"
        for other in (tmp_path / "fourth", directory)
    ]
    assert survey(config, environment).left == others[:1]
    assert survey(CONFIG, environment).left == others


async def test_the_settings_name_another_directory(environment: dict[str, str], tmp_path: Path) -> None:
    """What the background process keeps is where it was."""
    place, directory = BackgroundPaths.find(environment), tmp_path / "other"
    used(environment, tmp_path / "kubeconfig", directory)
    Connections(Path(place.connections)).add(Connection(read_words(("--cluster", "prod")), "prod", "prod"))
    make_private(Path(place.log))
    config = ClientConfig(state_dir=directory)
    found = survey(config, environment)
    await taken_away(config, found, environment)
    assert not Path(place.state).exists()
    assert list(directory.iterdir()) == []
    assert found.left[-1] == f"{directory}, which is empty"


async def test_a_state_directory_that_is_a_link(environment: dict[str, str], tmp_path: Path) -> None:
    (disk := tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "state").mkdir()
    (link := tmp_path / "state" / "arcbridge").symlink_to(disk)
    state = used(environment, tmp_path / "kubeconfig")
    target = tmp_path / "dotfiles"
    state.pins_file.rename(target)
    state.pins_file.symlink_to(target)
    found = survey(OWN, environment)
    await taken_away(OWN, found, environment)
    assert (link.is_symlink(), [*disk.iterdir()]) == (True, [disk / "pins.toml"])
    assert target.read_bytes()
    assert found.left[-1] == f"what else is in {link}: pins.toml"


async def test_no_background_process_begins_meanwhile(environment: dict[str, str], tmp_path: Path) -> None:
    state, place = used(environment, tmp_path / "kubeconfig"), BackgroundPaths.find(environment)
    steps = uninstall(CONFIG, survey(CONFIG, environment), environment)
    assert await anext(steps) == 'context "prod"'
    assert is_held(place)
    assert [sentence async for sentence in steps]
    assert not is_held(place)
    assert not state.path.exists()


async def test_a_process_that_does_not_end_keeps_the_state(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, place = used(environment, tmp_path / "kubeconfig"), BackgroundPaths.find(environment)
    before = files(state.path)
    lock = try_lock(Path(place.process_lock))
    assert lock is not None
    monkeypatch.setattr(caller, "stop", lambda place: None)
    with pytest.raises(StateError, match="has begun, or does not end"):
        await taken_away(CONFIG, survey(CONFIG, environment), environment)
    os.close(lock)
    assert before <= files(state.path)
    assert Kubeconfig([tmp_path / "kubeconfig"]).has_ours()


async def test_w23_another_users_directory_for_the_socket_stays(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = BackgroundPaths.find(environment)
    runtime = tmp_path / "tmp"
    runtime.mkdir(mode=0o755)
    make_private(runtime / "control")
    planted = BackgroundPaths(str(runtime), place.state)
    monkeypatch.setattr(BackgroundPaths, "find", lambda environment: planted)
    used(environment, tmp_path / "kubeconfig")
    await taken_away(CONFIG, survey(CONFIG, environment), environment)
    assert list(runtime.iterdir()) == [runtime / "control"]
    assert not Path(place.state).exists()


async def test_logins_that_settings_name_are_revoked_and_others_are_said(
    environment: dict[str, str], tmp_path: Path, revoked: list[str]
) -> None:
    """Also beside a profile that is damaged."""
    state = used(environment, tmp_path / "kubeconfig")
    damaged = RelayProfiles(state.path).save(SECOND).directory
    write_private(damaged / "profile.json", b"{")
    for kind in ("json", "lock"):
        write_private(state.token_directory / f"{'0' * 32}.{kind}", b"{}")
    config = ClientConfig(login=LOGIN)
    found = survey(config, environment)
    assert [one.url for one in found.logins] == [PROFILE.url]
    await taken_away(config, found, environment)
    assert revoked == []
    assert any(sentence.startswith("2 logins at issuers that no settings here name") for sentence in found.left)
    used(environment, tmp_path / "kubeconfig")
    await taken_away(OWN, found := survey(OWN, environment), environment)
    assert revoked == ["https://own.example"]
    assert found.left == [f"the backup {tmp_path / 'kubeconfig.before-arcbridge'}"]


async def test_a_unit_that_is_gone_by_now(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(module, "_systemctl", lambda *words: asked.append(words))
    unit = tmp_path / "config" / "systemd" / "user" / module.UNIT
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\n")
    found = survey(CONFIG, environment)
    unit.unlink()
    assert await taken_away(CONFIG, found, environment) == [f"the unit {unit}"]
    assert [words[0] for words in asked] == ["disable", "daemon-reload"]


async def test_a_kubeconfig_that_cannot_be_changed_keeps_the_state(environment: dict[str, str], tmp_path: Path) -> None:
    state = used(environment, tmp_path / "kubeconfig")
    (tmp_path / "kubeconfig").write_text("{")
    with pytest.raises(StateError):
        await taken_away(CONFIG, survey(CONFIG, environment), environment)
    assert state.pins_file.exists()


def test_a_kubeconfig_that_is_not_there_is_said(environment: dict[str, str], tmp_path: Path) -> None:
    used(environment, absent := tmp_path / "stick" / "kubeconfig")
    absent.unlink()
    found = survey(CONFIG, environment)
    assert (found.kubeconfigs, found.left) == (
        [],
        [f"what contexts of arcbridge may be in {absent}, which is not there now"],
    )


async def test_what_serves_now_is_to_be_ended_first(environment: dict[str, str], tmp_path: Path) -> None:
    """Also where it has begun while the user was asked."""
    state = used(environment, tmp_path / "kubeconfig")
    found, running = survey(CONFIG, environment), running_of(state, environment)
    running.begin()
    with pytest.raises(StateError, match="serves a context"):
        survey(CONFIG, environment)
    with pytest.raises(StateError, match="serves a context"):
        await taken_away(CONFIG, found, environment)
    running.end()
    survey(CONFIG, environment)
