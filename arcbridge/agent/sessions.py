"""Sessions: from a joined socket to streams that are served as somebody, until that somebody's token ends.

Nothing reaches the API server before AUTH is accepted: the session's machine holds streams back until then. A session
ends at its token's expiry by the wall clock, unless AUTH was renewed with a token of the same subject; another subject
ends it at once. Groups of a renewed token count from the next request.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import Callable

import structlog

from arcbridge.agent.authenticator import Authenticated, Authenticator
from arcbridge.agent.kube.proxy import Caller, KubeProxy
from arcbridge.agent.targets import PREFIX, TcpTargets
from arcbridge.errors import ArcbridgeError, ConnectionLost, PermissionRefused, Unauthenticated
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.mux.stream import StreamTransport
from arcbridge.wire.frames import GoawayCode, ResetCode
from arcbridge.wire.records import Auth, AuthOk
from arcbridge.wire.session import Kind, Side

HANDSHAKE_DEADLINE = 5.0
CLOCK_CHECK = 5.0
"""Seconds between two looks at the wall clock: a lapsed token ends its session at most this much late, also when the
clock was set or the machine slept."""
MAX_SESSIONS = 1000
"""Sessions of one agent process; a join over it is refused before it is dialled."""

_log = structlog.get_logger("arcbridge.agent")


class Sessions:
    """All sessions of one agent. `close()` must be awaited."""

    def __init__(
        self,
        authenticator: Authenticator,
        proxy: KubeProxy,
        targets: TcpTargets,
        *,
        instance: str = "",
        software: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.authenticator = authenticator
        self.proxy = proxy
        self.targets = targets
        self.clock = clock
        self._instance = instance
        self._software = software
        self._open: set[AgentSession] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self.opened = 0
        self.refused = 0
        self.expired = 0

    def __len__(self) -> int:
        return len(self._open)

    async def serve(self, sock: socket.socket, context: ssl.SSLContext, join_id: str) -> None:
        """Takes over a joined socket: returns once the end-to-end TLS stands; the session then lives by itself.

        Raises ConnectionLost when the handshake fails; the socket is closed then.
        """
        handler = AgentSession(self, join_id)
        session = MuxSession(
            Side.ACCEPTOR, Kind.SESSION, handler, label=join_id, agent=self._instance, software=self._software
        )
        handler.session = session
        self._open.add(handler)
        self._empty.clear()
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                session.protocol,
                sock,
                ssl=context,
                ssl_handshake_timeout=HANDSHAKE_DEADLINE,
                ssl_shutdown_timeout=3.0,
            )
        except (OSError, TimeoutError) as error:
            sock.close()
            lost = ConnectionLost(f"the end-to-end TLS handshake failed ({type(error).__name__})")
            session.abort(lost)
            raise lost from error
        except BaseException:
            sock.close()
            session.abort()
            raise

    def drain(self) -> None:
        """Tells every client to go elsewhere; what runs may finish."""
        for handler in list(self._open):
            if handler.session is not None:
                handler.session.goaway(GoawayCode.DRAINING, "the agent is stopping", 1)

    async def wait_empty(self) -> None:
        """Until no session is left."""
        await self._empty.wait()

    async def close(self, code: GoawayCode = GoawayCode.DRAINING, message: str = "the agent has stopped") -> None:
        """Ends what is left, at once."""
        handlers = list(self._open)
        for handler in handlers:
            if handler.session is not None:
                handler.session.close(code, message, 1)
        await asyncio.gather(*(handler.finished() for handler in handlers))

    def ended(self, handler: AgentSession) -> None:
        """Called by a session at its end."""
        self._open.discard(handler)
        if not self._open:
            self._empty.set()


class AgentSession(BaseHandler):
    """The agent's side of one session."""

    def __init__(self, sessions: Sessions, join_id: str) -> None:
        self._sessions = sessions
        self._join_id = join_id
        self.session: MuxSession | None = None
        self._caller: Caller | None = None
        self._pending: Auth | None = None
        self._judging: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._log = _log.bind(session=join_id)

    # -- callbacks of the session -----------------------------------------------------------------------------

    def auth_received(self, session: MuxSession, auth: Auth) -> None:
        """Judged one at a time; of several that wait the newest counts."""
        self._pending = auth
        if self._judging is None or self._judging.done():
            self._judging = asyncio.get_running_loop().create_task(self._judge(session), name=f"auth-{self._join_id}")

    def stream_opened(self, session: MuxSession, stream: StreamTransport, target: str) -> None:
        caller = self._caller
        if caller is None:  # the machine holds streams back until AUTH is accepted; this is the second lock
            stream.abort(ResetCode.REFUSED)
        elif target == "kubernetes":
            self._sessions.proxy.serve(stream, caller)
        elif target.startswith(PREFIX):
            self._sessions.targets.serve(stream, target, self._join_id, caller.identity)
        else:
            stream.abort(ResetCode.UNKNOWN_TARGET)

    def session_ended(self, session: MuxSession, error: ArcbridgeError) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._judging is not None:
            self._judging.cancel()
        self._sessions.ended(self)
        if self._caller is not None:
            self._log.info("session ended", user=self._caller.identity.username, reason=error.message)

    async def finished(self) -> None:
        """Until the session is over and its task is gone."""
        if self.session is not None:
            await self.session.wait_ended()
        if self._judging is not None:
            await asyncio.wait([self._judging])

    # -- inside -----------------------------------------------------------------------------------------------

    async def _judge(self, session: MuxSession) -> None:
        while (auth := self._pending) is not None:
            self._pending = None
            try:
                found = await self._sessions.authenticator.authenticate(auth)
                if found.identity.expires_at <= self._sessions.clock():
                    raise Unauthenticated("the token has expired; log in again")
            except ArcbridgeError as error:
                if not session.closed:
                    self._refuse(session, error)
                return
            if session.closed or not self._accept(session, found):
                return

    def _refuse(self, session: MuxSession, error: ArcbridgeError) -> None:
        code = GoawayCode.UNAVAILABLE
        if isinstance(error, Unauthenticated):
            code = GoawayCode.UNAUTHENTICATED
        elif isinstance(error, PermissionRefused):
            code = GoawayCode.FORBIDDEN
        if self._caller is not None and code is GoawayCode.UNAVAILABLE:
            # A renewal that cannot be judged now changes nothing: the old token is good until it lapses.
            self._log.warning("renewal could not be judged", reason=error.message)
            return
        self._sessions.refused += 1
        self._log.warning("session refused", reason=error.message, rule=getattr(error, "rule", ""))
        session.refuse_auth(code, error.message)

    def _accept(self, session: MuxSession, found: Authenticated) -> bool:
        identity = found.identity
        if self._caller is None:
            self._caller = Caller(self._join_id, identity, found.token_mode)
            self._sessions.opened += 1
            mode = "bearer" if found.token_mode else "oidc"
            self._log.info("session opened", user=identity.username, groups=len(identity.groups), mode=mode)
        elif identity.subject != self._caller.identity.subject or found.token_mode != self._caller.token_mode:
            self._log.warning("session refused", reason="renewed with the token of another subject")
            session.close(GoawayCode.FORBIDDEN, "the session was renewed with a token of another user")
            return False
        else:
            self._caller.identity = identity
        left = max(1, int(identity.expires_at - self._sessions.clock()))
        session.accept_auth(
            AuthOk(session_id=os.urandom(16), resume_secret=os.urandom(16), subject=identity.username, expires_in=left)
        )
        self._watch_clock()
        return True

    def _watch_clock(self) -> None:
        """Ends the session at expiry. The wall clock is looked at again and again: it may be set, or have slept."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        session, caller = self.session, self._caller
        if session is None or caller is None or session.closed:
            return
        left = caller.identity.expires_at - self._sessions.clock()
        if left <= 0:
            self._sessions.expired += 1
            session.close(GoawayCode.EXPIRED, "the token has expired; log in again")
            return
        self._timer = asyncio.get_running_loop().call_later(min(left, CLOCK_CHECK), self._watch_clock)
