"""Another program's process: what it finds in its environment, the signals it gets, its output and its exit code.

One program has this process's standard input, output and terminal, so that what it writes is all that is written.
Several have no input, and each line of their output begins with a name. Invariant: when `run` returns or raises, the
process has ended.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from arcbridge.errors import CommandNotFound
from arcbridge.settings.config import LoginConfig
from arcbridge.tasks import in_time

STOP_TIMEOUT = 5.0
"""Seconds between SIGTERM and SIGKILL for a program that is to end with us."""
LONGEST = 64 * 1024
"""Bytes of one line that are kept while its end has not come: a program that writes no line's end takes no memory."""
_READ = 64 * 1024
_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
_TOKEN_SERVICES = ("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_URL", "SYSTEM_ACCESSTOKEN")
"""With what jobs of GitHub Actions and Azure Pipelines ask for tokens, whatever its looks."""

Write = Callable[[int, bytes], None]
"""Writes bytes to descriptor 1 or 2; may block. Raises BrokenPipeError."""


def environment_for(environment: Mapping[str, str], directory: Path, cluster: str) -> dict[str, str]:
    """Return the environment of a program that is to reach `cluster` by the kubeconfig in `directory`.

    kubectl keeps what it knows of a server under the server's address, and the next command's port may be the same:
    so its cache is here too. Programs that ask a proxy for loopback are told not to.
    """
    found = {
        **environment,
        "KUBECONFIG": str(directory / "kubeconfig"),
        "KUBECACHEDIR": str(directory / "cache"),
        "ARCBRIDGE_CLUSTER": cluster,
    }
    if any(found.get(name) for name in _PROXIES):
        for name in ("NO_PROXY", "no_proxy"):
            found[name] = ",".join(filter(None, (found.get(name, ""), "127.0.0.1")))
    return found


def without_tokens(environment: Mapping[str, str], login: LoginConfig) -> dict[str, str]:
    """Return the environment of a program that is to have fewer rights than its user: without the settings of this
    client, and, where the platform gives the tokens, without each variable that holds one, or with which one is asked
    for. Files with tokens stay."""
    from arcbridge.client.credentials.environment_tokens import ENVIRONMENT
    from arcbridge.client.credentials.jwt_unverified import read_unverified

    by_platform = bool(login.workload or login.client_assertion_workload)
    names = set(_TOKEN_SERVICES)
    if login.workload.startswith(ENVIRONMENT):
        names.update(name.strip() for name in login.workload.removeprefix(ENVIRONMENT).split(","))

    def is_ours(name: str, value: str) -> bool:
        if name.startswith("ARCBRIDGE_"):
            return name != "ARCBRIDGE_CLUSTER"
        return by_platform and (name in names or any(map(is_token, value.split())))

    def is_token(word: str) -> bool:
        return word.count(".") == 2 and bool(read_unverified(word).issuer)

    return {name: value for name, value in environment.items() if not is_ours(name, value)}


def exit_code(status: int) -> int:
    """Return what a shell would say: a program that a signal ended has 128 and its number."""
    return status if status >= 0 else 128 - status


class Signals:
    """Passes this process's signals on to the programs, while the `with` block lasts.

    A signal that asks to end also cancels what has not come to its program yet. What the terminal sends (Ctrl-C,
    Ctrl-\\) has reached the programs already, because they are of the same foreground group.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._processes: set[asyncio.subprocess.Process] = set()
        self._starting: set[asyncio.Task[int]] = set()
        self.received = 0
        """The first signal that asked to end; 0: none did."""

    def __enter__(self) -> Self:
        for number in _passed_on():
            self._loop.add_signal_handler(number, self._on_signal, number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in _passed_on():
            # A handler stays, because without one the next signal would kill this process while it ends in order.
            self._loop.add_signal_handler(number, lambda: None)

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Have the current task cancelled by a signal that asks to end, until its program runs."""
        task = asyncio.current_task()
        assert task is not None
        self._starting.add(task)
        try:
            if self.received:
                raise asyncio.CancelledError
            yield
        finally:
            self._starting.discard(task)

    @contextmanager
    def reaching(self, process: asyncio.subprocess.Process) -> Iterator[None]:
        """Pass signals on to `process`."""
        self._processes.add(process)
        try:
            yield
        finally:
            self._processes.discard(process)

    def _on_signal(self, number: int) -> None:
        if number not in (getattr(signal, "SIGUSR1", 0), getattr(signal, "SIGUSR2", 0)):
            self.received = self.received or number
            for task in list(self._starting):
                task.cancel()
        if number in (signal.SIGINT, getattr(signal, "SIGQUIT", 0)) and _in_foreground():
            return
        for process in self._processes:
            try:
                process.send_signal(number)
            except ProcessLookupError:
                pass  # the program has ended, and asyncio has not noticed yet


def _passed_on() -> tuple[int, ...]:
    """Return the signals that are passed on; one that is ignored, as under nohup(1), stays so."""
    if sys.platform == "win32":
        return ()  # the console sends to all of its processes
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
    return tuple(number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN)


def _keeping_hangup(command: Sequence[str]) -> Sequence[str]:
    """Return a command line by which a program ignores SIGHUP where this process does: libuv starts each with the
    system's own handling."""
    if sys.platform == "win32" or signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        return command
    return ("/bin/sh", "-c", 'trap "" HUP; exec "$0" "$@"', *command)


def _in_foreground() -> bool:
    """Return whether the terminal's own signals come to this process and to its children."""
    if sys.platform == "win32":
        return True  # the console's come to all of its processes
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


async def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    signals: Signals,
    *,
    prefix: str | None = None,
    write: Write | None = None,
) -> int:
    """Run a program to its end; return its exit code as a shell would. Raises CommandNotFound.

    With `prefix` it has no input, and `write` gets its output with the prefix before each line. Cancelled, it ends the
    program.
    """
    alone = prefix is None
    if alone:
        _make_blocking()
    try:
        process = await asyncio.create_subprocess_exec(
            *_keeping_hangup(command),
            stdin=None if alone else asyncio.subprocess.DEVNULL,
            stdout=None if alone else asyncio.subprocess.PIPE,
            stderr=None if alone else asyncio.subprocess.PIPE,
            env=environment,
        )
    except OSError as error:
        raise not_found(command[0], error.strerror or "", exists=not isinstance(error, FileNotFoundError)) from error
    try:
        with signals.reaching(process):
            if signals.received:
                process.send_signal(signals.received)  # it came while the program was being started
            if prefix is not None and write is not None:
                assert process.stdout is not None
                assert process.stderr is not None
                await asyncio.gather(
                    _copy(process.stdout, 1, LinePrefix(prefix), write),
                    _copy(process.stderr, 2, LinePrefix(prefix), write),
                )
            return exit_code(await process.wait())
    finally:
        if process.returncode is None:
            await _end(process)


def not_found(name: str, why: str = "", *, exists: bool = False) -> CommandNotFound:
    """Return the error for a program that cannot be started; `exists`: it is there, and is none that can be run."""
    what = "is it a program, and may you run it?" if exists else "is it in PATH?"
    return CommandNotFound(f"cannot run {name!r}: {why.lower() or 'no such command'}; {what}", exists=exists)


class LinePrefix:
    """Puts a prefix before each line of one stream of output: `feed` as bytes come, `end` once behind the last."""

    __slots__ = ("_kept", "_prefix")

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix.encode()
        self._kept = b""

    def feed(self, data: bytes) -> bytes:
        """Return the lines that are complete now, each with its prefix."""
        *lines, self._kept = (self._kept + data).split(b"\n")
        out = [self._prefix + line + b"\n" for line in lines]
        while len(self._kept) >= LONGEST:
            out.append(self._prefix + self._kept[:LONGEST] + b"\n")
            self._kept = self._kept[LONGEST:]
        return b"".join(out)

    def end(self) -> bytes:
        """Return what came without a line's end, as a line."""
        last, self._kept = self._kept, b""
        return self._prefix + last + b"\n" if last else b""


async def _copy(reader: asyncio.StreamReader, descriptor: int, lines: LinePrefix, write: Write) -> None:
    """Copy until the program closes its end, which it may have left to others; a slow reader of ours slows it."""
    while data := await reader.read(_READ):
        if out := lines.feed(data):
            await asyncio.to_thread(write, descriptor, out)
    if out := lines.end():
        await asyncio.to_thread(write, descriptor, out)


async def _end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
        if not await in_time(process.wait(), STOP_TIMEOUT):
            process.kill()
    await process.wait()


def _make_blocking() -> None:
    """Undo for the program what an event loop does to a descriptor that it has watched (libuv, uv_poll_init)."""
    if sys.platform == "win32":
        return
    for descriptor in (0, 1, 2):
        try:
            os.set_blocking(descriptor, True)
        except OSError:
            pass  # the descriptor is closed
