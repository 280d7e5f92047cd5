"""Renews the token of one session in time, and makes the AUTH that carries it.

It holds no timer: the owner of the session awaits `at`. Invariant: an AUTH has the newest token that there is, and a
proof for the very connection that it travels on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from arcbridge.client.credentials.tokens import ClusterToken, Tokens
from arcbridge.errors import ArcbridgeError
from arcbridge.mux.connection import peer_certificate
from arcbridge.mux.session import MuxSession
from arcbridge.wire.records import RESTRICTED, UNRESTRICTED, Auth, Restrictions

RENEWAL_RETRY = 15.0
"""Seconds between attempts to renew, while there is no newer token."""
ROUNDED = 2.0
"""Seconds by which the life that an AUTH_OK states may be too short."""

log = structlog.get_logger("arcbridge.client")


class Schedule:
    """When to send a newer token than `sent`; monotonic seconds."""

    __slots__ = ("at", "ends_at", "sent")

    def __init__(self, sent: ClusterToken | None, lifetime: float = 0.0, now: float = 0.0) -> None:
        """`sent`: None where none was; `lifetime`: seconds for which the token is good, 0: not known."""
        self.sent = sent
        self.ends_at = now + lifetime if lifetime > 0 else 0.0
        """When the agent stops to accept the token; 0: not known."""
        # 80 % of the life, or five minutes before its end, but not in the first half.
        self.at = now + max(min(0.8 * lifetime, lifetime - 300), 0.5 * lifetime) if lifetime > 0 else 0.0
        """When a newer token is due; 0: never."""

    def again(self, now: float, interval: float) -> None:
        """Schedule another try after `interval` seconds, or sooner where so long a wait would miss the token's end.

        The first try may come a moment before the login takes its own token for old, and finds that one.
        """
        left = self.ends_at - now if self.ends_at else 4 * interval
        self.at = now + min(interval, max(left / 4, 1.0))


NOT_SCHEDULED = Schedule(None)


class TokenRenewal:
    """The token that a session sent last, and the next one."""

    def __init__(
        self,
        cluster: str,
        tokens: Tokens,
        ca_pin: str,
        clock: Callable[[], float] = time.time,
        restrictions: Restrictions = UNRESTRICTED,
    ) -> None:
        """`ca_pin`: that of the cluster's CA, for which proofs are made. `restrictions`: what the session gives up,
        which each AUTH repeats."""
        self._restrictions = restrictions.encode()
        self._until = restrictions.until
        self._tokens = tokens
        self._ca_pin = ca_pin
        self._clock = clock
        self._log = log.bind(cluster=cluster)
        self.schedule = NOT_SCHEDULED
        """That of the token that was sent last; of none while a connection is made, which sends a token of its own."""
        self.expires_in = 0.0
        """Seconds for which the agent accepts the token sent last; 0: it did not say."""

    def auth(self, token: ClusterToken, certificate: bytes) -> Auth:
        """Return the AUTH for a connection in which the agent showed `certificate` (DER). Raises StateError."""
        proof = self._tokens.prove(token.text, certificate, self._ca_pin)
        kind = f"{RESTRICTED}{token.kind}" if self._restrictions else token.kind
        return Auth(kind=kind, token=token.text, proof=proof, restrictions=self._restrictions)

    def begin(self, sent: ClusterToken) -> None:
        """Schedule by what the agent's AUTH_OK states, which may come before or after this call, else by the token.

        Nothing is due where the session ends by its restrictions before its token does.
        """
        lifetime = self.expires_in
        if not lifetime and sent.expires_at:
            lifetime = max(1.0, sent.expires_at - self._clock())
        self.schedule = Schedule(sent, lifetime, asyncio.get_running_loop().time())
        # Both are times by the agent's clock; where the token's is not known, by this machine's.
        if 0 < self._until <= (sent.expires_at or self._clock() + lifetime + ROUNDED):
            self.schedule.at = 0.0

    def accepted(self, expires_in: float) -> None:
        """Note an AUTH_OK: the first one, after a renewal, or after a resumption."""
        self.expires_in = expires_in
        if self.schedule.sent is not None:
            self.begin(self.schedule.sent)

    async def renew(self, session: MuxSession) -> None:
        """Send a newer token in the session; where there is none, schedule another try."""
        schedule = self.schedule
        if schedule.sent is None:
            return
        loop = asyncio.get_running_loop()
        try:
            token = await self._tokens.cluster()
            if self.schedule is not schedule:
                return  # a resumption has sent a token meanwhile
            newer = token.text != schedule.sent.text and session.usable
            # The proof may fail as the token may: the file of its key can be damaged, or gone.
            auth = self.auth(token, peer_certificate(session.transport)) if newer else None
        except ArcbridgeError as error:
            self._log.warning("the login cannot be renewed", session=session.label, reason=error.message)
        else:
            if auth is not None:
                session.authenticate(auth)
                self.expires_in = 0.0
                self.begin(token)
                self._log.debug("token renewed", session=session.label)
                return
            if schedule.ends_at and schedule.ends_at - loop.time() < 60:
                self._log.warning("the login ends soon and there is no newer token", session=session.label)
        schedule.again(loop.time(), RENEWAL_RETRY)
