"""The hand-over: an agent's join that came out at another worker than the one whose client waits for it.

All workers of a relay listen on one port, and the kernel chooses who accepts. Who a join of an agent is for is known
only from its JOIN message, inside the outer TLS, whose state cannot be given away. So the worker that accepted it (here
*sender*) lets the one that waits (*owner*, named by the dial token) judge it, ends the outer TLS in its stead, and
then gives the raw socket away:

    sender → owner     claim     the JOIN message, and the cluster of the verified certificate
    owner → sender     reply     say this to the agent, and end its TLS     (or `void`, `refuse`: say no)
    sender → owner     socket    the descriptor, and the bytes that came behind the agent's close_notify
    owner → sender     taken     it is here: close yours                    (or `dropped`: its client has left)

Either may say `failed` (sender) or `refuse` (owner) at any time before that.

Rules:

1. The owner judges: a token pairs once, whichever worker its agent came to.
2. After close_notify the sender reads nothing more from the socket. It holds its copy until the owner has said
   `taken`, and closes it then: there is no moment at which the socket could be lost.
3. If either process dies, or a step does not happen in time, the other one closes what it has, both ways: the agent is
   cut, and the client is told, or cut too if its pump had begun.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Callable
from typing import Final, TypeVar

import structlog

from arcbridge.errors import ArcbridgeError, ConnectionLost, JoinRefused, RemoteProtocolError
from arcbridge.net.join import JoinCode, ServerJoin
from arcbridge.net.sockets import reset
from arcbridge.observe.metrics import Metrics
from arcbridge.relay.pending_dials import ClaimedJoin, PendingDials, process_of
from arcbridge.relay.siblings.channel import ChannelClosed, Received
from arcbridge.relay.siblings.group import Sibling, Siblings
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

    def __init__(self, handovers: Handovers, sibling: Sibling, number: int) -> None:
        self._handovers = handovers
        self._sibling = sibling
        self._number = number
        self._sock: socket.socket | None = None
        self._arrived: asyncio.Future[tuple[socket.socket, bytes]] = asyncio.get_running_loop().create_future()

    @property
    def sock(self) -> socket.socket:
        if self._sock is None:
            raise ConnectionLost("the agent's socket has not arrived from the other process of this relay")
        return self._sock

    async def reply(self, reply: JoinReply) -> None:
        try:
            self._sibling.send({"t": "reply", "n": self._number}, reply.encode())
        except ChannelClosed as error:
            raise ConnectionLost(error.message) from error

    async def finish(self) -> bytes:
        try:
            async with asyncio.timeout(SOCKET_DEADLINE):
                self._sock, left_over = await asyncio.shield(self._arrived)
        except TimeoutError as error:
            raise ConnectionLost("the agent's socket did not arrive from the other process of this relay") from error
        self._handovers.forget(self._sibling, self._number)
        return left_over

    async def refuse(self, reply: JoinReply) -> None:
        """Tell the sender to refuse the agent. Does not wait."""
        self._handovers.forget(self._sibling, self._number)
        if self._arrived.done() and not self._arrived.cancelled() and self._arrived.exception() is None:
            reset(self._arrived.result()[0])
            return
        self._arrived.cancel()
        self._sibling.tell({"t": "refuse", "n": self._number}, reply.encode())

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


class _Handing:
    """At the sender: one hand-over under way."""

    def __init__(self, sibling: Sibling) -> None:
        loop = asyncio.get_running_loop()
        self.sibling = sibling
        self.verdict: asyncio.Future[JoinReply | str] = loop.create_future()
        """The reply, also a refusing one; or why the token is void."""
        self.taken: asyncio.Future[bool] = loop.create_future()

    def fail(self, error: ArcbridgeError) -> None:
        for one in (self.verdict, self.taken):
            if not one.done():
                one.set_exception(error)
                one.exception()


class Handovers:
    """Both sides. `claim` is set before the first sibling is connected."""

    def __init__(self, siblings: Siblings) -> None:
        self.process_id = siblings.worker_id
        self.claim: Claim = lambda join, request, cluster: "this worker does not serve yet"
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self._siblings = siblings
        self._numbers = itertools.count(1)
        self._handing: dict[int, _Handing] = {}
        self._handed: dict[tuple[Sibling, int], HandedJoin] = {}
        siblings.on_left.append(self._left)
        siblings.handlers.update(
            claim=self._claimed,
            void=self._judged,
            reply=self._judged,
            refuse=self._judged,
            socket=self._socket_arrived,
            failed=self._failed,
            taken=self._confirmed,
            dropped=self._confirmed,
        )

    def __len__(self) -> int:
        """Return how many hand-overs are under way, on both sides."""
        return len(self._handing) + len(self._handed)

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
        handing = self._handing[number] = _Handing(sibling)
        outcome, sent = "failed", False
        try:
            claim = JoinRequest(role="agent", token=request.token, instance=request.instance[:128])
            sibling.send({"t": "claim", "n": number, "cluster": cluster}, claim.encode())
            verdict = await _within(VERDICT_DEADLINE, handing.verdict)
            if isinstance(verdict, str):
                outcome = "void"
                return verdict
            if verdict.code:
                raise JoinRefused(verdict.code, verdict.message, retry_after=verdict.retry_after or None)
            await join.reply(verdict)
            left_over = await join.finish()
            sent = True
            sibling.send({"t": "socket", "n": number}, left_over, join.sock)
            if not await _within(TAKEN_DEADLINE, handing.taken):
                raise ConnectionLost("the client left while the agent was handed over")
            outcome = "joined"
            join.sock.close()
            return ""
        finally:
            del self._handing[number]
            self.outcomes[outcome] += 1
            if outcome == "failed":
                sibling.tell({"t": "failed", "n": number})
                if sent:
                    # The owner may have a copy that it will never use: closing ours would leave the agent waiting.
                    _shut(join.sock)

    def _judged(self, sibling: Sibling, message: Received) -> None:
        handing = self._handing.get(int(message.head["n"]))
        if handing is None or handing.sibling is not sibling:
            return
        kind = message.head["t"]
        if kind == "refuse" and handing.verdict.done():
            handing.fail(ConnectionLost("the client left while the agent was handed over"))
        elif not handing.verdict.done():
            handing.verdict.set_result(
                str(message.head["reason"]) if kind == "void" else JoinReply.decode(message.body)
            )

    def _confirmed(self, sibling: Sibling, message: Received) -> None:
        handing = self._handing.get(int(message.head["n"]))
        if handing is not None and handing.sibling is sibling and not handing.taken.done():
            handing.taken.set_result(message.head["t"] == "taken")

    # -- the owner --------------------------------------------------------------------------------------------------

    def _claimed(self, sibling: Sibling, message: Received) -> None:
        head = message.head
        number = int(head["n"])
        join = HandedJoin(self, sibling, number)
        self._handed[sibling, number] = join
        reason = self.claim(join, JoinRequest.decode(message.body), str(head["cluster"]))
        if reason:
            self.forget(sibling, number)
            sibling.tell({"t": "void", "n": number, "reason": reason})

    def _socket_arrived(self, sibling: Sibling, message: Received) -> None:
        number = int(message.head["n"])
        join = self._handed.get((sibling, number))
        if message.sock is None:
            # Lost on its way, for want of descriptors here: the sender still has it, and cuts it.
            log.warning("agent's socket not taken over", reason="out of file descriptors", advice="raise LimitNOFILE")
            if join is not None:
                join.failed(ConnectionLost("this relay is out of file descriptors"))
            sibling.tell({"t": "dropped", "n": number})
        elif join is not None and join.arrived(message.sock, message.body):
            sibling.tell({"t": "taken", "n": number})
        else:
            message.sock.close()
            sibling.tell({"t": "dropped", "n": number})

    def _failed(self, sibling: Sibling, message: Received) -> None:
        join = self._handed.get((sibling, int(message.head["n"])))
        if join is not None:
            join.failed(ConnectionLost("the agent left, or was too slow, while it was handed over"))

    def forget(self, sibling: Sibling, number: int) -> None:
        self._handed.pop((sibling, number), None)

    def _left(self, sibling: Sibling) -> None:
        for handing in self._handing.values():
            if handing.sibling is sibling:
                handing.fail(ChannelClosed())
        for (one, _), join in list(self._handed.items()):
            if one is sibling:
                join.failed(ConnectionLost("the process of this relay that the agent came to is gone"))


async def _within(seconds: float, future: asyncio.Future[T]) -> T:
    try:
        async with asyncio.timeout(seconds):
            return await future
    except TimeoutError as error:
        raise ConnectionLost("the process of this relay that waits for this join does not answer") from error


def _shut(sock: socket.socket) -> None:
    """End the connection, also where another process holds its descriptor."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        # It is over already.
        pass
