"""`arcbridge credential`: kubectl's credential plugin, which kubectl runs before it connects.

On the way that nearly each call takes, one question to the background process, this imports nothing that takes time
(start-up budget: docs/change.md). Where the process does not run it is started; a login, where there is a terminal,
and each mistake in the flags go the way of all other commands (`cli.background`).
"""

from __future__ import annotations

import os
import sys
import time

from arcbridge.cli.core_dumps import forbid_core_dumps
from arcbridge.errors import ArcbridgeError, ExitCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from arcbridge.client.background_paths import BackgroundPaths

_NEITHER = ("-h", "--help", "--ended", "-v", "--verbose", "--debug")
"""Flags with which this is no question to the process."""
_TOLD = 60.0
"""Seconds for which one kubectl is not told the same again."""


def print_credential(arguments: Sequence[str]) -> int | None:
    """Print the credential for these flags; returns the exit code, or None where the command line has to be parsed."""
    if sys.platform == "win32" or any(argument in _NEITHER for argument in arguments):
        return None
    from arcbridge.client.background.caller import (
        NotRunning,
        OtherVersion,
        answer_of,
        ensure_started,
        exchange,
        request,
    )
    from arcbridge.client.background_paths import BackgroundPaths

    forbid_core_dumps()
    place = BackgroundPaths.find(os.environ)
    line = request("credential", arguments, server=_server(os.environ.get("KUBERNETES_EXEC_INFO", "")))
    try:
        for _ in range(5):
            try:
                answer = exchange(place, line)
                if not answer.startswith(b'{"kind"'):
                    answer_of(answer)
                    return None
                sys.stdout.buffer.write(answer)
                sys.stdout.buffer.flush()
                return 0
            except NotRunning:
                ensure_started(place, os.environ)
            except OtherVersion:
                ensure_started(place, os.environ, take_over=True)
    except KeyboardInterrupt:  # Ctrl-C ends kubectl, too
        return int(ExitCode.INTERRUPTED)
    except ArcbridgeError as error:
        if error.exit_code == ExitCode.LOGIN:
            return None  # there may be a terminal
        if is_news(place, error.message):
            sys.stderr.write(f"error: {error.message}\n")
        return int(error.exit_code)
    return None


def is_news(place: BackgroundPaths, message: str) -> bool:
    """Return whether the program that runs this has not been told yet why it gets no credential.

    kubectl runs the plugin again each time that it looks for the cluster's API groups, five times in one command,
    because client-go keeps no failure (`discovery/cached/memory`), and prints a line of its own each time.
    """
    if "KUBERNETES_EXEC_INFO" not in os.environ:
        return True  # a person, or a script, runs it
    from binascii import crc32

    said = f"{os.getppid()} {crc32(message.encode())}"
    try:
        with open(place.told) as file:
            if file.read(64) == said and time.time() - os.fstat(file.fileno()).st_mtime < _TOLD:
                return False
    except OSError:
        pass
    try:
        with open(os.open(place.told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(said)
    except OSError:
        pass  # then it is told again
    return True


def _server(info: str) -> str:
    """Return the address to which kubectl is about to connect; empty where it does not say (`provideClusterInfo`)."""
    _, _, rest = info.partition('"server":')
    return rest.lstrip().removeprefix('"').partition('"')[0]
