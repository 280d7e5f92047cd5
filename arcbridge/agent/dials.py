"""Carries out the dials that relays ask for: decides about each at once, and joins.

A DIAL is accepted only if it names an address of the agent's own list (docs/threats.md#J19: a relay must not turn the
agent into a port scanner), for this cluster and this instance, below the limits. Then the agent joins with the dial
token, and the socket carries the end-to-end TLS of a session (`sessions`). `control` sends the STATUS that answers it.

A DIAL that asks for this very instance may belong to a session that resumes. It is accepted also while the agent takes
no new sessions: whether it resumes one is known only from its HELLO, and a new session is refused there.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import KW_ONLY, dataclass, field
from enum import IntEnum

import structlog

from arcbridge import __version__
from arcbridge.agent.enrol import CredentialKeeper, outer_context
from arcbridge.agent.session_certificate import SessionCertificate
from arcbridge.agent.sessions import Sessions
from arcbridge.errors import ArcbridgeError, BytesAltered, ConfigError, ConnectionLost
from arcbridge.loop_shares import LoopTime
from arcbridge.net.address import Address, parse_address
from arcbridge.net.dialer import connect
from arcbridge.net.join import JOIN_ID, JoinCode, client_join
from arcbridge.net.round_trips import RoundTrips
from arcbridge.net.tls import ALPN_JOIN
from arcbridge.observe.untrusted_text import clean
from arcbridge.tasks import TaskSet, cancel_and_wait
from arcbridge.wire.records import Dial, JoinRequest

MAX_DIALS = 64
"""Dials under way at once for one relay (docs/threats.md#B7). Each relay has its own, so that one whose joins stall
keeps no other relay's users away (docs/threats.md#J31)."""
CONNECT_DEADLINE = 10.0
HANDSHAKE_DEADLINE = 5.0
MAX_DIAL_DEADLINE = 30.0
WRONG_ADDRESS_MEMORY = 600.0
"""Seconds for which the self-checks tell of a DIAL to an address that is none of the agent's relays."""
CURRENT = 120.0
"""Seconds after which the round trip that a join shows is taken: a control connection shows it twice a minute."""
JOIN_MEMORY = 60.0
"""Seconds for which failed joins of every relay make the agent unready, unless one works before."""

_log = structlog.get_logger("arcbridge.agent")


class DialStatus(IntEnum):
    """Whether a DIAL is accepted, and why not; travels as Status.code."""

    WILL_JOIN = 0
    OVERLOADED = 1
    ADDRESS = 2
    CLUSTER = 3
    INSTANCE = 4
    DRAINING = 5
    JOIN_ID = 6


@dataclass(eq=False, repr=False)
class Dials:
    """All dials of one agent. `close()` must be awaited; the counters are read by the metrics."""

    relays: Sequence[Address]
    keeper: CredentialKeeper
    sessions: Sessions
    _: KW_ONLY
    instance: str
    clock: Callable[[], float] = time.monotonic
    round_trips: RoundTrips = field(default_factory=RoundTrips)
    """Those to the relays, by their addresses."""

    def __post_init__(self) -> None:
        self._certificate = SessionCertificate()
        self._open = TaskSet()
        self._dialling: dict[asyncio.Task[None], Address] = {}
        """Those of them that the relay has not joined yet, each with the relay that asked for it. The others wait for a
        client: they count among the sessions' unauthenticated connections, or clients that never speak would keep all
        dials busy (docs/threats.md#L4)."""
        self._join_failed_at: dict[Address, float] = {}
        """When the last join that a relay asked for failed, by relay; a relay whose last join worked is not in it."""
        self._wrong_address: tuple[str, float] | None = None
        """An address that is none of the agent's relays, to which one of them asked it to come, and when."""
        self.joins = 0
        self.join_failures = 0
        self.refused = 0

    def __len__(self) -> int:
        """Dials under way."""
        return len(self._open)

    def unready(self, connected: Collection[Address]) -> str | None:
        """Return why the agent is not ready as far as joins tell, or None: one of the connected relays works."""
        after = self.clock() - JOIN_MEMORY
        if connected and all(self._join_failed_at.get(relay, -math.inf) > after for relay in connected):
            return "the last join that each connected relay asked for failed"
        return None

    @property
    def wrong_address(self) -> str:
        """The address of `relays` that is missing there, as a relay has said it lately; empty where none has."""
        if self._wrong_address is None or self.clock() - self._wrong_address[1] >= WRONG_ADDRESS_MEMORY:
            return ""
        return self._wrong_address[0]

    def decide(self, dial: Dial, relay: Address, *, draining: bool) -> tuple[DialStatus, str]:
        """Decide about a DIAL of this relay; the text says why it is refused."""
        may_come_back = dial.instance == self.instance
        if draining and not may_come_back:
            return DialStatus.DRAINING, "the agent is stopping"
        address = self._address(dial)
        busy = sum(asked == relay for asked in self._dialling.values()) >= MAX_DIALS
        if busy or not self.sessions.accepts_connection(str(address or ""), may_come_back=may_come_back):
            return DialStatus.OVERLOADED, "the agent has too many sessions or joins under way"
        if not JOIN_ID.fullmatch(dial.join_id):
            return DialStatus.JOIN_ID, "the join has an id that no relay makes"
        if dial.cluster != self.keeper.current.cluster:
            return DialStatus.CLUSTER, "the agent belongs to another cluster"
        if dial.instance and not may_come_back:
            return DialStatus.INSTANCE, "this is another instance of the agent"
        if address is None:
            self._wrong_address = clean(dial.address, 100), self.clock()
            return DialStatus.ADDRESS, "the address is not one of the agent's relays: add it to `relays`"
        return DialStatus.WILL_JOIN, ""

    def join(self, dial: Dial, relay: Address, done: Callable[[], None]) -> None:
        """Join, in a task, as `relay` asked for; `done` is called at its end, however it ends."""
        payer = self.sessions.accounts.relays.of(str(relay), time.monotonic())
        steps = payer.steps(self._join(dial, relay, payer))
        task = self._open.start(steps, f"join-{dial.join_id}")
        self._dialling[task] = relay

        def ended(task: asyncio.Task[None]) -> None:
            self._dialling.pop(task, None)
            done()

        task.add_done_callback(ended)

    async def close(self) -> None:
        """End the dials under way."""
        await cancel_and_wait(*self._open)

    # -- inside -----------------------------------------------------------------------------------------------

    def _address(self, dial: Dial) -> Address | None:
        try:
            address = parse_address(dial.address)
        except ConfigError:
            return None
        return address if address in self.relays else None

    async def _join(self, dial: Dial, relay: Address, payer: LoopTime) -> None:
        log = _log.bind(session=dial.join_id)
        deadline = min(float(dial.deadline or CONNECT_DEADLINE), MAX_DIAL_DEADLINE)
        try:
            async with asyncio.timeout(deadline + HANDSHAKE_DEADLINE):
                # A relay whose joins take too much of the event loop waits with the next one (docs/threats.md#L47).
                if (held := payer.held_until - time.monotonic()) > 0:
                    await asyncio.sleep(held)
                await self._join_and_serve(dial, deadline)
        except (ArcbridgeError, TimeoutError) as error:
            self.join_failures += 1
            # A client that leaves during the join is usual, and tells nothing about this agent.
            own_failure = not isinstance(error, ConnectionLost) and getattr(error, "code", None) != JoinCode.GONE
            if own_failure:
                self._join_failed_at[relay] = self.clock()
            reason = error.message if isinstance(error, ArcbridgeError) else "not complete in time"
            (log.warning if own_failure or isinstance(error, BytesAltered) else log.info)("join failed", reason=reason)
        else:
            self.joins += 1
            self._join_failed_at.pop(relay, None)

    async def _join_and_serve(self, dial: Dial, deadline: float) -> None:
        address = self._address(dial)
        assert address is not None  # `decide` has checked it
        credential = self.keeper.current
        round_trip = self.round_trips.least(str(address))
        request = JoinRequest(
            role="agent",
            cluster=credential.cluster,
            token=dial.token,
            instance=self.instance,
            version=__version__,
            hops=dial.hops,
            round_trip=round(round_trip * 1e6) if math.isfinite(round_trip) else 0,
        )
        context, inner = outer_context(credential, ALPN_JOIN), self._certificate.tls(credential)
        sock = await connect(address, deadline=deadline)

        def measured(seconds: float) -> None:
            if self.round_trips.age(str(address)) >= CURRENT:  # of a control connection more is known
                self.round_trips.note(str(address), seconds)

        await client_join(sock, context, address.host, request, deadline=deadline, measured=measured)
        task = asyncio.current_task()
        if task is not None:
            self._dialling.pop(task, None)
        await self.sessions.serve(
            sock, inner.context, dial.join_id, via=str(address), peer=inner.peer, oldest_ca_pem=inner.oldest_ca_pem
        )
