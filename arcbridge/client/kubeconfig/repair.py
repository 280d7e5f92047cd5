"""Repairs the kubeconfigs of this user: no context of ours is left at the port of a process that is gone.

Each command of ours that has to do with contexts does it first. What cannot be repaired is logged, and holds up no
command.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.client.kubeconfig.entries import Kubeconfig
from arcbridge.client.kubeconfig.running import Running
from arcbridge.client.state import StateDirectory
from arcbridge.errors import ArcbridgeError


def running_of(state: StateDirectory, environment: Mapping[str, str]) -> Running:
    """Return which processes serve what stands in the kubeconfigs of this user."""
    return Running(state.path / "running", Path(BackgroundPaths.find(environment).process_lock))


def repair_kubeconfigs(state: StateDirectory, running: Running) -> list[str]:
    """Let no context point at the port of a process that ended without a word; returns the names of those that did."""
    repaired: list[str] = []
    for files in state.kubeconfigs():
        kubeconfig = Kubeconfig(files)
        try:
            repaired += kubeconfig.repair(running.alive)
            if not kubeconfig.has_ours():
                state.drop_kubeconfig(files)
        except ArcbridgeError as error:
            import structlog

            log = structlog.get_logger("arcbridge.client")
            log.warning("a kubeconfig was not repaired", reason=error.message)
    return repaired


def repair_contexts(state_dir: Path | None, environment: Mapping[str, str]) -> list[str]:
    """Repair what a state directory knows (None: the user's own); returns a sentence for each context. Raises
    StateError."""
    state = StateDirectory.find(state_dir, environment)
    return [
        f'what served context "{name}" had ended; the kubeconfig says so now'
        for name in repair_kubeconfigs(state, running_of(state, environment))
    ]
