"""One background process hands what it listens on to the next one, of another version of the package.

The former one stops accepting and sends its listening sockets, and the descriptor that holds the lock, by SCM_RIGHTS
(unix(7)): the sockets are never closed, so what connects meanwhile waits in the kernel and is accepted by the next one.
Connections that run stay with the former one and its sessions, and it ends after the last of them. The connection over
which this went stays open between the two: over it the next one tells the former one to end at once.

Order: a line with what is served, then for each cluster one byte with its sockets; the next one answers when it has
taken all, and until then the former one can go back to accepting.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass, field
from typing import Any

from arcbridge.client.background import local_channel
from arcbridge.errors import StateError

TAKEN = b"taken\n"
END = b"end\n"
LINE_LIMIT = 4 * 1024 * 1024
TIMEOUT = 20.0
"""Seconds for each step of the other process."""


@dataclass(slots=True)
class Inheritance:
    """What the former process hands over; descriptors belong to the one that has received them."""

    control: int
    """The listening control socket."""
    lock: int
    """Holds the lock of the background process."""
    clusters: list[tuple[dict[str, Any], list[int]]] = field(default_factory=list)
    """For each cluster what is said about it, and the descriptors of its listening sockets."""
    leashes: list[int] = field(default_factory=list)
    """Connections to processes that were before the former one, and have streams left."""


def send(sock: socket.socket, given: Inheritance) -> None:
    """Send everything and wait until the other process has it; raises OSError, StateError."""
    sock.settimeout(TIMEOUT)
    document = {"clusters": [about for about, _ in given.clusters], "leashes": len(given.leashes)}
    sock.sendall(json.dumps(document).encode() + b"\n")
    groups = [[given.control, given.lock], *(found for _, found in given.clusters), *([one] for one in given.leashes)]
    for descriptors in groups:
        local_channel.send_descriptors(sock, b"+", descriptors)
    if read_line(sock) != TAKEN:
        raise StateError("the next background process did not take over")


def receive(sock: socket.socket) -> Inheritance:
    """Receive what `send` sends, and confirm it; raises OSError, StateError, and keeps no descriptor then."""
    received: list[int] = []
    sock.settimeout(TIMEOUT)
    line = read_line(sock)
    try:
        document = json.loads(line)
        if "error" in document:
            raise StateError(str(document["error"]))
        control, lock = _receive_descriptors(sock, received)
        inheritance = Inheritance(control, lock)
        for about in document["clusters"]:
            inheritance.clusters.append((about, _receive_descriptors(sock, received)))
        for _ in range(int(document["leashes"])):
            inheritance.leashes += _receive_descriptors(sock, received)
        sock.sendall(TAKEN)
    except BaseException as error:
        for descriptor in received:
            os.close(descriptor)
        if isinstance(error, ValueError | KeyError | TypeError):
            raise StateError(
                "the former background process hands over in a way that this version does not know"
            ) from error
        raise
    return inheritance


def read_line(sock: socket.socket) -> bytes:
    """Read one line byte by byte, because descriptors may come right behind it."""
    line = bytearray()
    while not line.endswith(b"\n"):
        received = sock.recv(1)
        if not received or len(line) > LINE_LIMIT:
            raise StateError("the other background process ended while one took the place of the other")
        line += received
    return bytes(line)


def _receive_descriptors(sock: socket.socket, received: list[int]) -> list[int]:
    """Return the descriptors of one message, which are added to `received` as well."""
    # One byte at a time, because the kernel gives the descriptors with the byte that they were sent with.
    descriptors = local_channel.receive_descriptors(sock, 8)
    if not descriptors:
        raise StateError("the former background process ended while it handed over")
    received += descriptors
    return descriptors
