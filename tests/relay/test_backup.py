"""A backup holds what a relay cannot be without, and a restore loses no revocation and replaces nothing by itself."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pyrage
import pytest

from arcbridge.errors import ConfigError, StateError
from arcbridge.pki.authority import Authority
from arcbridge.relay import backup, data_dir
from arcbridge.relay.admin import at, end_recovery
from arcbridge.relay.backup import make_backup, read_backup, restore_backup
from arcbridge.relay.data_dir import (
    change_authority,
    instance_lock,
    open_authority,
    open_registry,
    read_ca,
    read_rotation,
)
from arcbridge.settings.config import GraphConfig, RelayConfig
from tests.relay.audit.test_log import records
from tests.relay.conftest import relay_config


@pytest.fixture
async def config(tmp_path: Path) -> RelayConfig:
    """A relay with a cluster, a revoked user and a revoked cluster."""
    config = relay_config(tmp_path, "", public_address="relay.test:8443")
    open_authority(config.data_dir)
    registry = await open_registry(config.data_dir)
    token = await registry.create_join_token("prod", expires_at=time.time() + 60)
    await registry.redeem_join_token(token, "key", Authority.create("prod").certificate_pem)
    await registry.create_join_token("spare", expires_at=time.time() + 60)
    await registry.revoke_user("alice", int(time.time()))
    await registry.revoke_cluster("bad")
    await registry.close()
    return config


def elsewhere(config: RelayConfig, tmp_path: Path) -> RelayConfig:
    return replace(config, data_dir=tmp_path / "elsewhere")


async def test_a_backup_brings_all_back_elsewhere(config: RelayConfig, tmp_path: Path) -> None:
    made = await make_backup(config, tmp_path / "file")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    assert (made.clusters, made.clusters_revoked, made.users_revoked, made.tokens_open) == (1, ["bad"], 1, 1)
    new = elsewhere(config, tmp_path)
    done = await restore_backup(new, tmp_path / "file", settings=tmp_path / "settings")
    assert (done.manifest, done.awaited, done.kept) == (made, 1, 0)
    assert open_authority(new.data_dir).pin == open_authority(config.data_dir).pin == made.relay_ca_pin
    for name in ("ca.key", "ca.crt", "registry.db"):
        assert (new.data_dir / name).stat().st_mode & 0o777 == 0o600
    registry = await open_registry(new.data_dir)
    assert {one.name for one in await registry.access_changes()} == {"alice", "bad"}
    assert [one.name for one in await registry.clusters()] == ["prod"]
    assert await registry.list_join_tokens() == []
    known = await registry.recovery()
    assert (known.backup, known.awaited) == (made.made, ("prod",))
    await registry.close()
    assert (tmp_path / "settings" / config.policy.name).read_bytes() == config.policy.read_bytes()
    with pytest.raises(StateError, match="is there already"):
        await restore_backup(new, tmp_path / "file", overwrite=True, settings=tmp_path / "settings")


async def test_what_is_backed_up_and_restored_is_recorded(config: RelayConfig, tmp_path: Path) -> None:
    await make_backup(config, tmp_path / "file")
    new = elsewhere(config, tmp_path)
    await restore_backup(new, tmp_path / "file")
    with pytest.raises(StateError):
        await restore_backup(new, tmp_path / "file")
    await end_recovery(at(new))
    (made,) = [one for one in records(config.data_dir / "audit.jsonl") if one["stage"] == "ended"]
    assert (made["act"], made["arguments"]) == ("backup", {"file": str(tmp_path / "file"), "recipients": []})
    ends = [one for one in records(new.data_dir / "audit.jsonl") if one["stage"] == "ended"]
    assert [(one["act"], one["outcome"]) for one in ends] == [
        ("restore", "done"),
        ("restore", "refused"),
        ("recovery end", "done"),
    ]
    assert ends[0]["result"] == {"awaited": 1, "kept": 0}


async def test_it_is_encrypted_to_each_recipient_and_read_by_no_other(config: RelayConfig, tmp_path: Path) -> None:
    keys = [pyrage.x25519.Identity.generate() for _ in range(3)]
    for number, key in enumerate(keys):
        (tmp_path / f"key{number}").write_text(f"# created: today\n{key}\n")
    file = tmp_path / "file"
    made = await make_backup(config, file, recipients=[str(key.to_public()) for key in keys[:2]])
    assert b"ca.key" not in file.read_bytes()
    for number in (0, 1):
        assert (await read_backup(file, tmp_path / f"key{number}"))[0] == made
    with pytest.raises(StateError, match="not sealed to the key"):
        await read_backup(file, tmp_path / "key2")
    with pytest.raises(ConfigError, match="--identity FILE"):
        await read_backup(file, None)
    (tmp_path / "no-key").write_text("nothing\n")
    with pytest.raises(ConfigError, match="holds no key"):
        await read_backup(file, tmp_path / "no-key")
    with pytest.raises(ConfigError, match="public key of age"):
        await make_backup(config, tmp_path / "other", recipients=["age1wrong"])


async def test_nothing_is_replaced_by_itself_and_revocations_of_what_is_replaced_stay(
    config: RelayConfig, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    await make_backup(config, file)
    with pytest.raises(StateError, match="--overwrite"):
        await make_backup(config, file)
    registry = await open_registry(config.data_dir)
    await registry.revoke_user("carol", int(time.time()))
    await registry.restore_user("alice")
    await registry.close()
    with pytest.raises(StateError, match="--overwrite to replace it"):
        await restore_backup(config, file)
    with instance_lock(config.data_dir), pytest.raises(ConfigError, match="another relay is running"):
        await restore_backup(config, file, overwrite=True)
    assert (await restore_backup(config, file, overwrite=True)).kept == 1
    registry = await open_registry(config.data_dir)
    assert set(await registry.user_revocations()) == {"carol"}
    await registry.close()
    (replaced,) = config.data_dir.glob("registry.replaced-*")
    assert replaced.stat().st_mode & 0o777 == 0o600
    assert (await restore_backup(config, file, overwrite=True)).kept == 1
    assert len(list(config.data_dir.glob("registry.replaced-*"))) == 2, "no copy is replaced by another"
    # Another CA: agents and clients may know it.
    other = elsewhere(config, tmp_path)
    pin = open_authority(other.data_dir).pin
    with pytest.raises(StateError, match="has another CA"):
        await restore_backup(other, file)
    assert open_authority(other.data_dir).pin == pin
    await restore_backup(other, file, overwrite=True)
    assert open_authority(other.data_dir).pin == open_authority(config.data_dir).pin
    aside = {path.name.partition(".replaced-")[0]: path for path in other.data_dir.glob("ca.*.replaced-*")}
    former = Authority.load(aside["ca.crt"].read_text(), aside["ca.key"].read_text())
    assert former.pin == pin, "a foreign CA is not destroyed"


async def test_a_restore_that_was_killed_between_the_files_of_the_ca_can_be_repeated(
    config: RelayConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, new = tmp_path / "file", elsewhere(config, tmp_path)
    await make_backup(config, file)
    write = data_dir.write_private

    def full(path: Path, data: bytes) -> None:
        if path.name == "ca.crt":
            raise StateError("the disk is full")
        write(path, data)

    with monkeypatch.context() as killed:
        killed.setattr(data_dir, "write_private", full)
        with pytest.raises(StateError, match="full"):
            await restore_backup(new, file)
    assert (new.data_dir / "ca.key").exists()
    assert not (new.data_dir / "ca.crt").exists()
    await restore_backup(new, file)
    assert open_authority(new.data_dir).pin == open_authority(config.data_dir).pin


@pytest.mark.parametrize("broken", ["ca.key", "ca.crt"])
async def test_a_ca_that_cannot_be_read_is_replaced_with_overwrite_only(
    config: RelayConfig, tmp_path: Path, broken: str
) -> None:
    file, new = tmp_path / "file", elsewhere(config, tmp_path)
    await make_backup(config, file)
    open_authority(new.data_dir)
    (new.data_dir / broken).write_bytes(b"half")
    with pytest.raises(StateError, match=r"another CA.*--overwrite"):
        await restore_backup(new, file)
    await restore_backup(new, file, overwrite=True)
    assert open_authority(new.data_dir).pin == open_authority(config.data_dir).pin
    assert [path.read_bytes() for path in new.data_dir.glob(f"{broken}.replaced-*")] == [b"half"]


@pytest.mark.parametrize("cut", [0, 100, None, -20_000])
async def test_a_damaged_file_changes_nothing(config: RelayConfig, tmp_path: Path, cut: int | None) -> None:
    file = tmp_path / "file"
    await make_backup(config, file)
    data = file.read_bytes()
    file.write_bytes(data.replace(b"prod", b"Prod") if cut is None else data[:cut])
    new = elsewhere(config, tmp_path)
    with pytest.raises(StateError, match=r"no backup|damaged"):
        await restore_backup(new, file)
    assert not new.data_dir.exists()


async def test_a_newer_file_and_one_of_another_engine_are_refused_with_what_to_do(
    config: RelayConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    with monkeypatch.context() as newer:
        newer.setattr(backup, "FORMAT", 2)
        await make_backup(config, file)
    with pytest.raises(StateError, match="newer arcbridge"):
        await restore_backup(config, file)
    with tarfile.open(file) as archive:
        manifest = archive.extractfile("manifest.json")
        assert manifest is not None
        assert json.load(manifest)["kind"] == "sqlite"
    await make_backup(config, file, overwrite=True)
    fleet = replace(config, fleet=replace(config.fleet, servers=("nats://127.0.0.1:9",)))
    with pytest.raises(ConfigError, match="registry in sqlite"):
        await restore_backup(fleet, file)


async def test_a_disk_that_is_full_leaves_the_former_file_and_no_half_of_another(
    config: RelayConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StateError, match=r"cannot write .*No such file"):
        await make_backup(config, tmp_path / "none" / "file")
    place = tmp_path / "place"
    place.mkdir()
    (place / "file").write_bytes(b"former")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StateError, match=r"cannot write .*No space left"):
        await make_backup(config, place / "file", overwrite=True)
    assert [(one.name, one.read_bytes()) for one in place.iterdir()] == [("file", b"former")]


@pytest.mark.parametrize(
    "changed",
    [
        {"clusters": "1"},
        {"clusters_revoked": [1]},
        {"clusters_revoked": "prod"},
        {"files": []},
        {"made": 1e300},
        {"relay_ca_pin": "another"},
        {"more": 1},
        {"format": "1"},
    ],
    ids=str,
)
async def test_a_manifest_that_a_stranger_wrote_is_refused(
    config: RelayConfig, tmp_path: Path, changed: dict[str, object]
) -> None:
    file = tmp_path / "file"
    await make_backup(config, file)
    files = backup._unpack(file, file.read_bytes())
    files["manifest.json"] = json.dumps(json.loads(files["manifest.json"]) | changed).encode()
    file.write_bytes(backup._pack(files, 0))
    with pytest.raises(StateError, match=r"no backup|damaged"):
        await read_backup(file, None)


async def test_a_file_in_a_backup_is_not_larger_than_the_backup(tmp_path: Path) -> None:
    """GNU's sparse files expand to what their header says: 1 TiB from 2 KiB."""
    sparse = tarfile.TarInfo("registry")
    sparse.size = 512
    said = {"major": "1", "minor": "0", "name": "registry", "realsize": str(1 << 40)}
    sparse.pax_headers = {f"GNU.sparse.{name}": value for name, value in said.items()}
    with tarfile.open(tmp_path / "file", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(sparse, io.BytesIO(b"1\n1099511627775\n1\n".ljust(512, b"\0")))
    with pytest.raises(StateError, match="no backup"):
        await read_backup(tmp_path / "file", None)


async def test_every_file_that_the_settings_name_is_in_it_under_a_name_of_its_own(
    config: RelayConfig, tmp_path: Path
) -> None:
    paths = {}
    for name in ("tls.key", "fleet.key", "graph.a.key_file", "graph.b.client_secret_file"):
        directory = tmp_path / name
        directory.mkdir()
        paths[name] = directory / ("x" * 120 if name.startswith("graph.b") else "key.pem")
        paths[name].write_text(name)
        paths[name].chmod(0o600)
    config = replace(
        config,
        tls=replace(config.tls, key=paths["tls.key"]),
        fleet=replace(config.fleet, key=paths["fleet.key"]),
        graph={
            "a": GraphConfig(key_file=paths["graph.a.key_file"], ca_file=paths["fleet.key"]),
            "b": GraphConfig(client_secret_file=paths["graph.b.client_secret_file"]),
        },
    )
    await make_backup(config, tmp_path / "file")
    await restore_backup(elsewhere(config, tmp_path), tmp_path / "file", settings=tmp_path / "settings")
    found = {path.name: path.read_text() for path in (tmp_path / "settings").iterdir()}
    restored = {name: text for name, text in found.items() if not name.endswith((".toml", ".yaml"))}
    assert restored == {
        "key.pem": "tls.key",
        "fleet.key-key.pem": "fleet.key",
        "graph.a.key_file-key.pem": "graph.a.key_file",
        "x" * 120: "graph.b.client_secret_file",
    }


def take(config: RelayConfig, step: str) -> None:
    change_authority(config.data_dir, lambda state: state.take(step, time.time()))


async def test_a_rotation_goes_on_where_a_restore_has_brought_it_back(config: RelayConfig, tmp_path: Path) -> None:
    files = [tmp_path / "before", tmp_path / "next", tmp_path / "activate"]
    await make_backup(config, files[0])
    for file in files[1:]:
        take(config, file.name)
        await make_backup(config, file)
    here = open_authority(config.data_dir)
    for file in files[1:]:
        new = replace(config, data_dir=tmp_path / f"as of {file.name}")
        done = await restore_backup(new, file)
        found = open_authority(new.data_dir)
        assert found.pin == done.manifest.relay_ca_pin
        assert found.trusted_pem == here.trusted_pem
        assert (found.succession.pins, found.pin == here.pin) == (here.succession.pins, file == files[2])
        while (state := read_rotation(new.data_dir)).step != "next":
            take(new, state.step)
        assert open_authority(new.data_dir).pin == here.pin, "the next CA is the one that was announced"
    # An older backup takes no CA away that ends have followed to, and a later one brings it.
    kept = read_ca(config.data_dir)
    await restore_backup(config, files[0], overwrite=True)
    assert read_ca(config.data_dir) == kept
    older = replace(config, data_dir=tmp_path / "older")
    await restore_backup(older, files[0])
    await restore_backup(older, files[2], overwrite=True)
    assert read_ca(older.data_dir) == kept
    # Another CA replaces all of it.
    other = replace(config, data_dir=tmp_path / "other")
    open_authority(other.data_dir)
    await (await open_registry(other.data_dir)).close()
    await make_backup(other, tmp_path / "foreign")
    await restore_backup(config, tmp_path / "foreign", overwrite=True)
    assert open_authority(config.data_dir).pin == open_authority(other.data_dir).pin
    assert not (config.data_dir / "ca-rotation.json").exists()


async def test_of_two_states_of_one_rotation_the_later_one_comes(config: RelayConfig, tmp_path: Path) -> None:
    file = tmp_path / "file"
    await make_backup(config, file)
    for step in ("next", "activate", "retire"):
        new = replace(config, data_dir=tmp_path / f"before {step}")
        await restore_backup(new, file)
        take(config, step)
        await make_backup(config, file, overwrite=True)
        await restore_backup(new, file, overwrite=True)
        assert open_authority(new.data_dir).succession == open_authority(config.data_dir).succession


async def test_a_fork_of_the_same_ca_is_another_one(config: RelayConfig, tmp_path: Path) -> None:
    """Two relays that share a CA, at each of which an operator has made the next one."""
    other, file = elsewhere(config, tmp_path), tmp_path / "file"
    await make_backup(config, file)
    await restore_backup(other, file)
    for one in (config, other):
        take(one, "next")
    await make_backup(config, file, overwrite=True)
    kept = read_ca(other.data_dir)
    with pytest.raises(StateError, match=r"another CA.*--overwrite"):
        await restore_backup(other, file)
    await restore_backup(other, file, overwrite=True)
    assert open_authority(other.data_dir).succession == open_authority(config.data_dir).succession
    aside = {path.name.partition(".replaced")[0]: path.read_bytes() for path in other.data_dir.glob("ca*.replaced-*")}
    assert aside == kept
