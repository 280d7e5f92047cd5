"""Takes away what the client keeps of a user on this machine: processes, contexts, logins, ports, keys, pins, a unit.

It removes files that have the place and the name of what arcbridge makes, and directories that are empty then; nothing
else that lies beside them, because a user may name any directory (docs/threats.md#W23). Settings that the user wrote,
backups of kubeconfigs, kubectl's own caches and the program itself are left. Invariant: state is removed only after all
that needs it is done, so that an uninstallation which failed can be tried again.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

from arcbridge.client.background import caller
from arcbridge.client.background.connections import Connection, connected
from arcbridge.client.background.lock_holder import is_held
from arcbridge.client.background.removal import disconnect
from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.client.commands.sign_in import log_out, with_profile
from arcbridge.client.credentials.identity_summary import cache_of
from arcbridge.client.kubeconfig.entries import Kubeconfig
from arcbridge.client.kubeconfig.file import BACKUP_SUFFIX
from arcbridge.client.kubeconfig.running import LOCKS, running_of
from arcbridge.client.relay.relay_profile import RelayProfile, RelayProfiles, apply
from arcbridge.client.state import StateDirectory
from arcbridge.errors import ArcbridgeError, ConfigError, StateError
from arcbridge.pki.names import is_cluster_name
from arcbridge.pki.private_files import others_may_use, read_file, refuse_foreign_directory, try_lock
from arcbridge.settings.config import ClientConfig
from arcbridge.settings.role_settings import find_file
from arcbridge.settings.user_directories import user_directory

UNIT = "arcbridge-client.service"
_HEX = "[0-9a-f]"
_STATE = {
    ".pins.toml.lock": ("pins.toml",),
    ".ports.lock": ("ports.json",),
    ".kubeconfigs.lock": ("kubeconfigs.json",),
    "round-trips.lock": ("round-trips.json",),
    ".clusters.lock": (f"clusters/*@{_HEX * 16}.json",),
    "local-ca/.ca.lock": ("local-ca/ca.crt", "local-ca/ca.key"),
    "relays/.lock": tuple(f"relays/*_[0-9]*/{name}" for name in ("ca.pem", "issuer-ca.pem", "profile.json")),
    "successions/.lock": (f"successions/{_HEX * 64}.pem",),
}
"""Files of the state directory, by the lock under which arcbridge writes them: where that is absent they are another
program's."""
_CACHE = {"clusters": is_cluster_name, "update-notice": str.isdecimal}
"""Files of the cache, and what each word of theirs is."""
_SHOWN = 5
"""Names of other files that are said."""


@dataclass(frozen=True, slots=True)
class Installed:
    """What there is of a user on this machine."""

    state: StateDirectory
    place: BackgroundPaths
    cache: Path
    """The user's own cache directory, where a single-file client unpacks itself, whatever the state directory."""
    whole: bool
    """Whether the background process and what it keeps go too; not where the user names one state directory."""
    named: bool
    """Whether a setting names the state directory, which the user may have made."""
    connections: list[Connection]
    kubeconfigs: list[list[Path]]
    """The lists of files with entries of ours."""
    logins: list[RelayProfile]
    unit: Path | None
    """The unit of the user's systemd that starts the background process."""
    left: list[str]
    """What is not removed, a sentence each; `uninstall` adds what it finds out."""

    @property
    def paths(self) -> list[Path]:
        """The files of arcbridge's own, each lock behind what it is for, and the directories of unpacked programs."""
        state = self.state.path
        found = _found(state, f"running/{LOCKS}")
        for lock, names in _STATE.items():
            if (state / lock).is_file():
                found += _found(state, *names, lock)
        cache = self.state.cache
        for lock in sorted(path.stem for path in cache.glob(f"tokens/{_HEX * 32}.lock")):
            names = (f"{lock}.json", f"{lock}.key", f".{lock}.key.lock", f"{lock}.lock")
            found += _found(cache / "tokens", *names)
        found += _found(cache, *(name for name, is_own in _CACHE.items() if _is_list(cache / name, is_own)))
        if self.whole:
            place = self.place
            kept = Path(place.log), Path(f"{place.log}.1"), Path(place.connections)
            locks = Path(place.state, ".connections.json.lock"), Path(place.start_lock), Path(place.process_lock)
            runtime = () if self._foreign_runtime() else (Path(place.socket), Path(place.silent), Path(place.told))
            found += [path for one in (*runtime, *kept, *locks) for path in _found(one.parent, one.name)]
            programs = self.cache.glob(f"program/arcbridge-*-{_HEX * 16}")
            found += [path for path in sorted(programs) if (path / "arcbridge").is_file() and not path.is_symlink()]
        return found

    @property
    def directories(self) -> list[Path]:
        """The directories that hold all of it, those inside of others first."""
        more = (self.cache, Path(self.place.state)) if self.whole else ()
        return sorted({self.state.cache, self.state.path, *more}, key=lambda path: -len(path.parts))

    def _foreign_runtime(self) -> bool:
        try:
            self.place.refuse_foreign_runtime()
        except StateError:
            return True
        return False

    def empty_directories(self) -> Iterator[Path]:
        """Yield the directories that arcbridge makes for itself alone and in which nothing is, those inside first."""
        state, cache = self.state.path, self.state.cache
        yield from (state / "relays").glob("*_[0-9]*")
        yield from (state / name for name in ("clusters", "local-ca", "relays", "running", "successions"))
        yield cache / "tokens"
        if self.whole:
            yield self.cache / "program"
            if not self._foreign_runtime():
                yield Path(self.place.runtime)
        yield from (path for path in self.directories if path != state or not self.named)


def survey(config: ClientConfig, environment: Mapping[str, str], *, whole: bool = True) -> Installed:
    """Look at what there is; changes nothing.

    `whole`: not one state directory alone, which a flag names, but all of this user. Raises StateError while something
    serves contexts out of the directory.
    """
    state, place = StateDirectory.find(config.state_dir, environment), BackgroundPaths.find(environment)
    _refuse_serving(state, environment)
    if whole:
        refuse_foreign_directory(Path(place.state))
    connections = connected(place)
    left = [f"settings that you wrote: {file}"] if (file := find_file("client", environment)) is not None else []
    unit = user_directory("config", environment).parent / "systemd" / "user" / UNIT
    own, used = state.path.resolve(), [(one.context, _state_of(one, environment)) for one in connections]
    if whole:
        others = {other for _, other in used if other is not None and other != own}
        left += [f"the state directory {other}: `arcbridge uninstall --state-dir {other}`" for other in sorted(others)]
    else:
        for context, path in used:
            if path in (own, None):
                raise StateError(
                    f'context "{context}" needs what is in {state.path}: `arcbridge disconnect {context}`, and try '
                    "again"
                )
        if unit.exists() or Path(place.state).is_dir():
            left.append(f"the background process and what it keeps in {place.state}: `arcbridge uninstall` alone")
    kubeconfigs = [files for files in state.kubeconfigs() if any(file.exists() for file in files)]
    backups = (file.with_name(f"{file.name}{BACKUP_SUFFIX}") for files in kubeconfigs for file in files)
    left += [f"the backup {backup}" for backup in dict.fromkeys(backups) if backup.exists()]
    absent = dict.fromkeys(file for files in state.kubeconfigs() for file in files if not file.exists())
    left += [f"what contexts of arcbridge may be in {file}, which is not there now" for file in absent]
    return Installed(
        state,
        place,
        user_directory("cache", environment),
        whole,
        config.state_dir is not None,
        connections if whole else [],
        kubeconfigs,
        RelayProfiles(state.path).all(skip_damaged=True),
        unit if whole and unit.exists() else None,
        left,
    )


def _refuse_serving(state: StateDirectory, environment: Mapping[str, str]) -> None:
    for name in running_of(state, environment).serving():
        raise StateError(f"process {name.partition('-')[0]} serves a context: end it (Ctrl-C), and try again")


def _state_of(connection: Connection, environment: Mapping[str, str]) -> Path | None:
    """Return the state directory of a connection; None where its settings cannot be read."""
    named = connection.settings.get("state_dir")
    try:
        used = Path(str(named)) if named is not None else connection.settings.load(environment).state_dir
        return StateDirectory.find(used, environment).path.resolve()
    except ArcbridgeError:
        return None


async def uninstall(config: ClientConfig, found: Installed, environment: Mapping[str, str]) -> AsyncIterator[str]:
    """Remove it; yields a sentence for each part that is gone. Raises ArcbridgeError where one cannot be."""
    _refuse_serving(found.state, environment)
    lock, had_files = -1, bool(found.paths)
    if found.unit is not None:
        await asyncio.to_thread(_systemctl, "disable", "--now", UNIT)
        _remove(found.unit)
        _remove(found.unit.parent / "default.target.wants" / UNIT)
        await asyncio.to_thread(_systemctl, "daemon-reload")
        yield f"the unit {found.unit}"
    if found.whole and sys.platform != "win32":
        if is_held(found.place):
            with suppress(caller.NotRunning):
                caller.stop(found.place)
                yield "the background process"
        lock = _keep_out(found.place)
    try:
        for one in disconnect(Path(found.place.connections), (), environment, every=True) if found.whole else ():
            yield f'context "{one["context"]}"'
        # Where another state directory is served, its contexts are not of this CA, and may be at work.
        own_ca = (read_file(found.state.path / "local-ca" / "ca.crt") or b"").decode("utf-8", "replace")
        for files in found.kubeconfigs:
            for name in Kubeconfig(files).remove_all(own_ca, remains=found.whole):
                yield f'context "{name}"'
            if Kubeconfig(files).has_ours():
                found.left.append(
                    f"entries of arcbridge in {', '.join(map(str, files))} that are not from here, or edited"
                )
        async for sentence in _log_out(config, found, environment):
            yield sentence
        _refuse_serving(found.state, environment)
        for path in found.paths:
            _remove(path)
        if had_files:
            yield f"keys, pins, ports and tokens in {found.state.path} and {found.state.cache}"
        for directory in found.empty_directories():
            if directory.is_dir() and not others_may_use(directory.stat()):
                with suppress(OSError):  # something else is in it, or a link leads to it
                    directory.rmdir()
    finally:
        if lock >= 0:
            os.close(lock)
    outer = (one for one in found.directories if not {*found.directories} & {*one.parents})
    found.left.extend(_rest_of(one) for one in outer if one.is_dir())


async def _log_out(config: ClientConfig, found: Installed, environment: Mapping[str, str]) -> AsyncIterator[str]:
    """Have the issuers void the refresh tokens of all logins that the settings and the profiles name."""
    issuer = config.login.issuer
    logins = [(one.url, with_profile(ClientConfig(state_dir=config.state_dir), one)) for one in found.logins]
    if issuer:
        own = [apply(config, one) for one in found.logins if one.login.issuer == issuer]
        logins += [(issuer, one) for one in (*own, config)]
    for name, settings in logins:
        try:
            if not cache_of(settings, found.state).path.exists():
                continue
            forgotten, warning = await log_out(settings, environment)
        except ConfigError:
            continue  # the settings name no relay, and nothing is kept under these alone
        except ArcbridgeError as error:
            forgotten, warning = False, error.message
        if forgotten or warning:
            yield f"the login at {name}{f' ({warning})' if warning else ''}"
    if others := len(_found(found.state.token_directory, f"{_HEX * 32}.json")):
        found.left.append(
            f"{others} login{'' if others == 1 else 's'} at issuers that no settings here name: forgotten, but not "
            "revoked, so that a copy of the tokens is good until they end"
        )


def _keep_out(place: BackgroundPaths) -> int:
    """Take the lock of the background process, so that none begins meanwhile; -1: there is nothing to lock in."""
    if not os.path.isdir(place.state):
        return -1
    lock = try_lock(Path(place.process_lock))
    if lock is None:
        raise StateError("a background process has begun, or does not end: `arcbridge stop`, and try again")
    return lock


def _found(directory: Path, *patterns: str) -> list[Path]:
    """Return the files of these names, and what a crash has left of their replacement (`write_private`); no link."""
    names = [(name, str(PurePath(name).with_name(f".{PurePath(name).name}.{_HEX * 16}"))) for name in patterns]
    return [
        path
        for both in names
        for name in both
        for path in sorted(directory.glob(name))
        if not path.is_dir() and not path.is_symlink()
    ]


def _is_list(path: Path, is_own: Callable[[str], bool]) -> bool:
    """Return whether a file is this user's alone, as arcbridge makes its own, and each word of it passes."""
    try:
        return not others_may_use(path.stat()) and all(map(is_own, (read_file(path) or b"").decode().split()))
    except (OSError, StateError, UnicodeDecodeError):
        return False


def _rest_of(directory: Path) -> str:
    """Say what is in a directory that stays."""
    names = sorted(path.name for path in directory.iterdir())
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        f"what else is in {directory}: {', '.join(names[:_SHOWN])}{more}" if names else f"{directory}, which is empty"
    )


def _systemctl(*words: str) -> None:
    try:
        subprocess.run(["systemctl", "--user", *words], check=False, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        pass  # no systemd of this user runs, and the link in `default.target.wants` is all that it had


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StateError(f"cannot remove {error.filename or path}: {error.strerror}") from error
