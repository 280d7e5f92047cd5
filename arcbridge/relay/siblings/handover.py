"""The hand-over: an agent's join that came out at another worker than the one whose client waits for it.

All workers of a relay listen on one port, and the kernel chooses who accepts. Who a join of an agent is for is known
only from its JOIN message, inside the outer TLS, whose state cannot be given away. So the worker that accepted it (here
*sender*) lets the one that waits (*owner*, named by the dial token) judge it, ends the outer TLS in its stead, and
then gives the raw socket away:

    sender → owner     claim     the JOIN message, and the cluster of the verified certificate
    owner → sender     answer    say this to the agent, and end its TLS; or why the token is void
    sender → owner     socket    the descriptor, and the bytes that came behind the agent's close_notify
    owner → sender     answer    it is here, close yours; or its client has left

The sender may say `failed` at any time before that. An owner whose client leaves before the first answer refuses by it,
and later by the second one.

Rules:

1. The owner judges: a token pairs once, whichever worker its agent came to.
2. After close_notify the sender reads nothing more from the socket. It holds its copy until the owner has said
   it is there, and closes it then: there is no moment at which the socket could be lost.
3. If either process dies, or a step does not happen in time, the other one closes what it has, both ways: the agent is
   cut, and the client is told, or cut too if its pump had begun.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import structlog

from arcbridge.errors import ArcbridgeError, ConnectionLost, JoinRefused, RemoteProtocolError
from arcbridge.net.join import JoinCode, ServerJoin
from arcbridge.net.sockets import reset
from arcbridge.observe.metrics import Metrics
from arcbridge.relay.pending_dials import ClaimedJoin, PendingDials, process_of
from arcbridge.relay.siblings.channel import ChannelClosed, Head, Received
from arcbridge.relay.siblings.group import Sibling, Siblings
from arcbridge.tasks import within
from arcbridge.wire.records import JoinReply, JoinRequest

VERDICT_DEADLINE: Final = 5.0
"""Seconds for the owner to judge: it looks into a table, and has to be between two turns of its loop."""
SOCKET_DEADLINE: Final = 8.0
"""Seconds from the owner's reply to the socket: the agent's reply and close_notify have 3 each in between."""
TAKEN_DEADLINE: Final = 5.0

OUTCOMES: Final = ("joined", "void", "failed")
"""How hand-overs ended, as the sender counts them."""

T = TypeVar("T")

log = structlog.get_logger("arcbridge.relay")


Claim = Callable[[ClaimedJoin, JoinRequest, str], str]
"""`(join, request, cluster)`: give the join to the client that waits for it; else why there is none."""


class HandedJoin:
    """At the owner: a join of an agent whose outer TLS the sender ends. Calls as on `ServerJoin`."""

    def __init__(self, forget: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self._forget = forget
        self._sock: socket.socket | None = None
        self.verdict: asyncio.Future[JoinReply] = loop.create_future()
        """The reply for the agent, also a refusing one."""
        self._arrived: asyncio.Future[tuple[socket.socket, bytes]] = loop.create_future()

    @property
    def sock(self) -> socket.socket:
        if self._sock is None:
            raise ConnectionLost("the agent's socket has not arrived from the other process of this relay")
        return self._sock

    async def reply(self, reply: JoinReply) -> None:
        """Have the sender say this; where it is gone, `finish` raises."""
        if not self.verdict.done():
            self.verdict.set_result(reply)

    async def finish(self) -> bytes:
        late = ConnectionLost("the agent's socket did not arrive from the other process of this relay")
        async with within(SOCKET_DEADLINE, late):
            self._sock, left_over = await asyncio.shield(self._arrived)
        self._forget()
        return left_over

    async def refuse(self, reply: JoinReply) -> None:
        """Have the sender refuse the agent. Does not wait."""
        self._forget()
        if self._arrived.done() and not self._arrived.cancelled() and self._arrived.exception() is None:
            reset(self._arrived.result()[0])
            return
        self._arrived.cancel()
        await self.reply(reply)

    # -- for `Handovers` -------------------------------------------------------------------------------------------

    def arrived(self, sock: socket.socket, left_over: bytes) -> bool:
        """Keep the socket for the client that waits; false when that client has left."""
        if self._arrived.done():
            return False
        self._arrived.set_result((sock, left_over))
        return True

    def failed(self, error: ArcbridgeError) -> None:
        if not self._arrived.done():
            self._arrived.set_exception(error)
            # Marks the error as seen: the client that waits for it may have left.
            self._arrived.exception()


class Handovers:
    """Both sides. `claim` is set before the first sibling is connected."""

    def __init__(self, siblings: Siblings) -> None:
        self.process_id = siblings.worker_id
        self.claim: Claim = lambda join, request, cluster: "this worker does not serve yet"
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self._siblings = siblings
        self._numbers = itertools.count(1)
        self._handing = 0
        """How many hand-overs are under way at this sender."""
        self._handed: dict[tuple[Sibling, int], HandedJoin] = {}
        siblings.on_left.append(self._left)
        siblings.answerers["claim"] = self._claimed
        siblings.handlers.update(socket=self._socket_arrived, failed=self._failed)

    def __len__(self) -> int:
        """Return how many hand-overs are under way, on both sides."""
        return self._handing + len(self._handed)

    # -- the sender --------------------------------------------------------------------------------------------

    def attach(self, dials: PendingDials) -> None:
        self.claim = dials.claim

    def add_metrics(self, metrics: Metrics) -> None:
        metrics.counter(
            "handovers_total",
            "Joins of agents that came out at another worker than the one that waited, by how their hand-over ended.",
            {"result": OUTCOMES},
            lambda: self.outcomes,
        )

    def is_elsewhere(self, request: JoinRequest) -> bool:
        """Return whether this join of an agent is for a client at another worker."""
        return self._siblings.of_id(process_of(request.token)) is not None

    async def pass_on(
        self, join: ServerJoin, request: JoinRequest, cluster: str, require_room: Callable[[], None]
    ) -> str:
        """Give the join of an agent of `cluster`, and its socket, to the worker that it is for: see `Detour`."""
        try:
            return await self._hand_over(join, request, cluster)
        except (RemoteProtocolError, ConnectionLost, ChannelClosed) as error:
            raise JoinRefused(JoinCode.INTERNAL, "the join could not be handed over", retry_after=1) from error

    async def _hand_over(self, join: ServerJoin, request: JoinRequest, cluster: str) -> str:
        sibling = self._siblings.of_id(process_of(request.token))
        if sibling is None:
            return "the worker that waited is gone"
        number = next(self._numbers)
        self._handing += 1
        outcome, sent = "failed", False
        try:
            claim = JoinRequest(
                role="agent", token=request.token, instance=request.instance[:128], round_trip=request.round_trip
            )
            question = sibling.ask({"t": "claim", "id": number, "cluster": cluster}, claim.encode())
            answer = await _answered(question, VERDICT_DEADLINE)
            if "void" in answer.head:
                outcome = "void"
                return str(answer.head["void"])
            verdict = JoinReply.decode(answer.body)
            if verdict.code:
                raise JoinRefused(verdict.code, verdict.message, retry_after=verdict.retry_after or None)
            await join.reply(verdict)
            left_over = await join.finish()
            sent = True
            question = sibling.ask({"t": "socket", "id": number}, left_over, join.sock)
            if not (await _answered(question, TAKEN_DEADLINE)).head["taken"]:
                raise ConnectionLost("the client left while the agent was handed over")
            outcome = "joined"
            join.sock.close()
            return ""
        finally:
            self._handing -= 1
            self.outcomes[outcome] += 1
            if outcome == "failed":
                sibling.tell({"t": "failed", "id": number})
                if sent:
                    # The owner may have a copy that it will never use: closing ours would leave the agent waiting.
                    _shut(join.sock)

    # -- the owner --------------------------------------------------------------------------------------------------

    async def _claimed(self, sibling: Sibling, message: Received) -> tuple[Head, bytes]:
        key = sibling, int(message.head["id"])
        join = self._handed[key] = HandedJoin(lambda: self._forget(key))
        if reason := self.claim(join, JoinRequest.decode(message.body), str(message.head["cluster"])):
            self._forget(key)
            return {"void": reason}, b""
        return {}, (await join.verdict).encode()

    def _socket_arrived(self, sibling: Sibling, message: Received) -> None:
        join = self._handed.get((sibling, int(message.head["id"])))
        taken = False
        if message.sock is None:
            # Lost on its way, for want of descriptors here: the sender still has it, and cuts it.
            log.warning("agent's socket not taken over", reason="out of file descriptors", advice="raise LimitNOFILE")
            if join is not None:
                join.failed(ConnectionLost("this relay is out of file descriptors"))
        elif not (taken := join is not None and join.arrived(message.sock, message.body)):
            message.sock.close()
        sibling.answer(message, {"taken": taken})

    def _failed(self, sibling: Sibling, message: Received) -> None:
        join = self._handed.get((sibling, int(message.head["id"])))
        if join is not None:
            join.failed(ConnectionLost("the agent left, or was too slow, while it was handed over"))

    def _forget(self, key: tuple[Sibling, int]) -> None:
        self._handed.pop(key, None)

    def _left(self, sibling: Sibling) -> None:
        for (one, _), join in list(self._handed.items()):
            if one is sibling:
                join.failed(ConnectionLost("the process of this relay that the agent came to is gone"))


async def _answered(question: Awaitable[T], seconds: float) -> T:
    async with within(seconds, ConnectionLost("the process of this relay that waits for this join does not answer")):
        return await question


def _shut(sock: socket.socket) -> None:
    """End the connection, also where another process holds its descriptor."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        # It is over already.
        pass
