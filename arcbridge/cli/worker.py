"""A worker's process, which only the relay's supervisor starts.

    python -c CODE arcbridge-relay-worker INDEX DESCRIPTOR PATH

`PATH` is the supervisor's `sys.path`: the worker is to run the very modules that the supervisor runs, whatever its
working directory holds.
"""

from __future__ import annotations

import os
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Be a worker; `arguments` are those behind CODE."""
    # The service manager hears from the supervisor alone.
    os.environ.pop("NOTIFY_SOCKET", None)
    parent = socket.socket(fileno=int(arguments[2]))
    parent.set_inheritable(False)
    from arcbridge.cli.core_dumps import forbid_core_dumps

    forbid_core_dumps()
    from arcbridge.cli.loop import run_until_drained
    from arcbridge.relay.processes.worker import work

    return run_until_drained(lambda stopping, hurry: work(parent, stopping, hurry))
