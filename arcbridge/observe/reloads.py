"""Reloads: SIGHUP has a running role read its settings again, and the log and a metric say what came of it.

This module hears the signal and counts; what a role takes over, and what needs a restart, its own `reload` decides.
Invariant: a reload that fails changes nothing. Reloads do not overlap: what is asked for meanwhile follows once.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from arcbridge.errors import ArcbridgeError
from arcbridge.observe.metrics import Metrics
from arcbridge.tasks import cancel_and_wait

RESULTS = ("ok", "failed")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a reload has done."""

    taken: tuple[str, ...] = ()
    """Settings, by path, and contents of files, by the setting that names the file, that hold from now on."""
    needs_restart: tuple[str, ...] = ()
    """Settings that were changed and hold from the next start on."""


def changed(old: Any, new: Any, path: str = "") -> list[str]:
    """Return the dotted paths at which two settings of one kind differ, in the order of the settings."""
    found = []
    for field in fields(old):
        here = f"{path}.{field.name}" if path else field.name
        before, after = getattr(old, field.name), getattr(new, field.name)
        if is_dataclass(before) and type(before) is type(after):
            found += changed(before, after, here)
        elif before != after:
            found.append(here)
    return found


def split(paths: list[str], reloadable: frozenset[str]) -> Outcome:
    """Part changed settings in those that a reload takes over and the others; a table stands for what is in it."""
    taken = [path for path in paths if path in reloadable or path.partition(".")[0] in reloadable]
    return Outcome(tuple(taken), tuple(path for path in paths if path not in taken))


def merged(running: Any, config: Any, reloadable: frozenset[str], path: str = "") -> Any:
    """Return what runs after a reload: the new settings where it takes them over, and the running ones elsewhere."""
    taken = {}
    for field in fields(running):
        here = f"{path}.{field.name}" if path else field.name
        before, after = getattr(running, field.name), getattr(config, field.name)
        if here in reloadable:
            taken[field.name] = after
        elif is_dataclass(before):
            taken[field.name] = merged(before, after, reloadable, here)
    return replace(running, **taken)


def digest(path: Path | None) -> str:
    """Return the hash of what a file holds, by which a reload sees that it has changed; "" for one that cannot be
    read."""
    try:
        return "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


class Reloads:
    """The reloads of one process; `start` on the running loop, `stop` at its end."""

    def __init__(self, role: str, reload: Callable[[], Awaitable[Outcome]]) -> None:
        """`reload` changes nothing when it raises."""
        self._log = structlog.get_logger(f"arcbridge.{role}")
        self._reload = reload
        self._running: asyncio.Task[None] | None = None
        self._again = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.counts = dict.fromkeys(RESULTS, 0)

    def register(self, metrics: Metrics) -> None:
        """Show the counts."""
        metrics.counter(
            "reloads_total", "Times that settings were read again, by result.", {"result": RESULTS}, lambda: self.counts
        )

    def start(self) -> None:
        """Reload at each SIGHUP from now on, where the platform has it."""
        number = getattr(signal, "SIGHUP", None)
        if number is not None and threading.current_thread() is threading.main_thread():
            self._loop = asyncio.get_running_loop()
            self._loop.add_signal_handler(number, self.request)

    async def stop(self) -> None:
        """Reload no more. A SIGHUP that comes now does nothing, where without a handler it would end the process."""
        if self._loop is not None:
            self._loop.add_signal_handler(signal.SIGHUP, lambda: None)
            self._loop = None
        if self._running is not None:
            await cancel_and_wait(self._running)

    def request(self) -> None:
        """Reload now, or once more after the reload that is under way."""
        if self._running is not None and not self._running.done():
            self._again = True
            return
        self._running = asyncio.get_running_loop().create_task(self._run(), name="reload")

    async def _run(self) -> None:
        while True:
            self._again = False
            await self._once()
            if not self._again:
                return

    async def _once(self) -> None:
        try:
            outcome = await self._reload()
        except ArcbridgeError as error:
            self.counts["failed"] += 1
            self._log.error("settings not reloaded", reason=error.message)
            return
        except Exception as error:
            self.counts["failed"] += 1
            self._log.error("settings not reloaded", reason=type(error).__name__, exc_info=True)
            return
        self.counts["ok"] += 1
        told = self._log.warning if outcome.needs_restart else self._log.info
        told("settings reloaded", taken=list(outcome.taken), needs_restart=list(outcome.needs_restart))
