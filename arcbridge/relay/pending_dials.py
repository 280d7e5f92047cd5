"""The clients that wait for their agent, by the dial token that one agent may claim.

A dial token is 128 random bits, and begins with the id of the process that waits where there are several
(`relay.hop`, `relay.siblings.handover`). It is looked up by its SHA-256 and compared in constant time, so how long an
answer takes says nothing about it. This module reads and writes no socket. Invariant: a token pairs at most one client
with one agent of the cluster that it was made for; the first agent that claims it voids it, and so does its client.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from arcbridge.errors import ArcbridgeError, JoinRefused, RemoteProtocolError
from arcbridge.identity.claims import Identity
from arcbridge.net.join import JoinCode, ServerJoin
from arcbridge.observe.metrics import Metrics
from arcbridge.observe.untrusted_text import printable
from arcbridge.relay.counters import Counters
from arcbridge.wire.records import JoinReply, JoinRequest, Status

VOID: Final = JoinReply(
    code=JoinCode.GONE,
    message="this dial token is void: the client has left, another agent was faster, or it came too late",
)
MOST_ROUND_TRIP: Final = 10_000_000
"""Microseconds from which an agent's round trip is none (docs/threats.md#J33)."""
ID_LENGTH: Final = 16
"""Characters of the id of a process, before the dot of a dial token."""


class ClaimedJoin(Protocol):
    """An agent's join that has claimed a dial token: `net.join.ServerJoin`, or `HandedJoin`. See the former."""

    @property
    def sock(self) -> socket.socket: ...

    async def reply(self, reply: JoinReply) -> None: ...

    async def finish(self) -> bytes: ...

    async def refuse(self, reply: JoinReply) -> None: ...


class Detour(Protocol):
    """The way of an agent's join to another process, where its client waits: `relay.hop`, `siblings.handover`."""

    process_id: str
    """Of this process: dial tokens that are made here begin with it."""

    def attach(self, dials: PendingDials) -> None:
        """Take the clients that wait here, for joins that other processes pass on."""

    def add_metrics(self, metrics: Metrics) -> None:
        """Register what is counted of joins that were passed on."""

    def is_elsewhere(self, request: JoinRequest) -> bool:
        """Return whether the client of an agent's join waits at another process, which it may be passed on to."""

    async def pass_on(
        self, join: ServerJoin, request: JoinRequest, cluster: str, require_room: Callable[[], None]
    ) -> str:
        """Pass on the join of an agent of `cluster`, whose certificate was checked, with its socket.

        `require_room` raises `JoinRefused` where this process has no room for another pump. Returns "", or why the
        token is void. Raises `JoinRefused` with what the agent is sent. In both of these cases
        the join is still the caller's, and so it is when this is cancelled.
        """


class ClaimedAgent:
    """An agent that has claimed a token; its connection belongs to the client's coroutine."""

    def __init__(self, join: ClaimedJoin, request: JoinRequest) -> None:
        self.join = join
        self.instance = printable(request.instance, 128)
        self.round_trip = request.round_trip if request.round_trip < MOST_ROUND_TRIP else 0
        """Between agent and relay as the agent says it, microseconds; 0: it says nothing that can be."""


@dataclass(slots=True, eq=False)
class PendingDial:
    """A client whose agent was asked to come."""

    join_id: str
    identity: Identity
    cluster: str
    token: str
    claimed: asyncio.Future[ClaimedAgent]

    def fail(self, error: BaseException) -> None:
        """Refuse the client, if it still waits."""
        if not self.claimed.done():
            self.claimed.set_exception(error)

    def dialled(self, dialling: asyncio.Future[Status]) -> None:
        """Refuse the client where no agent could be asked to come."""
        if not dialling.cancelled() and (error := dialling.exception()) is not None:
            self.fail(error)

    def left(self, error: ArcbridgeError) -> None:
        """Refuse the client, which has left, or sent what it may not."""
        if isinstance(error, RemoteProtocolError):
            refusal = JoinRefused(JoinCode.BAD_REQUEST, f"the client broke the protocol: {error.message}")
        else:
            refusal = JoinRefused(JoinCode.GONE, "the client left before it was joined")
        refusal.__cause__ = error
        self.fail(refusal)


class PendingDials:
    """Those of one process."""

    def __init__(self, counters: Counters, detour: Detour | None = None) -> None:
        """`detour`: where a join of an agent may come out at another process; its id begins each token then."""
        self._counters = counters
        self._process_id = "" if detour is None else detour.process_id
        self._pending: dict[bytes, PendingDial] = {}
        """By the SHA-256 of their tokens."""
        if detour is not None:
            detour.attach(self)

    def __len__(self) -> int:
        return len(self._pending)

    def open(self, join_id: str, identity: Identity, cluster: str) -> PendingDial:
        """Make a token for a client that waits for an agent of `cluster`."""
        secret = secrets.token_urlsafe(16)
        token = token_of(self._process_id, secret) if self._process_id else secret
        dial = PendingDial(join_id, identity, cluster, token, asyncio.get_running_loop().create_future())
        self._pending[key_of(token)] = dial
        return dial

    def close(self, dial: PendingDial) -> ClaimedAgent | None:
        """Void the token; return an agent that has claimed it."""
        self._pending.pop(key_of(dial.token), None)
        claimed = dial.claimed
        if claimed.done() and not claimed.cancelled() and claimed.exception() is None:
            return claimed.result()
        claimed.cancel()
        return None

    def claim(self, join: ClaimedJoin, request: JoinRequest, cluster: str) -> str:
        """Give the connection of an agent of `cluster` to the client that waits for it, or return why there is none."""
        key = key_of(request.token)
        dial = self._pending.get(key)
        if dial is None or not hmac.compare_digest(dial.token.encode(), request.token.encode()):
            reason = "void token"
        elif dial.cluster != cluster:
            # Not a race: an agent of one cluster holds a token of another. The join it belongs to goes on
            # (docs/threats.md#J1).
            reason = f"an agent of cluster {cluster} showed a token of cluster {dial.cluster}"
        elif dial.claimed.done():
            reason = "another agent was faster"
        else:
            del self._pending[key]
            dial.claimed.set_result(ClaimedAgent(join, request))
            return ""
        self.count_void()
        return reason

    def count_void(self) -> None:
        """Count a void token."""
        self._counters.tokens_refused += 1

    def hop_failed(self, key: bytes) -> None:
        """Refuse the client with this token (its SHA-256) now, and not at the deadline: its agent came to a relay from
        which it cannot be passed on."""
        if (dial := self._pending.get(key)) is not None:
            words = "the agent came to a relay that cannot reach this one; try again"
            dial.fail(JoinRefused(JoinCode.AGENT_REFUSED, words, retry_after=1))

    def refuse(self, reason: Callable[[PendingDial], JoinRefused | None]) -> None:
        """Refuse each client that waits and for which there is a reason."""
        for dial in self._pending.values():
            if (error := reason(dial)) is not None:
                dial.fail(error)


def key_of(token: str) -> bytes:
    """Return the key of a token, by which other processes may name it."""
    return hashlib.sha256(token.encode()).digest()


def token_of(process_id: str, secret: str) -> str:
    """Return the dial token of a client that waits at this process."""
    return f"{process_id}.{secret}"


def process_of(token: str) -> str:
    """Return the process that a dial token names; empty when it names none."""
    process_id, dot, _ = token.partition(".")
    return process_id if dot and len(process_id) == ID_LENGTH else ""
