"""A local TCP port that leads into a cluster: accepts connections of this user's programs, and counts them.

Where a connection leads is its owner's business. The port asks its callers for nothing, and what it leads to is reached
with this user's rights: on loopback the programs of other users of the machine are refused, unless all users are to be
served (docs/threats.md#W13).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from arcbridge.net.descriptors import explain
from arcbridge.net.peer_user import OWN, PeerUser, peer_user
from arcbridge.net.sockets import AcceptLoop, reset


@dataclass
class ForwardStats:
    """Counters of one forward."""

    accepted: int = 0
    open: int = 0
    failed: int = 0
    bytes_to_cluster: int = 0
    bytes_from_cluster: int = 0


class LocalPort:
    """Accepts on listening, non-blocking sockets, which it owns: `start`, then `close`."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        taken: Callable[[socket.socket], None],
        stats: ForwardStats,
        log: Any,
        *,
        any_user: bool,
    ) -> None:
        """`taken` gets each connection, non-blocking, which it owns. `any_user`: programs of other users of this
        machine are served too."""
        for sock in sockets:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is accepted inherits it
        self._accepting = AcceptLoop(sockets, self._accepted, self._exhausted)
        self._taken = taken
        self._stats = stats
        self._log = log
        self._any_user = any_user

    def start(self) -> None:
        self._accepting.start()

    def close(self) -> None:
        """Stop accepting; what was accepted goes on."""
        self._accepting.close()

    def _accepted(self, sock: socket.socket, _host: str) -> None:
        self._stats.accepted += 1
        user = OWN if self._any_user else peer_user(sock)
        if user is OWN:
            self._taken(sock)
            return
        self._stats.failed += 1
        if user is PeerUser.GONE:
            self._log.debug("connection refused", reason="the program has closed it before it was accepted")
        else:
            self._log.warning(
                "connection refused", reason="a program of another user of this machine; --any-user lets them in"
            )
        reset(sock)

    def _exhausted(self, _listening: socket.socket, error: OSError, again: bool) -> None:
        if not again:  # once, not at each try for as long as it lasts
            self._log.warning("cannot accept", reason=explain(error))
