"""`forward`: a local TCP port whose connections are streams to one TCP target of the cluster.

Bytes move in `SocketSplice`, socket to stream and back, without a task and without being looked at. A stream opens
as soon as a connection is accepted, because in many protocols the server speaks first.
"""

from __future__ import annotations

import socket

import structlog

from arcbridge.client.serving.local_port import ForwardStats, LocalPort
from arcbridge.client.session.restrictions import restricts_requests
from arcbridge.client.session.session_manager import SessionManager
from arcbridge.errors import ArcbridgeError, ConfigError, PermissionRefused, StreamReset
from arcbridge.mux.session import MuxSession
from arcbridge.mux.splice import SocketSplice, SpliceResult
from arcbridge.net.sockets import reset
from arcbridge.tasks import TaskSet, cancel_and_wait
from arcbridge.wire.frames import ResetCode

PREFIX = "tcp:"
"""What a TCP target's name begins with in an OPEN."""
TARGETS_SHOWN = 20
"""Targets that an error names."""

_RESTRICTED = (
    "this session is restricted, and restricted sessions open no TCP target; use one without [restrict] in its settings"
)

log = structlog.get_logger("arcbridge.client")


class NoTarget(PermissionRefused):
    """The cluster lets the user in, and its agent has no target of this name for the user."""

    status_code = 404
    reason = "NotFound"


class Forward:
    """Serves one target on a listening, non-blocking socket, which it owns; `start`, then `close`."""

    def __init__(self, session: SessionManager, target: str, sock: socket.socket, *, any_user: bool = False) -> None:
        self._session = session
        self._target = f"{PREFIX}{check_target_name(target)}"
        self._tasks = TaskSet()
        self.stats = ForwardStats()
        self._log = log.bind(cluster=session.cluster, target=target)
        self._port = LocalPort([sock], self._accepted, self.stats, self._log, any_user=any_user)

    def start(self) -> None:
        self._port.start()

    async def close(self) -> None:
        """Stop accepting; running connections end with their session."""
        self._port.close()
        await cancel_and_wait(*self._tasks)

    def _accepted(self, sock: socket.socket) -> None:
        session = self._session.current
        if session is not None:
            self._open(session, sock)
        else:
            self._tasks.start(self._wait(sock))

    async def _wait(self, sock: socket.socket) -> None:
        """Wait for a session for a connection that came while none is up."""
        try:
            session = await self._session.ready(before_auth=True)
        except ArcbridgeError as error:
            self.stats.failed += 1
            self._log.warning("connection refused", reason=error.message)
            reset(sock)
            return
        except BaseException:
            reset(sock)
            raise
        self._open(session, sock)

    def _open(self, session: MuxSession, sock: socket.socket) -> None:
        splice = SocketSplice(sock, self._done)
        try:
            session.open(self._target, splice)
        except ArcbridgeError as error:
            self.stats.failed += 1
            self._log.warning("connection refused", reason=error.message)
            reset(sock)
            return
        self.stats.open += 1
        splice.read_on()  # a program that speaks first has spoken, mostly: its bytes travel with OPEN

    def _done(self, result: SpliceResult) -> None:
        self.stats.open -= 1
        self.stats.bytes_to_cluster += result.to_stream
        self.stats.bytes_from_cluster += result.from_stream
        if result.error is not None:
            self.stats.failed += 1
            # A local program that hangs up hard is its own business; what the other end did is worth a line.
            log_line = self._log.debug if isinstance(result.error, OSError) else self._log.warning
            why = reason(result.error, self._target, restricted=restricts_requests(self._session.restrictions))
            log_line("connection cut", reason=why, up=result.to_stream, down=result.from_stream)


def check_target_name(target: str) -> str:
    """Return a target's name as the agent's settings may spell it; raises ConfigError."""
    if not _is_target_name(target):
        raise ConfigError(f"{target[:64]!r} is not a target's name; use one of [targets] in the agent's settings")
    return target


def check_offered(target: str, offered: str, cluster: str, *, restricted: bool = False) -> None:
    """Raise NoTarget where the agent's list of targets (of AUTH_OK) lacks this one, and PermissionRefused where the
    session is `restricted` in its requests, and so opens none.

    Where `offered` is empty the agent did not say, and nothing is refused.
    """
    if restricted:
        raise PermissionRefused(_RESTRICTED)
    names = [word.removeprefix(PREFIX) for word in offered.split() if word.startswith(PREFIX)]
    if not offered or target in names:
        return
    shown = [name for name in names if _is_target_name(name)][:TARGETS_SHOWN]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    there = f"you may use {', '.join(shown)}{more}" if shown else "there is none for you"
    raise NoTarget(
        f'the agent of cluster "{cluster}" has no target {target!r} for you; {there} ([targets] in its settings)'
    )


def _is_target_name(name: str) -> bool:
    return 0 < len(name) <= 253 and all(c.isascii() and (c.isalnum() or c in "-_.") for c in name)


def reason(error: Exception, target: str, *, restricted: bool = False) -> str:
    """Say why a connection was cut, and what to do about it; `restricted`: as in `check_offered`."""
    name = target.removeprefix(PREFIX)
    if isinstance(error, StreamReset):
        if restricted and error.code == ResetCode.FORBIDDEN:
            return _RESTRICTED
        known: dict[int, str] = {
            ResetCode.UNKNOWN_TARGET: f"the agent has no target {name!r} for you; see [targets] in its settings",
            ResetCode.FORBIDDEN: f"you may not use the agent's target {name!r}; see [targets] in its settings",
            ResetCode.CONNECT_FAILED: f"the agent cannot connect to {name!r}; is it running?",
            ResetCode.IDLE: "nothing moved for too long",
            ResetCode.EXPIRED: "the login has expired; log in again",
            ResetCode.LIMIT: "the agent ended the connection at one of its limits; ask the cluster's operator",
            ResetCode.REFUSED: "the agent takes no new connection now; try again",
            ResetCode.CANCELLED: "the other end reset the connection",
        }
        return known.get(error.code, error.message)
    return error.message if isinstance(error, ArcbridgeError) else type(error).__name__
