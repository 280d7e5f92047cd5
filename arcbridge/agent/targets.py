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
from arcbridge.agent.audit.record import path_fields
from arcbridge.agent.kube.caller import Caller
from arcbridge.errors import ArcbridgeError, ConfigError
from arcbridge.identity.actor import admits
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

_CONNECT = path_fields("", "connect", "", "", "", "", "", "")
_TOO_MANY = "too many connections are being made"
_log = structlog.get_logger("arcbridge.agent")


@dataclass(frozen=True, slots=True)
class Target:
    """One allowed target."""

    name: str
    address: Address
    users: frozenset[str]
    groups: frozenset[str]
    actors: frozenset[str] = frozenset()
    """Actors through which these users may connect; none: the users alone."""

    def allows(self, identity: Identity) -> bool:
        """Return whether this caller may connect; names are compared exactly, after claim mapping."""
        called = identity.username in self.users or not self.groups.isdisjoint(identity.groups)
        return called and admits(self.actors, identity.actor)


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
        users, groups, actors = (frozenset(names) for names in (config.users, config.groups, config.actors))
        targets[name] = Target(name, address, users, groups, actors)
    return targets


class TcpTargets:
    """Connects streams to targets. `close()` must be awaited."""

    def __init__(self, targets: Mapping[str, Target], audit: AuditLog) -> None:
        self.replace(targets)
        self.audit = audit
        self._records: KeyedTokenBucket[str] = KeyedTokenBucket(RECORDS, 1.0, size=USERS, shares=True)
        """Refusals that leave a record each, by subject."""
        self.connecting: dict[asyncio.Task[None], Account] = {}
        """Dials under way, and whose they are."""
        self._connections: dict[StreamTransport, _Connection] = {}
        """Those that were allowed, from their dials to their ends."""
        self.opened = 0
        self.open = 0
        self.refused = 0
        self.failed = 0
        self.ended = 0
        """Connections that were reset because their user may not connect to that address any more."""

    def replace(self, targets: Mapping[str, Target]) -> None:
        """Connect to these targets from now on; `end_disallowed` ends those connections that they do not allow."""
        self._targets = {PREFIX + name: target for name, target in targets.items()}

    def end_disallowed(self, caller: Caller | None = None) -> None:
        """Reset the connections, of this caller or of all, that would not be allowed now: the target is gone, has
        another address, or is not for the caller's present name and groups."""
        for stream, found in list(self._connections.items()):
            if caller is not None and found.caller is not caller:
                continue
            target, record = self._targets.get(PREFIX + found.target.name), found.record
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
        return sorted(name for name, target in self._targets.items() if target.allows(identity))

    def serve(self, stream: StreamTransport, target: str, caller: Caller, now: float) -> None:
        """Connect `stream`, which was opened `now` (monotonic seconds), to the address that `target` (`tcp:NAME`)
        names, or reset it with the reason's code."""
        request = f"{caller.request_prefix}-{stream.id}-1"
        record = AuditRecord(request, caller.subject, path_fields=_CONNECT, target=target, started=now, verb="connect")
        found = self._targets.get(target)
        if found is None:
            self.refuse(stream, caller, record, ResetCode.UNKNOWN_TARGET, "no such target")
        elif caller.restrictions is not None and caller.restrictions.judges:
            self.refuse(stream, caller, record, ResetCode.FORBIDDEN, "the session is restricted to requests")
        elif not found.allows(caller.identity):
            self.refuse(stream, caller, record, ResetCode.FORBIDDEN, "not allowed")
        elif self.connecting and self.dials_too_much(caller):
            self.refuse(stream, caller, record, ResetCode.LIMIT, _TOO_MANY)
        elif self.audit.refuses and (refusal := self.audit.refusal()):
            self.refuse(stream, caller, record, ResetCode.INTERNAL, refusal)
        elif caller.account.audit.is_spent(record.started):
            caller.account.refuse(Limit.AUDIT_BYTES, record.started)
            self.refuse(stream, caller, record, ResetCode.LIMIT, caller.account.explain(Limit.AUDIT_BYTES).message)
        else:
            connection = self._connections[stream] = _Connection(self, stream, found, caller, record)
            stream.attach(connection)
            connection.begin()

    async def close(self) -> None:
        """End dials under way; connected streams end with their sessions."""
        await cancel_and_wait(*self.connecting)

    def dials_too_much(self, caller: Caller) -> bool:
        """Return whether as many dials are under way as may be, of the caller's user or of all users."""
        own = sum(account is caller.account for account in self.connecting.values())
        return own >= MAX_CONNECTING_OF_USER or len(self.connecting) >= MAX_CONNECTING

    def finish(self, stream: StreamTransport, record: AuditRecord) -> None:
        """Write the record of a connection that is over, or never was."""
        self._connections.pop(stream, None)
        self.audit.write(record)

    def refuse(
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
            self.audit.write(record)
        stream.abort(code)


class _Connection(asyncio.Protocol):
    """A stream that was allowed. It is the stream's protocol until the target is connected and the record that the
    connection begins stands, and reads nothing, so that no credit is granted."""

    def __init__(
        self, targets: TcpTargets, stream: StreamTransport, target: Target, caller: Caller, record: AuditRecord
    ) -> None:
        self._targets = targets
        self._stream = stream
        self.target = target
        self.caller = caller
        self.record = record
        self._task: asyncio.Task[None] | None = None
        self._dialled: socket.socket | Exception | None = None
        """What the dial has come to; None: it is under way."""
        self._recorded = False
        """Whether the record stands."""
        self._over = False
        """Whether the splice has the stream, or it has ended before."""

    def begin(self) -> None:
        """Dial while the record is written: the first byte, either way, waits for both."""
        try:
            self._dial()
        except Exception as error:
            self._dialled = error
        # Behind the dial, whose system calls would let the writer's thread in between.
        self._targets.audit.begin(self.record, self._written)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._stream.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._over:
            self._give_up()
            self.record.cut()
            self._targets.finish(self._stream, self.record)

    def _written(self, refusal: str) -> None:
        """The record was written (perhaps within the call that asked for it), or could not be."""
        if not self._over:
            self.caller.account.loop_time.run(self._go_on if not refusal else lambda: self._refuse(refusal))

    def _refuse(self, refusal: str) -> None:
        self._give_up()
        self._targets.refuse(self._stream, self.caller, self.record, ResetCode.INTERNAL, refusal)

    def _give_up(self) -> None:
        self._over = True
        if self._task is not None:
            self._task.cancel()
        elif isinstance(self._dialled, socket.socket):
            self._dialled.close()

    def _dial(self) -> None:
        begun = begin(self.target.address)
        if begun is not None and begun[1]:
            self._dialled = begun[0]  # the target answered within the call
            return
        sock = None if begun is None else begun[0]
        self._task = task = asyncio.get_running_loop().create_task(self._connect(sock))
        self._targets.connecting[task] = self.caller.account
        task.add_done_callback(self._targets.connecting.pop)
        if sock is not None:
            # Cancelled before its first step, the task never held it.
            task.add_done_callback(lambda task: sock.close() if task.cancelled() else None)

    async def _connect(self, begun: socket.socket | None) -> None:
        try:
            if begun is None:
                sock = await connect(self.target.address, deadline=CONNECT_DEADLINE, proxy=DIRECT)
                disable_user_timeout(sock)
            else:
                sock = begun
                await finish(sock, self.target.address, deadline=CONNECT_DEADLINE)
        except asyncio.CancelledError:
            if self._over:
                return  # the stream ended first, or the record was refused, which cancelled this task
            self._over = True
            self.record.cut()
            self._targets.finish(self._stream, self.record)
            self._stream.abort(ResetCode.CANCELLED)
            raise
        except Exception as error:
            self._dialled = error
        else:
            self._dialled = sock
        self._task = None
        if self._recorded:
            self._go_on()

    def _go_on(self) -> None:
        """The record stands: join the target, or say why it is not there, once that is known."""
        self._recorded = True
        dialled = self._dialled
        if dialled is None:
            return
        self._over = True
        self._dialled = None  # an error holds the frames that hold this: a cycle for each connection that fails
        if isinstance(dialled, Exception):
            self._failed(dialled)
            return
        try:
            self._join(dialled)
        except Exception as error:
            self._failed(error)

    def _join(self, sock: socket.socket) -> None:
        try:
            splice = SocketSplice(sock, self._done)
        except BaseException:
            sock.close()
            raise
        self._targets.opened += 1
        self._targets.open += 1
        self.record.connect()
        self._stream.owed = False
        self._stream.set_protocol(splice)
        splice.connection_made(self._stream)
        self._stream.read_on()

    def _failed(self, error: Exception) -> None:
        """The target could not be reached; or the connection failed by a defect, and leaves its record all the same."""
        self._targets.failed += 1
        code = ResetCode.CONNECT_FAILED
        if isinstance(error, ArcbridgeError):
            error.__traceback__ = None
            self.record.refuse(error.message)
            session, stream = self.record.subject.session, self._stream.id
            _log.warning("target unreachable", session=session, stream=stream, reason=error.message)
        else:
            code = ResetCode.INTERNAL
            self.record.fail(error)
            text = "a TCP target could not be served"
            asyncio.get_running_loop().call_exception_handler({"message": text, "exception": error})
        self._targets.finish(self._stream, self.record)
        self._stream.abort(code)

    def _done(self, result: SpliceResult) -> None:
        self._targets.open -= 1
        self.record.move(result.from_stream, result.to_stream)
        if result.error is not None:
            self.record.break_off(result.error)
        self._targets.finish(self._stream, self.record)
        if not (result.from_stream or result.to_stream):
            self._stream.count_as_churn()  # a connection was made for nothing
