"""Keeps the connections in the state directory, so that a process that starts serves what the last one served.

It serves nothing, and does not check whether the settings of a connection still work. Invariant: a change is made
under the file's lock and replaces the file at once, so that of two programs that change it neither loses a connection.

The list leads to all kubeconfigs of a user, and so `repair_all` is here: no context of ours is left at the port of a
process that is gone, and what cannot be looked at of one connection holds up no other one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arcbridge.client.background.connection_settings import ConnectionSettings, read_document, read_words
from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.client.kubeconfig.running import repair_contexts
from arcbridge.errors import ArcbridgeError, ConfigError, StateError
from arcbridge.pki.private_files import ensure_private_directory, locked, read_file, write_private


@dataclass(frozen=True, slots=True)
class Connection:
    """One cluster that is connected, as one context knows it. Nothing in it is secret."""

    settings: ConnectionSettings
    cluster: str
    context: str
    kubeconfig: tuple[str, ...] = ()
    """The files that kubectl reads, absolute; empty: the kubeconfig was not written by `connect`."""
    static: bool = False
    """Whether the kubeconfig holds a client certificate instead of the plugin."""


class Connections:
    """The list in one file. Every method raises StateError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def all(self) -> list[Connection]:
        data = read_file(self._path)
        try:
            return [
                Connection(
                    _settings_of(one),
                    str(one["cluster"]),
                    str(one["context"]),
                    tuple(map(str, one.get("kubeconfig", ()))),
                    one.get("static") is True,
                )
                for one in (json.loads(data) if data else [])
            ]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise StateError(f"{self._path} is damaged: remove it, and connect the clusters again") from None

    def add(self, connection: Connection) -> None:
        """Keep a connection, in the place of those whose place it takes."""

        def change(kept: list[Connection]) -> list[Connection]:
            if not connection.kubeconfig and any(one.settings == connection.settings for one in kept):
                return kept  # one whose kubeconfig is known says all of it, and more
            return [*(one for one in kept if not same_place(one, connection)), connection]

        self._change(change)

    def remove(self, connection: Connection) -> None:
        self._change(lambda kept: [one for one in kept if one != connection])

    def _change(self, change: Callable[[list[Connection]], list[Connection]]) -> None:
        ensure_private_directory(self._path.parent)
        with locked(self._path.with_name(f".{self._path.name}.lock")):
            kept = self.all()
            changed = change(kept)
            if changed != kept:
                document = json.dumps(
                    [{**asdict(one), "settings": one.settings.document()} for one in changed], indent=1
                )
                write_private(self._path, document.encode())


def same_place(one: Connection, other: Connection) -> bool:
    """Return whether `other` takes the place of `one`: they are one context in the same files, or the files of `one`
    are gone, as those of jobs, and plugins with its settings have `other` all the same."""
    if not one.kubeconfig or not other.kubeconfig:
        return one.settings == other.settings
    if one.settings == other.settings and not one.static and not any(map(os.path.exists, one.kubeconfig)):
        return True
    return (one.context, one.kubeconfig) == (other.context, other.kubeconfig)


def _settings_of(kept: Mapping[str, Any]) -> ConnectionSettings:
    # Releases before December 2026 kept flags. This goes on 2027-03-01, with its test.
    if "arguments" in kept:
        words = tuple(map(str, kept["arguments"]))
        try:
            return read_words(words)
        except ConfigError:
            return ConnectionSettings((("arguments", words),))  # it cannot be loaded, and says what to do
    return read_document(kept["settings"])


def repair_all(state_dir: Path | None, environment: Mapping[str, str]) -> Iterator[str]:
    """Repair what the state directory of this command knows, and those of all that is connected; yields sentences.

    Raises StateError for that of this command; what cannot be looked at of the others is a sentence.
    """
    yield from repair_contexts(state_dir, environment)
    looked_at, of_file = {state_dir}, dict[str, Path | None]()
    for one in connected(BackgroundPaths.find(environment)):
        named, file = one.settings.get("state_dir"), one.settings.file
        try:
            if named is None and file and file not in of_file:
                of_file[file] = one.settings.load(environment).state_dir
            directory = Path(str(named)) if named is not None else of_file.get(file)
            if directory not in looked_at:
                looked_at.add(directory)
                yield from repair_contexts(directory, environment)
        except ArcbridgeError as error:
            yield (
                f'the kubeconfigs of "{one.cluster}" were not looked at: {error.message}; '
                f"`arcbridge disconnect {one.cluster}` forgets it"
            )


def connected(place: BackgroundPaths) -> list[Connection]:
    """Return what is connected; nothing where the list cannot be read, which the process says."""
    try:
        return Connections(Path(place.connections)).all()
    except StateError:
        return []
