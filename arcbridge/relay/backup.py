"""Backs up what a relay cannot be without, into one file, and brings it back.

The file is a tar archive: `manifest.json` (what it is, when it was made, the SHA-256 of the rest), the relay's CA with
what is kept of its rotation, the registry as it was at one moment, and the settings file with files that it names, for
a machine that lost them too.
With recipients it is sealed in the format of age (`arcbridge.sealing`); `age -d` and
`tar` read it where arcbridge is gone. The relay goes on while a backup is made. At a restore neither it nor another
relay of its fleet may run.

Invariants: a restore is whole or absent as far as the registry goes; nothing is replaced without `overwrite`; a
revocation that the replaced registry had stays; and a restored registry says of itself that revocations may be missing
(`relay.recovery`) and lets no join token of the backup be used.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Final

from arcbridge import __version__
from arcbridge.errors import ConfigError, PinMismatch, SealingError, StateError
from arcbridge.observe.untrusted_text import printable
from arcbridge.pki.authority import CERTIFICATE_FILE, KEY_FILE, Authority
from arcbridge.pki.private_files import ensure_private_directory, read_file, write_private
from arcbridge.pki.rotation import Rotation
from arcbridge.relay.audit.commands import acting
from arcbridge.relay.backend import registry_of, running_relays
from arcbridge.relay.data_dir import ROTATION_FILE, instance_lock, read_authority, read_ca, write_ca
from arcbridge.relay.registry.base import Recovery
from arcbridge.sealing.age import open_sealed, parse_identities, parse_recipient, seal
from arcbridge.sealing.recipients import Recipient
from arcbridge.settings.config import RelayConfig
from arcbridge.settings.named_files import is_directory, is_there
from arcbridge.units import rfc3339
from arcbridge.untrusted_json import read_json

FORMAT: Final = 1
MOST: Final = 1024 * 1024 * 1024
"""Bytes of a backup that is read; 10 000 clusters with 10 000 revoked users take some 30 MB."""
MOST_MANIFEST: Final = 64 * 1024 * 1024
"""Bytes of its manifest, which names the clusters that are revoked."""
LATEST: Final = 253402300800.0
"""Unix seconds behind every date that can be printed."""
MANIFEST, REGISTRY, SETTINGS = "manifest.json", "registry", "settings/"
_AGE: Final = b"age-encryption.org/v1"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup contains."""

    format: int
    made: float
    """Unix seconds."""
    version: str
    """Of the arcbridge that made it."""
    kind: str
    """What the registry is kept in: `sqlite`, or `nats`."""
    schema: int
    relay_ca_pin: str
    clusters: int
    clusters_revoked: list[str]
    users_revoked: int
    tokens_open: int
    files: dict[str, str]
    """SHA-256 (hex) by name."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What came of a restore."""

    manifest: Manifest
    awaited: int = 0
    """Clusters from which later revocations may come back."""
    kept: int = 0
    """Revocations that only the replaced registry had."""


async def make_backup(
    config: RelayConfig,
    path: Path,
    *,
    settings_file: Path | None = None,
    recipients: Sequence[str] = (),
    overwrite: bool = False,
) -> Manifest:
    """Write a backup to `path`, 0600. Raises `ConfigError`, `StateError`, `RegistryUnavailable`."""
    if is_there(path) and not overwrite:
        raise StateError(f"{path} is there already: choose another name, or give --overwrite")
    keys = [_recipient(text) for text in recipients]
    if await asyncio.to_thread(read_authority, config.data_dir) is None:
        raise StateError(f"there is no CA in {config.data_dir}: is data_dir right, and has the relay ever run?")
    ca = await asyncio.to_thread(read_ca, config.data_dir)
    async with registry_of(config, must_exist=True) as registry:
        now = time.time()
        # The numbers first: what changes meanwhile is in the registry, and only a number is behind.
        clusters, users = await registry.clusters(), await registry.user_revocations()
        revoked, tokens = await registry.revocations(), await registry.list_join_tokens()
        snapshot = await registry.snapshot()
    files = {**ca, REGISTRY: snapshot.data, **_settings(config, settings_file)}
    manifest = Manifest(
        format=FORMAT,
        made=now,
        version=__version__,
        kind=snapshot.kind,
        schema=snapshot.schema,
        relay_ca_pin=authority_of(ca).pin,
        clusters=len(clusters),
        clusters_revoked=sorted(revoked),
        users_revoked=len(users),
        tokens_open=sum(one.used < one.uses and one.expires_at > now for one in tokens),
        files={name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    )
    packed = _pack({MANIFEST: json.dumps(asdict(manifest), indent=2).encode(), **files}, now)
    # The file has the CA's key: who made it, and for whom it can be read, is worth a record.
    async with acting(config, "backup", file=str(path), recipients=list(recipients)):
        if keys:
            packed = await asyncio.to_thread(seal, keys, packed)
        await asyncio.to_thread(write_private, path, packed)
    return manifest


async def read_backup(path: Path, identity: Path | None) -> tuple[Manifest, Mapping[str, bytes]]:
    """Return what a backup contains, checked. Raises `StateError`, and `ConfigError` where a key is missing."""
    data = await asyncio.to_thread(read_file, path, limit=MOST)
    if data is None:
        raise StateError(f"{path} does not exist")
    if data.startswith(_AGE):
        if identity is None:
            raise ConfigError(f"{path} is encrypted: give the key of one of its recipients, with --identity FILE")
        data = await asyncio.to_thread(_decrypt, path, data, identity)
    files = _unpack(path, data)
    try:
        manifest = _manifest(path, read_json(files.pop(MANIFEST), MOST_MANIFEST))
        authority = authority_of(files)
        whole = {name: hashlib.sha256(one).hexdigest() for name, one in files.items()} == manifest.files
        whole = whole and authority.pin == manifest.relay_ca_pin
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"{path} is no backup of a relay") from error
    if not whole or REGISTRY not in files:
        raise StateError(f"{path} is damaged: what it holds is not what was put into it")
    return manifest, files


def _manifest(path: Path, found: Any) -> Manifest:
    """Return a manifest of which every field has its type, for a stranger may have written it. Raises ValueError, and
    `StateError` for one of a newer arcbridge."""
    match found:
        case {"format": int(number), "version": str(version)} if number > FORMAT:
            raise StateError(f"{path} was made by a newer arcbridge ({printable(version, 64)}): restore it with that")
        case {
            "format": int(),
            "made": int() | float() as made,
            "version": str(),
            "kind": str(),
            "schema": int(),
            "relay_ca_pin": str(),
            "clusters": int(),
            "clusters_revoked": list(revoked),
            "users_revoked": int(),
            "tokens_open": int(),
            "files": dict(files),
        } if 0 <= made < LATEST and all(isinstance(one, str) for one in (*revoked, *files.values())):
            return Manifest(**found)
    raise ValueError("no manifest")


async def restore_backup(
    config: RelayConfig,
    path: Path,
    *,
    identity: Path | None = None,
    overwrite: bool = False,
    settings: Path | None = None,
    beside_relays: bool = False,
) -> Restored:
    """Put what a backup contains where the settings say. Raises `ConfigError`, `StateError`, `RegistryUnavailable`.

    `beside_relays`: also while relays of the fleet run.
    """
    manifest, files = await read_backup(path, identity)
    kind = "nats" if config.fleet.servers else "sqlite"
    if manifest.kind != kind:
        raise ConfigError(f"{path} has a registry in {manifest.kind}, and by its settings this relay has one in {kind}")
    if not beside_relays and (running := await running_relays(config)):
        raise StateError(
            f"relays of this fleet run now ({', '.join(running)}): stop every one of them, because each would go on "
            "with what it has read of the registry, and write to it while it is replaced; or give --yes"
        )
    with instance_lock(config.data_dir):
        made = rfc3339(manifest.made)
        async with acting(config, "restore", file=str(path), made=made, overwrite=overwrite) as result:
            restored = await _replace(config, manifest, files, overwrite)
            result.update(awaited=restored.awaited, kept=restored.kept)
    if settings is not None:
        _write_settings(files, settings)
    return restored


async def _replace(config: RelayConfig, manifest: Manifest, files: Mapping[str, bytes], overwrite: bool) -> Restored:
    """Replace CA and registry by those of a backup."""
    mended, foreign = await asyncio.to_thread(_compare_ca, config.data_dir, files)
    if foreign and not overwrite:
        raise StateError(f"{config.data_dir} has another CA, which agents and clients may know, or one that cannot be "
                         "read: give --overwrite to replace it")  # fmt: skip
    async with registry_of(config) as registry:
        if not overwrite and (await registry.clusters() or await registry.access_changes()):
            raise StateError("there is a registry with clusters or revocations: give --overwrite to replace it; "
                             "its revocations are kept, and the rest is written to registry.replaced-TIME")  # fmt: skip
        former, now = await registry.access_changes(), time.time()
        if former or await registry.clusters():
            replaced = await registry.snapshot()
            await asyncio.to_thread(_set_aside, config.data_dir, "registry", replaced.data, now)
        for name, data in read_ca(config.data_dir).items() if foreign else ():
            _set_aside(config.data_dir, name, data, now)
        if mended or foreign:
            write_ca(config.data_dir, files)
        kept = await registry.replace(files[REGISTRY], Recovery("restored", now, backup=manifest.made), former)
        awaited = [one for one in await registry.clusters() if not one.revoked]
        return Restored(manifest, len(awaited), sum(one.before > 0 for one in kept))


def authority_of(files: Mapping[str, bytes]) -> Authority:
    """Return the CA of a backup. Raises `StateError`, `KeyError` and `ValueError`."""
    certificate, key = files[CERTIFICATE_FILE].decode(), files[KEY_FILE].decode()
    if ROTATION_FILE not in files:
        return Authority.load(certificate, key)
    return Rotation.decode(files[ROTATION_FILE], certificate).authority()


def _compare_ca(directory: Path, files: Mapping[str, bytes]) -> tuple[bool, bool]:
    """Return whether the CA of a backup has to be written, and whether a foreign one is in its place.

    Of two states of one rotation the later one stays, or is written. What a restore has left that was killed between
    its files is the backup's own, and completed.
    """
    found, backed = read_ca(directory), authority_of(files).succession
    try:
        present = read_authority(directory)
    except StateError:
        present = None
    if present is None:
        return True, not all(data == files.get(name) for name, data in found.items())
    try:
        followed = present.succession.follow(backed, "the relay's CA", retire=True)
    except (PinMismatch, ConfigError):
        return False, True
    return followed != present.succession, False


def _set_aside(directory: Path, name: str, data: bytes, now: float) -> None:
    """Write what is to be replaced beside it, and over no former one: that may hold the only copy."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    path, number = directory / f"{name}.replaced-{stamp}", 1
    while is_there(path):
        number += 1
        path = directory / f"{name}.replaced-{stamp}-{number}"
    write_private(path, data)


def _settings(config: RelayConfig, settings_file: Path | None) -> dict[str, bytes]:
    """Return the settings file and the files that it names, by their names in a backup."""
    named = [] if settings_file is None else [("settings", settings_file)]
    found: dict[str, bytes] = {}
    taken: dict[str, Path] = {}
    for setting, path in (*named, *_paths(config)):
        if is_directory(path) or path in taken.values() or (data := read_file(path)) is None:
            continue
        # Two settings may name files of one name in two directories.
        name = f"{SETTINGS}{setting}-{path.name}" if f"{SETTINGS}{path.name}" in found else f"{SETTINGS}{path.name}"
        found[name], taken[name] = data, path
    return found


def _paths(settings: Any, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Yield each setting that is a path, by its name."""
    for field in fields(settings):
        value, name = getattr(settings, field.name), f"{prefix}{field.name}"
        if isinstance(value, Path):
            yield name, value
        elif is_dataclass(value):
            yield from _paths(value, f"{name}.")
        elif isinstance(value, dict):
            for key, each in value.items():
                if is_dataclass(each):
                    yield from _paths(each, f"{name}.{key}.")


def _write_settings(files: Mapping[str, bytes], directory: Path) -> None:
    found = {directory / Path(name).name: data for name, data in files.items() if name.startswith(SETTINGS)}
    ensure_private_directory(directory)
    for path, data in found.items():
        if is_there(path):
            raise StateError(f"{path} is there already: give another directory with --settings; the rest is restored")
        write_private(path, data)


def _pack(files: Mapping[str, bytes], now: float) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(data), 0o600, int(now)
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def _unpack(path: Path, data: bytes) -> dict[str, bytes]:
    found, left = {}, len(data)
    try:
        # "r:": a compressed archive is none of ours, and might be larger than its file.
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for entry in archive:
                # A sparse one expands, and may be larger than its file, too.
                left -= entry.size
                if entry.issparse() or left < 0:
                    raise ValueError("larger than its file")
                file = archive.extractfile(entry) if entry.isreg() else None
                if file is not None:
                    found[entry.name] = file.read()
    except (tarfile.TarError, OverflowError, ValueError, EOFError) as error:
        raise StateError(f"{path} is no backup of a relay, or damaged") from error
    return found


# --- encryption -----------------------------------------------------------------------------------------------------


def _recipient(text: str) -> Recipient:
    try:
        return parse_recipient(text)
    except SealingError as error:
        raise ConfigError(f"--recipient: {error.message}") from error


def _decrypt(path: Path, data: bytes, identity: Path) -> bytes:
    text = read_file(identity)
    if text is None:
        raise ConfigError(f"--identity: {identity} does not exist")
    try:
        keys = parse_identities(text)
    except SealingError as error:
        raise ConfigError(f"--identity: {identity}: {error.message}") from error
    try:
        return b"".join(open_sealed(io.BytesIO(data).read, keys))
    except SealingError as error:
        raise StateError(f"{path}, opened with {identity}: {error.message}") from error
