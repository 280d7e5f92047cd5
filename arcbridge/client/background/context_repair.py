"""Repairs the kubeconfigs of all that is connected: no context of ours names the port of a process that is gone.

It knows the state directories by the settings of the connections, and repairs by `kubeconfig.running`. Invariant: what
cannot be looked at of one connection holds up no other one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from arcbridge.client.background.connections import Connection, Connections
from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.client.kubeconfig.running import repair_contexts
from arcbridge.errors import ArcbridgeError, StateError


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
