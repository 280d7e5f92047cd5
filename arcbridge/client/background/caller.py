"""Asks the background process, and starts it where it does not run: one process, however many ask at once.

Requests and answers are one line of JSON each over a Unix socket. `arcbridge credential` is run by each kubectl, so
what is asked in its way is written here without the modules that take milliseconds to import (json, socket).
"""

from __future__ import annotations

import errno
import os
import sys

from arcbridge import __version__
from arcbridge.client.background import local_channel
from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.errors import ArcbridgeError, ExitCode, StateError, Unreachable
from arcbridge.single_file import is_single_file, own_command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

PROTOCOL = 1
"""Changes when a caller and a process of different versions would misunderstand each other."""
ANSWER_LIMIT = 4 * 1024 * 1024
ANSWER_TIMEOUT = 60.0
"""Seconds for an answer; a first session over a bad line, and a command that fetches tokens, take some."""
START_TIMEOUT = 30.0
"""Seconds in which a process that was started serves."""
STOP_TIMEOUT = 10.0
"""Seconds in which a process that was told to end has ended."""
READY_VARIABLE = "ARCBRIDGE_READY_DESCRIPTOR"
"""In the environment of a process that was started: where it writes that it serves, or why it does not."""
KEPT_VARIABLES = ("ARCBRIDGE_LOOP", "ARCBRIDGE_DEBUGGABLE", READY_VARIABLE)
"""All others of ours are settings, which each request brings along."""


class NotRunning(Exception):
    """There is no background process."""


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
    try:
        sock.settimeout(timeout)
        try:
            sock.connect(place.socket)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
                raise NotRunning from error
            raise StateError(f"cannot reach the background process at {place.socket}: {error.strerror}") from error
        if (owner := local_channel.foreign_user(sock)) is not None:
            raise StateError(f"{place.socket} is served by user id {owner}, and not by this user: remove it")
        try:
            sock.sendall(line)
            answer = bytearray()
            while not answer.endswith(b"\n"):
                received = sock.recv(65536)
                if not received:
                    raise NotRunning  # the process ended before it had answered
                answer += received
                if len(answer) > ANSWER_LIMIT:
                    raise StateError("the background process answered more than it may")
        except TimeoutError as error:
            raise Unreachable(
                f"the background process did not answer within {timeout:.0f} s; see `arcbridge logs`"
            ) from error
        except (BrokenPipeError, ConnectionResetError) as error:
            raise NotRunning from error
        return bytes(answer)
    finally:
        sock.close()


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
    """Have the process end, and wait until it has; raises NotRunning, StateError."""
    import time
    from pathlib import Path

    from arcbridge.pki.private_files import try_lock

    try:
        pid = f" {answer_of(exchange(place, request('version')))['pid']}"
    except OtherVersion:
        pid = ""
    exchange(place, request("stop"))
    deadline = time.monotonic() + STOP_TIMEOUT

    def lives() -> bool:
        if not os.path.exists(place.process_lock):
            return False
        if (lock := try_lock(Path(place.process_lock))) is not None:
            os.close(lock)
        return lock is None

    while os.path.exists(place.socket) or lives():
        if time.monotonic() > deadline:
            raise StateError(f"the background process{pid} has not ended; see `arcbridge logs`")
        time.sleep(0.02)


def ensure_started(place: BackgroundPaths, environment: Mapping[str, str], *, take_over: bool = False) -> None:
    """Start the process unless it runs by now, and return when it serves; raises StateError, ConfigError.

    `take_over`: in the place of one of another version, which keeps its running streams.
    """
    from pathlib import Path

    from arcbridge.pki.private_files import locked

    place.make()
    with locked(Path(place.start_lock)):
        try:
            answer_of(exchange(place, request("version"), timeout=START_TIMEOUT))
            return  # another caller started the process while this one waited for the lock
        except NotRunning:
            pass
        except OtherVersion:
            if not take_over:
                return
        _start(environment)


def _start(environment: Mapping[str, str]) -> None:
    """Start the process without a terminal and wait until it serves; raises StateError."""
    command = [*program(), "--role", "client", "background"]
    reading, writing = os.pipe()
    try:
        os.set_inheritable(writing, True)
        child = local_channel.spawn(command, {**_kept(environment), READY_VARIABLE: str(writing)})
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
        if not name.startswith("ARCBRIDGE_") or name in KEPT_VARIABLES
    }


def program() -> list[str]:
    """Return the command line that runs this very installation."""
    if is_single_file():
        return own_command()
    file = os.path.abspath(sys.argv[0]) if sys.argv and sys.argv[0] else ""
    name = os.path.basename(file)
    if name.endswith((".pyz", ".pex")) or (name in ("arcbridge", "kubectl-arcbridge") and _is_python(file)):
        return [sys.executable, file]
    # -P: kubectl may run in a directory that has modules of its own.
    return [sys.executable, "-P", "-m", "arcbridge"]


def _is_python(file: str) -> bool:
    """Return whether a program is a script of Python, as installers make them."""
    try:
        with open(file, "rb") as script:
            first = script.readline(256)
    except OSError:
        return False
    return first.startswith(b"#!") and b"python" in first


def _read_word(descriptor: int) -> str:
    """Read what the process writes until it closes the pipe, or says nothing for START_TIMEOUT seconds."""
    import select

    said = b""
    while select.select([descriptor], [], [], START_TIMEOUT)[0]:
        received = os.read(descriptor, 4096)
        if not received:
            break
        said += received
    return said.decode("utf-8", "replace").strip()
