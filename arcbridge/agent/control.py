"""The control connection to one relay, and the dials that come over it.

One connection per relay of the list, redialled with full jitter. A DIAL is answered only if it names an address of the
agent's own list (threat J19: a relay must not turn the agent into a port scanner), for this cluster and this instance,
while there is room. Then the agent joins under the dial token, and the socket carries the end-to-end TLS.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import structlog

from arcbridge.agent.enrol import CredentialKeeper
from arcbridge.agent.session_certificate import SessionCertificate
from arcbridge.agent.sessions import MAX_SESSIONS, Sessions
from arcbridge.errors import ArcbridgeError, ConfigError, ConnectionLost, SessionEnded
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.net.address import Address, parse_address
from arcbridge.net.backoff import Backoff
from arcbridge.net.dialer import connect
from arcbridge.net.join import JoinCode, client_join
from arcbridge.net.tls import ALPN_CONTROL, ALPN_JOIN, RelayTrust, outer_client_context
from arcbridge.pki.credentials import AgentCredential
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.records import Dial, JoinRequest, Status
from arcbridge.wire.session import Kind, Side

MAX_DIALS = 64
"""Dials under way at once, of all relays together (threat B7)."""
CONNECT_DEADLINE = 10.0
HANDSHAKE_DEADLINE = 5.0
MAX_DIAL_DEADLINE = 30.0
JOIN_MEMORY = 60.0
"""Seconds for which a failed join makes the agent unready, unless another works before."""
HINT_MIN, HINT_MAX = 1, 600
"""A relay's hint when to come back is obeyed within this, seconds (threat B8)."""

_log = structlog.get_logger("arcbridge.agent")


class DialStatus(IntEnum):
    """Why a DIAL is not answered with a join; travels as Status.code."""

    WILL_JOIN = 0
    OVERLOADED = 1
    ADDRESS = 2
    CLUSTER = 3
    INSTANCE = 4
    DRAINING = 5


class ControlRoom:
    """All control connections of one agent and what their dials share.

    `start()` makes one task per relay; `close()` ends them. Counters are read by the metrics.
    """

    def __init__(
        self,
        relays: Sequence[Address],
        keeper: CredentialKeeper,
        sessions: Sessions,
        *,
        instance: str,
        software: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.relays = tuple(relays)
        self._keeper = keeper
        self._sessions = sessions
        self._instance = instance
        self._software = software
        self._clock = clock
        self._certificate = SessionCertificate()
        self._contexts: dict[tuple[str, str], ssl.SSLContext] = {}
        self._contexts_for: AgentCredential | None = None
        self._loops: list[asyncio.Task[None]] = []
        self._dials: set[asyncio.Task[None]] = set()
        self.links: set[ControlLink] = set()
        self.connected = asyncio.Event()
        """Set while at least one control connection is up."""
        self.draining = False
        self.joins = 0
        self.join_failures = 0
        self.dials_refused = 0
        self.connects_failed = 0
        self._join_failed_at: float | None = None

    @property
    def dials_open(self) -> int:
        """Dials under way."""
        return len(self._dials)

    def unready(self) -> str | None:
        """Why the agent is not ready, or None."""
        if self.draining:
            return "the agent is stopping"
        if not self.links:
            return "no control connection to a relay is up"
        if self._join_failed_at is not None and self._clock() - self._join_failed_at < JOIN_MEMORY:
            return "the last join that a relay asked for failed"
        return None

    def start(self) -> None:
        """Begins to connect."""
        loop = asyncio.get_running_loop()
        self._loops = [loop.create_task(self._keep(relay), name=f"control-{relay}") for relay in self.relays]

    def drain(self) -> None:
        """Asks the relays for no more dials; what is being joined goes on."""
        self.draining = True
        for link in list(self.links):
            if link.session is not None and not link.session.closed:
                link.session.send_status(Status(instance=self._instance, ready=False, message="stopping"))
                link.session.goaway(GoawayCode.DRAINING, "the agent is stopping", 0)

    async def close(self) -> None:
        """Ends connections, dials and tasks."""
        self.draining = True
        tasks = [*self._loops, *self._dials]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- one relay --------------------------------------------------------------------------------------------

    async def _keep(self, relay: Address) -> None:
        """Connects to `relay`, again and again, until cancelled."""
        backoff = Backoff()
        log = _log.bind(connection=str(relay))
        while True:
            link = ControlLink(self, relay)
            began = self._clock()
            lasted, hint = 0.0, None
            try:
                session = await self._connect(relay, link)
                began = self._clock()
                error: ArcbridgeError = await session.wait_ended()
                lasted = self._clock() - began
                hint = link.retry_after or None
            except ArcbridgeError as refusal:
                self.connects_failed += 1
                error, hint = refusal, refusal.retry_after
            finally:
                self._unlink(link)
                if link.session is not None and not link.session.closed:
                    link.session.close(GoawayCode.DONE, "the agent has stopped")
            if self.draining:
                return
            if isinstance(error, SessionEnded) and error.code == GoawayCode.REVOKED:
                hint = max(hint or 0, 30)
            if hint is not None:
                hint = min(max(hint, HINT_MIN), HINT_MAX)
            delay = backoff.next_delay(lasted=lasted, hint=hint)
            log.warning("control connection lost", reason=error.message, retry_in=round(delay, 1))
            await asyncio.sleep(delay)

    async def _connect(self, relay: Address, link: ControlLink) -> MuxSession:
        context = self._context(ALPN_CONTROL)
        sock = await connect(relay, deadline=CONNECT_DEADLINE)
        session = MuxSession(
            Side.INITIATOR, Kind.CONTROL, link, label=str(relay), agent=self._instance, software=self._software
        )
        link.session = session
        try:
            await asyncio.get_running_loop().create_connection(
                session.protocol,
                sock=sock,
                ssl=context,
                server_hostname=relay.host,
                ssl_handshake_timeout=HANDSHAKE_DEADLINE,
                ssl_shutdown_timeout=3.0,
            )
        except (OSError, TimeoutError) as error:
            sock.close()
            lost = ConnectionLost(f"the TLS handshake with {relay} failed: {_tls_words(error)}")
            session.abort(lost)
            raise lost from error
        except BaseException:
            sock.close()
            session.abort()
            raise
        return session

    def linked(self, link: ControlLink) -> None:
        """HELLO was exchanged."""
        self.links.add(link)
        self.connected.set()
        _log.info("control connection up", connection=str(link.relay))
        if link.session is not None:
            link.session.send_status(Status(instance=self._instance, ready=True))

    def _unlink(self, link: ControlLink) -> None:
        self.links.discard(link)
        if not self.links:
            self.connected.clear()

    # -- dials ------------------------------------------------------------------------------------------------

    def dial(self, link: ControlLink, dial: Dial) -> None:
        """Judges a DIAL at once, answers with a STATUS, and joins."""
        code, message = self._judge(dial)
        if link.session is not None:
            link.session.send_status(
                Status(token=dial.token, code=code, message=message, instance=self._instance, ready=not self.draining)
            )
        if code is not DialStatus.WILL_JOIN:
            self.dials_refused += 1
            _log.warning("dial refused", connection=str(link.relay), session=dial.join_id, reason=message)
            return
        task = asyncio.get_running_loop().create_task(self._join(dial), name=f"join-{dial.join_id}")
        self._dials.add(task)
        task.add_done_callback(self._dials.discard)

    def _judge(self, dial: Dial) -> tuple[DialStatus, str]:
        if self.draining:
            return DialStatus.DRAINING, "the agent is stopping"
        if len(self._dials) >= MAX_DIALS or len(self._sessions) >= MAX_SESSIONS:
            return DialStatus.OVERLOADED, "the agent has too many sessions or joins under way"
        if dial.cluster != self._keeper.current.cluster:
            return DialStatus.CLUSTER, "the agent belongs to another cluster"
        if dial.instance and dial.instance != self._instance:
            return DialStatus.INSTANCE, "this is another instance of the agent"
        if self._address(dial) is None:
            return DialStatus.ADDRESS, "the address is not one of the agent's relays: add it to `relays`"
        return DialStatus.WILL_JOIN, ""

    def _address(self, dial: Dial) -> Address | None:
        try:
            address = parse_address(dial.address)
        except ConfigError:
            return None
        return address if address in self.relays else None

    async def _join(self, dial: Dial) -> None:
        log = _log.bind(session=dial.join_id)
        deadline = min(float(dial.deadline or CONNECT_DEADLINE), MAX_DIAL_DEADLINE)
        try:
            async with asyncio.timeout(deadline + HANDSHAKE_DEADLINE):
                await self._join_and_serve(dial, deadline)
        except (ArcbridgeError, TimeoutError) as error:
            self.join_failures += 1
            # A client that left in the middle says nothing about us, and is no news.
            ours = not isinstance(error, ConnectionLost) and getattr(error, "code", None) != JoinCode.GONE
            if ours:
                self._join_failed_at = self._clock()
            reason = error.message if isinstance(error, ArcbridgeError) else "not complete in time"
            (log.warning if ours else log.info)("join failed", reason=reason)
        else:
            self.joins += 1
            self._join_failed_at = None

    async def _join_and_serve(self, dial: Dial, deadline: float) -> None:
        address = self._address(dial)
        assert address is not None  # judged before
        credential = self._keeper.current
        request = JoinRequest(
            role="agent",
            cluster=credential.cluster,
            token=dial.token,
            instance=self._instance,
            version=self._software,
            hops=dial.hops,
        )
        context, inner = self._context(ALPN_JOIN), self._certificate.context(credential)
        sock = await connect(address, deadline=deadline)
        await client_join(sock, context, address.host, request, deadline=deadline)
        await self._sessions.serve(sock, inner, dial.join_id)

    def _context(self, alpn: str) -> ssl.SSLContext:
        """The outer TLS context, kept while the credential stays the same."""
        credential = self._keeper.current
        if credential is not self._contexts_for:
            self._contexts.clear()
            self._contexts_for = credential
        key = (alpn, credential.certificate_pem)
        context = self._contexts.get(key)
        if context is None:
            pair = (credential.certificate_pem, credential.key_pem)
            context = outer_client_context(RelayTrust(credential.relay_ca_pem), alpn, client_certificate=pair)
            self._contexts[key] = context
        return context


class ControlLink(BaseHandler):
    """One control connection."""

    def __init__(self, room: ControlRoom, relay: Address) -> None:
        self._room = room
        self.relay = relay
        self.session: MuxSession | None = None
        self.retry_after = 0

    def established(self, session: MuxSession) -> None:
        self._room.linked(self)

    def dial_received(self, session: MuxSession, dial: Dial) -> None:
        self._room.dial(self, dial)

    def goaway_received(self, session: MuxSession, goaway: Any) -> None:
        self.retry_after = int(goaway.retry_after)


def _tls_words(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message}); check relay_ca_pin or relay_ca_file"
    if isinstance(error, ssl.SSLError):
        return str(error.reason or "unknown")
    return type(error).__name__
