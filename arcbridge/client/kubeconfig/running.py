"""Knows which processes of this user serve clusters now, and repairs the kubeconfigs that name others.

Each process holds a lock for as long as it lives. The kernel frees a lock when its process ends, however it ends, and
no number is used twice: a process id would be another program's one day. The names of the processes stand in the marks
of the kubeconfig's entries. Each command of ours that has to do with contexts repairs first; what cannot be repaired is
logged, and holds up no command.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.client.kubeconfig.entries import Kubeconfig
from arcbridge.client.state import StateDirectory
from arcbridge.errors import ArcbridgeError, StateError
from arcbridge.pki.private_files import ensure_private_directory, try_lock

BACKGROUND = "background"
"""The name of the background process, which stays the same when another one takes its place."""
LOCKS = f"[0-9]*-{'[0-9a-f]' * 16}"
"""Which files of the directory are locks of processes."""


class Running:
    """The processes that serve, in one state directory; `background_lock` is the lock of the background process."""

    def __init__(self, directory: Path, background_lock: Path | None = None) -> None:
        self._directory = directory
        self._background_lock = background_lock
        self._held: tuple[Path, int] | None = None

    def begin(self) -> str:
        """Take part; returns this process's name, which is alive until `end` or the end of the process.

        Raises StateError.
        """
        if self._held is None:
            ensure_private_directory(self._directory)
            path = self._directory / f"{os.getpid()}-{secrets.token_hex(8)}"
            descriptor = try_lock(path)
            if descriptor is None:
                raise StateError(f"cannot lock {path}")
            self._held = path, descriptor
        return self._held[0].name

    def end(self) -> None:
        """Take part no more."""
        if self._held is not None:
            path, descriptor = self._held
            self._held = None
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)

    def alive(self, name: str) -> bool:
        """Return whether the process of that name serves now."""
        if self._held is not None and self._held[0].name == name:
            return True
        if not name:
            return False
        path = self._background_lock if name == BACKGROUND else self._directory / os.path.basename(name)
        if path is None:
            return False
        held = _is_held(path)
        if not held and name != BACKGROUND:
            with suppress(OSError):
                path.unlink()
        return held

    def serving(self) -> list[str]:
        """Return the names of the processes that serve now besides the background process; removes nothing."""
        return [path.name for path in sorted(self._directory.glob(LOCKS)) if _is_held(path)]


def _is_held(path: Path) -> bool:
    """Return whether a process holds the lock; one that cannot be read counts as held, so that its entries stay."""
    if not path.exists():
        return False
    try:
        descriptor = try_lock(path)
    except StateError:
        return True
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


def running_of(state: StateDirectory, environment: Mapping[str, str]) -> Running:
    """Return which processes serve what stands in the kubeconfigs of this user."""
    return Running(state.path / "running", Path(BackgroundPaths.find(environment).process_lock))


def repair_kubeconfigs(state: StateDirectory, running: Running) -> list[str]:
    """Let no context point at the port of a process that ended without a word, or at a program that is gone; returns a
    sentence for each."""
    repaired: list[str] = []
    for files in state.kubeconfigs():
        kubeconfig = Kubeconfig(files)
        try:
            dead = kubeconfig.repair(running.alive)
            repaired += [f'what served context "{name}" had ended; the kubeconfig says so now' for name in dead]
            healed = kubeconfig.heal()
            repaired += [f'context "{name}" runs arcbridge where it is installed now' for name in healed]
            if not kubeconfig.has_ours():
                state.drop_kubeconfig(files)
        except ArcbridgeError as error:
            import structlog

            structlog.get_logger("arcbridge.client").warning("a kubeconfig was not repaired", reason=error.message)
    return repaired


def repair_contexts(state_dir: Path | None, environment: Mapping[str, str]) -> list[str]:
    """Repair what a state directory knows (None: the user's own); returns a sentence for each context. Raises
    StateError."""
    state = StateDirectory.find(state_dir, environment)
    return repair_kubeconfigs(state, running_of(state, environment))
