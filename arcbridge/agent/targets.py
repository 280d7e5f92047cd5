"""Serves TCP targets: streams that go to an address of the agent's allow-list instead of the API server.

It denies by default: a target that is not listed does not exist, and a listed one is for its users and groups alone.
It reads nothing of what it carries. Invariant: the address comes from the agent's own settings and never from the
caller; it is resolved once per connection, and the addresses found are the ones dialled.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

import structlog

from arcbridge.agent.accounts import Account, Limit
from arcbridge.agent.audit import AuditLog, AuditRecord
from arcbridge.agent.kube.caller import Caller
from arcbridge.errors import ArcbridgeError, ConfigError
from arcbridge.identity.claims import Identity
from arcbridge.limiters import KeyedTokenBucket
from arcbridge.mux.splice import SocketSplice, SpliceResult
from arcbridge.mux.stream import StreamTransport
from arcbridge.net.address import Address, parse_address
from arcbridge.net.dialer import DIRECT, begin, connect, finish
from arcbridge.net.sockets import disable_user_timeout
from arcbridge.settings.config import TargetConfig
from arcbridge.tasks import cancel_and_wait
from arcbridge.wire.frames import ResetCode

PREFIX = "tcp:"
CONNECT_DEADLINE = 10.0
RECORDS = 20
"""Refusals of one user that leave a record each, and one a second behind them."""
USERS = 4096
"""Users whose refusals are counted apart."""
MAX_CONNECTING = 512
"""Dials under way at once, of all users together; more are refused."""
MAX_CONNECTING_OF_USER = 64
"""The same of one user, whose target may not answer: the others have room."""

_TOO_MANY = "too many connections are being made"
_log = structlog.get_logger("arcbridge.agent")


@dataclass(frozen=True, slots=True)
class Target:
    """One allowed target."""

    name: str
    address: Address
    users: frozenset[str]
    groups: frozenset[str]

    def allows(self, identity: Identity) -> bool:
        """Tell whether this caller may connect; names are compared exactly, after claim mapping."""
        return identity.username in self.users or not self.groups.isdisjoint(identity.groups)


def read_targets(configs: Mapping[str, TargetConfig]) -> dict[str, Target]:
    """Check the settings. Raises ConfigError that names the key."""
    targets = {}
    for name, config in configs.items():
        if not name or len(name) > 63 or not name.isascii() or not name.replace("-", "").replace(".", "").isalnum():
            raise ConfigError(f"targets.{name}: a name has letters, digits, '-' and '.' only")
        if not config.users and not config.groups:
            raise ConfigError(f"targets.{name}: needs users or groups; without them no caller may connect")
        try:
            address = parse_address(config.address, default_port=0)
        except ConfigError as error:
            raise ConfigError(f"targets.{name}.address: {error.message}") from error
        targets[name] = Target(name, address, frozenset(config.users), frozenset(config.groups))
    return targets


@dataclass(frozen=True, slots=True)
class _Connection:
    """A stream that was allowed, from its dial to its end."""

    target: Target
    caller: Caller
    record: AuditRecord


class TcpTargets:
    """Connects streams to targets. `close()` must be awaited."""

    def __init__(self, targets: Mapping[str, Target], audit: AuditLog) -> None:
        self._targets = dict(targets)
        self._audit = audit
        self._records: KeyedTokenBucket[str] = KeyedTokenBucket(RECORDS, 1.0, size=USERS, shares=True)
        """Refusals that leave a record each, by subject."""
        self._connecting: dict[asyncio.Task[None], Account] = {}
        """Dials under way, and whose they are."""
        self._connections: dict[StreamTransport, _Connection] = {}
        self.opened = 0
        self.open = 0
        self.refused = 0
        self.failed = 0
        self.ended = 0
        """Connections that were reset because their user may not connect to that address any more."""

    def replace(self, targets: Mapping[str, Target]) -> None:
        """Connect to these targets from now on; `end_disallowed` ends those connections that they do not allow."""
        self._targets = dict(targets)

    def end_disallowed(self, caller: Caller | None = None) -> None:
        """Reset the connections, of this caller or of all, that would not be allowed now: the target is gone, has
        another address, or is not for the caller's present name and groups."""
        for stream, found in list(self._connections.items()):
            if caller is not None and found.caller is not caller:
                continue
            target, record = self._targets.get(found.target.name), found.record
            if target is None or target.address != found.target.address:
                record.revoke("the target was taken out of the settings")
            elif not target.allows(found.caller.identity):
                record.revoke("the user may connect to the target no longer")
            else:
                continue
            self.ended += 1
            _log.info(
                "target cut off",
                session=record.subject.session,
                stream=stream.id,
                user=record.subject.user,
                reason=record.reason,
            )
            stream.abort(ResetCode.FORBIDDEN)

    def open_to(self, identity: Identity) -> list[str]:
        """Return the targets (`tcp:NAME`) to which this caller may connect, in order."""
        return sorted(f"{PREFIX}{name}" for name, target in self._targets.items() if target.allows(identity))

    def serve(self, stream: StreamTransport, target: str, caller: Caller) -> None:
        """Connect `stream` to the address that `target` (`tcp:NAME`) names, or reset it with the reason's code."""
        identity = caller.identity
        record = AuditRecord(
            request=f"{caller.request_prefix}-{stream.id}-1",
            subject=caller.subject,
            verb="connect",
            target=target,
        )
        found = self._targets.get(target.removeprefix(PREFIX)) if target.startswith(PREFIX) else None
        if found is None:
            self._refuse(stream, caller, record, ResetCode.UNKNOWN_TARGET, "no such target")
        elif not found.allows(identity):
            self._refuse(stream, caller, record, ResetCode.FORBIDDEN, "not allowed")
        elif self._dials_too_much(caller):
            self._refuse(stream, caller, record, ResetCode.LIMIT, _TOO_MANY)
        elif refusal := self._audit.refusal():
            self._refuse(stream, caller, record, ResetCode.INTERNAL, refusal)
        elif caller.account.audit.is_spent(record.started):
            caller.account.refuse(Limit.AUDIT_BYTES, record.started)
            reason = caller.account.explain(Limit.AUDIT_BYTES).message
            self._refuse(stream, caller, record, ResetCode.LIMIT, reason)
        else:
            connecting = _Connecting()
            self._connections[stream] = _Connection(found, caller, record)
            stream.attach(connecting)
            # The record stands before the target hears of the connection.
            self._audit.begin(
                record,
                lambda refusal: caller.account.loop_time.run(
                    lambda: self._recorded(stream, found, caller, connecting, record, refusal)
                ),
            )

    async def close(self) -> None:
        """End dials under way; connected streams end with their sessions."""
        await cancel_and_wait(*self._connecting)

    def _recorded(
        self,
        stream: StreamTransport,
        target: Target,
        caller: Caller,
        connecting: _Connecting,
        record: AuditRecord,
        refusal: str,
    ) -> None:
        """The record of a connection was written (perhaps within the call that asked for it), or could not be."""
        if connecting.lost:
            record.cut()
            self._finish(stream, record)
        elif refusal:
            self._refuse(stream, caller, record, ResetCode.INTERNAL, refusal)
        elif self._dials_too_much(caller):  # many may have waited for their records
            self._refuse(stream, caller, record, ResetCode.LIMIT, _TOO_MANY)
        else:
            try:
                self._begin(stream, target, caller, connecting, record)
            except ArcbridgeError as error:
                self._unreachable(stream, record, error)
            except Exception as error:
                self._defect(stream, record, error)

    def _dials_too_much(self, caller: Caller) -> bool:
        own = sum(account is caller.account for account in self._connecting.values())
        return own >= MAX_CONNECTING_OF_USER or len(self._connecting) >= MAX_CONNECTING

    def _begin(
        self, stream: StreamTransport, target: Target, caller: Caller, connecting: _Connecting, record: AuditRecord
    ) -> None:
        begun = begin(target.address)
        if begun is not None and begun[1]:
            self._join(stream, begun[0], record)  # the target answered within the call
            return
        sock = None if begun is None else begun[0]
        task = asyncio.get_running_loop().create_task(self._connect(stream, target, sock, connecting, record))
        connecting.task = task
        self._connecting[task] = caller.account
        task.add_done_callback(self._connecting.pop)
        if sock is not None:
            # Cancelled before its first step, the task never held it.
            task.add_done_callback(lambda task: sock.close() if task.cancelled() else None)

    async def _connect(
        self,
        stream: StreamTransport,
        target: Target,
        begun: socket.socket | None,
        connecting: _Connecting,
        record: AuditRecord,
    ) -> None:
        try:
            if begun is None:
                sock = await connect(target.address, deadline=CONNECT_DEADLINE, proxy=DIRECT)
                disable_user_timeout(sock)
            else:
                sock = begun
                await finish(sock, target.address, deadline=CONNECT_DEADLINE)
            self._join(stream, sock, record)
        except ArcbridgeError as error:
            self._unreachable(stream, record, error)
        except asyncio.CancelledError:
            record.cut()
            self._finish(stream, record)
            stream.abort(ResetCode.CANCELLED)
            if connecting.lost:
                return  # the stream ended first, which cancelled this task
            raise
        except Exception as error:
            self._defect(stream, record, error)

    def _join(self, stream: StreamTransport, sock: socket.socket, record: AuditRecord) -> None:
        try:
            splice = self._splice(stream, sock, record)
        except BaseException:
            sock.close()
            raise
        stream.set_protocol(splice)
        splice.connection_made(stream)
        stream.resume_reading()

    def _defect(self, stream: StreamTransport, record: AuditRecord, error: Exception) -> None:
        """A connection failed for no fault of the target: it leaves its record all the same."""
        self.failed += 1
        record.fail(error)
        self._finish(stream, record)
        stream.abort(ResetCode.INTERNAL)
        text = "a TCP target could not be served"
        asyncio.get_running_loop().call_exception_handler({"message": text, "exception": error})

    def _unreachable(self, stream: StreamTransport, record: AuditRecord, error: ArcbridgeError) -> None:
        self.failed += 1
        record.refuse(error.message)
        _log.warning("target unreachable", session=record.subject.session, stream=stream.id, reason=error.message)
        self._finish(stream, record)
        stream.abort(ResetCode.CONNECT_FAILED)

    def _splice(self, stream: StreamTransport, sock: socket.socket, record: AuditRecord) -> SocketSplice:
        self.opened += 1
        self.open += 1

        def done(result: SpliceResult) -> None:
            self.open -= 1
            record.move(result.from_stream, result.to_stream)
            if result.error is not None:
                record.break_off(result.error)
            self._finish(stream, record)
            if not (result.from_stream or result.to_stream):
                stream.count_as_churn()  # a connection was made for nothing

        record.connect()
        stream.owed = False
        return SocketSplice(sock, done)

    def _finish(self, stream: StreamTransport, record: AuditRecord) -> None:
        """A connection is over, or never was: write its record."""
        self._connections.pop(stream, None)
        self._audit.write(record)

    def _refuse(
        self, stream: StreamTransport, caller: Caller, record: AuditRecord, code: ResetCode, reason: str
    ) -> None:
        """Reset the stream. Of many refusals the first leave a record each, the others one that counts them."""
        self.refused += 1
        self._connections.pop(stream, None)
        record.refuse(reason)
        now = time.monotonic()
        recorded = record.begun or self._records.reserve(caller.identity.subject, now) is not None
        if not recorded:
            omitted = caller.account.refuse(Limit.TARGETS, now)
            if omitted is not None:
                record.is_over(Limit.TARGETS, omitted)
                recorded = True
        if recorded:
            self._audit.write(record)
        stream.abort(code)


class _Connecting(asyncio.Protocol):
    """The stream's protocol while the target is dialled: it reads nothing, so that no credit is granted."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, StreamTransport)
        transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self.task is not None:
            self.task.cancel()
