"""Which processes have a connection to a port right now: told by the kernel, not by arcbridge."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_ESTABLISHED = "01"


def connected(pids: Iterable[int], port: int) -> set[int]:
    """Return those of `pids` that have an established TCP connection (IPv4) to `port`, in our network namespace."""
    sockets = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()  # proc_net_tcp: sl, local address, remote address, state, …, inode in column 9
        if fields[3] == _ESTABLISHED and int(fields[2].rpartition(":")[2], 16) == port:
            sockets.add(f"socket:[{fields[9]}]")
    return {pid for pid in pids if _holds(pid, sockets)}


def _holds(pid: int, sockets: set[str]) -> bool:
    try:
        entries = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False  # it is gone
    for entry in entries:
        try:
            if os.readlink(entry) in sockets:
                return True
        except OSError:
            continue  # closed since
    return False
