"""Asks the background process, and starts it where it does not run: one process, however many ask at once.

Requests and answers are one line of JSON each over a Unix socket. `arcbridge credential` is run by each kubectl, so
what is asked in its way is written here without the modules that take milliseconds to import (json, socket).
"""

from __future__ import annotations

import errno
import os
import time

from arcbridge import __version__
from arcbridge.client.background import local_channel
from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.errors import ArcbridgeError, ExitCode, StateError, Unreachable
from arcbridge.installation import program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

PROTOCOL = 1
"""Changes when a caller and a process of different versions would misunderstand each other."""
ANSWER_LIMIT = 4 * 1024 * 1024
ANSWER_TIMEOUT = 60.0
"""Seconds for an answer; a first session over a bad line, and a command that fetches tokens, take some."""
SILENCE = 3.0
"""Seconds without a byte after which a process counts as one that does not answer: it sends one each second while it
prepares an answer (`BEAT`)."""
SLOW = 15.0
"""The same for a process that runs, or waits for a processor or a disk."""
SILENT_ALREADY = 0.3
"""The same up to the first byte where another caller has waited in vain by now: kubectl asks six times."""
START_TIMEOUT = 30.0
"""Seconds in which a process that was started serves."""
STOP_TIMEOUT = 10.0
"""Seconds in which a process that was told to end has ended."""
READY_VARIABLE = "ARCBRIDGE_READY_DESCRIPTOR"
"""In the environment of a process that was started: where it writes that it serves, or why it does not."""
KEPT_VARIABLES = ("ARCBRIDGE_LOOP", "ARCBRIDGE_DEBUGGABLE", READY_VARIABLE)
"""All others of ours are settings, which each request brings along. systemd's socket is for the service that runs the
caller, whose state is not that of this process."""


class NotRunning(Exception):
    """There is no background process."""


class NoAnswer(Unreachable):
    """The process does not answer."""


class OtherVersion(Exception):
    """The process that runs is of another version of the package."""


def request(operation: str, arguments: Sequence[str] = (), **more: str) -> bytes:
    """Write a request as one line. `more`: further texts."""
    from _json import encode_basestring_ascii as quoted

    fields = [f'"{name}":{quoted(text)}' for name, text in (("operation", operation), *more.items())]
    words = ",".join(quoted(word) for word in arguments)
    return (
        f'{{"protocol":{PROTOCOL},"version":{quoted(__version__)},{",".join(fields)},"arguments":[{words}]}}\n'.encode()
    )


def exchange(place: BackgroundPaths, line: bytes, *, timeout: float = ANSWER_TIMEOUT) -> bytes:
    """Send one request and return the answer's line; raises NotRunning, StateError, Unreachable."""
    place.refuse_foreign_runtime()
    sock = local_channel.quick_socket()
    patience = min(timeout, SILENT_ALREADY if os.path.exists(place.silent) else SILENCE)
    began = heard = time.monotonic()
    answer = bytearray()
    try:
        sock.settimeout(patience)
        _connect(sock, place, began + patience)
        if (owner := local_channel.foreign_user(sock)) is not None:
            raise StateError(f"{place.socket} is served by user id {owner}, and not by this user: remove it")
        sock.sendall(line)
        while not answer.endswith(b"\n"):
            try:
                received = sock.recv(65536)
            except TimeoutError:
                if time.monotonic() - heard > SLOW or not _is_working(place, patience):
                    raise
                continue
            if not received:
                raise NotRunning  # the process ended before it had answered
            heard = time.monotonic()
            answer += received
            patience = min(timeout, SILENCE)  # it lives: an earlier caller's mark counts no more
            sock.settimeout(patience)
            if len(answer) > ANSWER_LIMIT:
                raise StateError("the background process answered more than it may")
            if heard - began > timeout:
                raise Unreachable(f"the background process had no answer within {timeout:.0f} s; see `arcbridge logs`")
        return bytes(answer.lstrip(b" "))
    except TimeoutError as error:
        from arcbridge.client.background.lock_holder import silence

        raise NoAnswer(f"{silence(place)}; `arcbridge stop` ends it") from error
    except (BrokenPipeError, ConnectionResetError) as error:
        raise NotRunning from error
    finally:
        sock.close()


def _connect(sock: Any, place: BackgroundPaths, deadline: float) -> None:
    """Connect to the process; raises NotRunning, StateError, and TimeoutError where it accepts none until `deadline`.

    The kernel refuses what comes while its queue is full, as after hundreds of callers at once.
    """
    while True:
        try:
            sock.connect(place.socket)
            return
        except TimeoutError:
            raise
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
                raise NotRunning from error
            if error.errno != errno.EAGAIN:
                raise StateError(f"cannot reach the background process at {place.socket}: {error.strerror}") from error
            if time.monotonic() > deadline:
                raise TimeoutError from error
        time.sleep(0.01)


def _is_working(place: BackgroundPaths, patience: float) -> bool:
    if patience < SILENCE:
        return False  # the caller, or one before it, has waited long enough
    from arcbridge.client.background.lock_holder import is_working

    return is_working(place)


def answer_of(line: bytes) -> dict[str, Any]:
    """Return the document of an answer; raises the error that it states, and OtherVersion."""
    import json

    document: dict[str, Any] = json.loads(line)
    if "error" in document:
        if document.get("code") == "version":
            raise OtherVersion(str(document.get("version", "")))
        error = ArcbridgeError(str(document["error"]))
        try:
            error.exit_code = ExitCode(int(document.get("exit_code", 1)))
            error.status_code = int(document.get("status_code", 500))
        except ValueError:
            pass  # a newer process knows codes that this one does not
        raise error
    return document


def ask(place: BackgroundPaths, line: bytes, environment: Mapping[str, str], *, start: bool = True) -> dict[str, Any]:
    """Ask the process and return its answer; `start`: where there is none, or one of another version, start ours.

    Raises NotRunning without `start`, and the error that the process answers.
    """
    for _ in range(5):
        try:
            return answer_of(exchange(place, line))
        except NotRunning:
            if not start:
                raise
            ensure_started(place, environment)
        except OtherVersion:
            ensure_started(place, environment, take_over=True)
    raise Unreachable(
        "the background process ended, or the connection was taken off, before each of 5 answers; see `arcbridge logs`"
    )


def stop(place: BackgroundPaths) -> None:
    """Have the process end, and wait until it has; raises NotRunning, StateError, and NoAnswer where it hangs."""
    from arcbridge.client.background.lock_holder import has_ended, holder_of

    # First, because a request to stop would wait in the socket of a process that is suspended, and end it later on.
    exchange(place, request("version"))
    holder = holder_of(place)
    exchange(place, request("stop"))
    if not has_ended(place, holder, STOP_TIMEOUT):
        pid = f" {holder.pid}" if holder is not None else ""
        raise NoAnswer(f"the background process{pid} has not ended; `arcbridge stop --force` kills it")


def ensure_started(place: BackgroundPaths, environment: Mapping[str, str], *, take_over: bool = False) -> None:
    """Start the process unless it runs by now, and return when it serves; raises StateError, ConfigError.

    `take_over`: in the place of one of another version, which keeps its running streams.
    """
    from pathlib import Path

    from arcbridge.pki.private_files import locked

    place.make()
    with locked(Path(place.start_lock), 2 * START_TIMEOUT):
        try:
            answer_of(exchange(place, request("version"), timeout=START_TIMEOUT))
            return  # another caller started the process while this one waited for the lock
        except NotRunning:
            _refuse_silent(place)
        except OtherVersion:
            if not take_over:
                return
        _start(environment)


def _refuse_silent(place: BackgroundPaths) -> None:
    """Raise NoAnswer where a process hangs without its socket and a caller has waited for the lock in vain by now."""
    from arcbridge.client.background.lock_holder import is_held, silence

    if os.path.exists(place.silent) and is_held(place):
        raise NoAnswer(f"{silence(place)}; `arcbridge stop` ends it")


def _start(environment: Mapping[str, str]) -> None:
    """Start the process without a terminal and wait until it serves; raises StateError."""
    command = [*program(), "--role", "client", "background"]
    reading, writing = os.pipe()
    try:
        os.set_inheritable(writing, True)
        child = local_channel.spawn(command, {**_kept(environment), READY_VARIABLE: str(writing)}, writing)
    except OSError as error:
        os.close(reading)
        raise StateError(f"cannot start the background process ({command[0]}): {error.strerror}") from error
    finally:
        os.close(writing)
    said = _read_word(reading)
    os.close(reading)
    if said == "ready":
        return
    local_channel.reap(child)
    raise StateError(f"the background process did not start: {said or 'it ended without a word'}; see `arcbridge logs`")


def _kept(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name in KEPT_VARIABLES or not name.startswith(("ARCBRIDGE_", "NOTIFY_SOCKET"))
    }


def _read_word(descriptor: int) -> str:
    """Return what the process writes until it closes the pipe, or that it has not written for START_TIMEOUT seconds."""
    import select

    said = b""
    while select.select([descriptor], [], [], START_TIMEOUT)[0]:
        received = os.read(descriptor, 4096)
        if not received:
            return said.decode("utf-8", "replace").strip()
        said += received
    return f"it runs, and does not serve within {START_TIMEOUT:.0f} s"
