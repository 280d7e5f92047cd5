"""Runs a role's coroutine, on uvloop where it is installed, until a signal ends it, and reports to systemd."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from arcbridge.errors import ExitCode
from arcbridge.mux.memory import tune_allocator
from arcbridge.net.descriptors import limit, raise_limit
from arcbridge.tasks import first_error

T = TypeVar("T")


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; `signal` is its number. A command that does not catch it ends as after Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


def run_until_signal(main: Coroutine[Any, Any, T], *, terminal: bool = True) -> T:
    """Run `main` to its end. SIGINT and SIGTERM cancel it, once, so that it ends in order; the second one kills.

    SIGHUP, the end of the terminal, does the same; `terminal=False`: it does nothing.

    Raises Interrupted after such an end, otherwise what `main` raised.
    """
    received: list[int] = []
    hangup: int = getattr(signal, "SIGHUP", 0)

    async def watched() -> T:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None

        def on_signal(number: int) -> None:
            if received:
                if number == hangup:
                    return  # the shell and the kernel both tell of the end of a terminal
                os._exit(ExitCode.INTERRUPTED)
            received.append(number)
            notify("STOPPING=1")
            task.cancel()

        if sys.platform != "win32":
            for number in ending:
                loop.add_signal_handler(number, on_signal, number)
        try:
            return await main
        finally:
            if sys.platform != "win32":
                for number in ending:
                    loop.remove_signal_handler(number)

    ending = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32":
        if not terminal:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        elif signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup(1)
            ending.append(signal.SIGHUP)

    try:
        return _run(watched())
    except asyncio.CancelledError:
        if received:
            raise Interrupted(received[0]) from None
        raise


def run_until_drained(main: Callable[[asyncio.Event, asyncio.Event], Coroutine[Any, Any, None]]) -> ExitCode:
    """Run a role that drains: SIGINT or SIGTERM sets the first event (end in order), the next one the second (hurry).

    Returns the exit code: SIGTERM is the end that a service manager means. Raises what `main` raised.
    """
    received: list[int] = []

    reloads: list[signal.Signals] = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []

    async def watched() -> None:
        stopping, hurry = asyncio.Event(), asyncio.Event()

        def on_signal(number: int) -> None:
            received.append(number)
            if stopping.is_set():
                hurry.set()
            else:
                notify("STOPPING=1")
                stopping.set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal, number)
        # A reload before the role serves is none: it reads its settings just now. The role puts its own handler here.
        for number in reloads:
            loop.add_signal_handler(number, lambda: None)
        try:
            await main(stopping, hurry)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, *reloads):
                loop.remove_signal_handler(number)

    _run(watched())
    return ExitCode.INTERRUPTED if received[:1] == [signal.SIGINT] else ExitCode.DONE


def _run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` in a loop of its own; of errors that a task group has gathered the first one is raised."""
    _settle_memory()
    _raise_descriptor_limit()
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(main)
    except BaseExceptionGroup as group:
        raise first_error(group) from group


def _settle_memory() -> None:
    """Tune the allocator for bulk, and take what was imported, which lives as long as the process, from the collector.

    The garbage of the imports stays as well: 1,600 objects, and to find them would take 8 ms of each start.
    """
    tune_allocator()
    gc.freeze()
    gc.enable()  # `arcbridge/__main__.py` imports without it


def _raise_descriptor_limit() -> None:
    """Raise the soft limit of descriptors to the hard one: the soft limit is for programs that use select(2)."""
    before, now = limit(), raise_limit()
    if now != before:
        import structlog

        structlog.get_logger("arcbridge").info("may open more file descriptors", limit=now, limit_before=before)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's, or None for asyncio's own. ARCBRIDGE_LOOP=asyncio is for comparing the two."""
    if sys.platform == "win32":
        # The other loop there, asyncio's default, cannot wait for sockets that it does not read itself.
        return asyncio.SelectorEventLoop
    if os.environ.get("ARCBRIDGE_LOOP") == "asyncio":
        return None
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def notify(state: str) -> None:
    """Send a state to systemd (sd_notify(3)); without systemd do nothing."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address or sys.platform == "win32":
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(address)
            sock.sendall(state.encode())
    except OSError:
        pass  # the service manager is gone
