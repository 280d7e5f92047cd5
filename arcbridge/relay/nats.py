"""A relay's one connection to NATS: kept up by one task, and honest about being down.

Rules:

1. Nothing is kept for later. While there is no connection every call fails at once, and a new connection begins with
   nothing but the subscriptions that are wanted now: a dial request of a minute ago must not leave after all.
2. The library's own reconnecting is off (it gives up, it buffers, and all relays of a fleet come back in step): here
   each attempt follows the last after a random time, for ever.
3. A server that says nothing is as good as down. After a request without an answer the server itself is asked; when it
   is silent too, calls fail at once until it speaks again or another connection stands.
4. A subscription that could not keep up has lost messages, and it is unknown which: it is counted and made anew.
5. A reply is sent with this relay's own permissions, so only to an inbox of the fleet. A message that names any other
   reply subject (JetStream's API, a key of the registry) reaches no handler (docs/threats.md#F20).
"""

from __future__ import annotations

import asyncio
import random
import re
import secrets
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import structlog

from arcbridge.errors import ArcbridgeError, ConfigError
from arcbridge.pki.chain import load_chain
from arcbridge.relay.certificate import read_text
from arcbridge.settings.config import RelayFleetConfig
from arcbridge.tasks import TaskSet, in_time

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

PAUSES: Final = (0.1, 3.0)
"""Seconds between two attempts to connect, at random: all relays are back within 5 s, and not in the same instant."""
CONNECT_DEADLINE: Final = 10.0
_CONNECT_ONE: Final = 2
PING: Final = 5
"""Seconds; with two unanswered pings a dead server is noticed within 15 s even while nothing is asked."""
_DOUBT: Final = 0.5
"""A healthy server answers a ping in a fraction of this."""
_PENDING: Final = 8192
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_SUBJECT: Final = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", re.ASCII)

log = structlog.get_logger("arcbridge.relay")


class NatsUnavailable(ArcbridgeError):
    """There is no connection to NATS, or its server says nothing."""

    status_code = 503
    reason = "ServiceUnavailable"


class NoResponder(ArcbridgeError):
    """No client subscribes to this subject; the server says so at once."""


class NoReply(ArcbridgeError):
    """A subscriber did not answer in time."""


@dataclass(slots=True, eq=False)
class Subscription:
    """A subject that is listened to through every connection; made by `NatsConnection.subscribe`."""

    subject: str
    queue: str
    handler: Callable[[Msg], None]
    client: Client | None = None
    """The connection that `live` belongs to."""
    live: Any = None


class NatsConnection:
    """`start` before anything else, `close` at the end. `handler`s are plain functions and must not raise."""

    def __init__(self, config: RelayFleetConfig) -> None:
        """Raises `ConfigError` for settings that cannot work."""
        check(config)
        self._config = config
        self.prefix = config.prefix
        self.name = config.name or secrets.token_hex(8)
        """What this relay's own subjects are under; letters, digits, `-` and `_`."""
        self._client: Client | None = None
        self._up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._wanted: dict[int, Subscription] = {}
        self._extra = TaskSet()
        self._silent = False
        self._asking = False
        self._told = ""
        self.on_change: Callable[[], None] = lambda: None
        """Called when NATS answers again, and when it does no more."""
        self._tried = asyncio.Event()
        """Set once a connection stands, or an attempt has failed."""
        self.connections = 0
        """How many connections were made."""
        self.slow_consumers = 0
        self.foreign_replies = 0
        """How many messages were dropped because their reply subject is no inbox of the fleet."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection and its server has not gone silent."""
        return self._up.is_set() and not self._silent

    @property
    def client(self) -> Client:
        """The library's client of the connection that stands. Raises `NatsUnavailable`."""
        client = self._client
        if client is None or not self.connected or not client.is_connected:
            raise NatsUnavailable("NATS does not answer", retry_after=5)
        return client

    @property
    def failure(self) -> str:
        """Why there is no connection, in the library's words; empty where there is one, or none was tried."""
        return self._told

    async def start(self, wait: float = 0.0, *, once: bool = False) -> bool:
        """Begin to connect; return whether a connection stood within `wait` seconds, or after the first attempt."""
        require_library()
        self._task = asyncio.get_running_loop().create_task(self._keep())
        return await self.wait(wait, once=once)

    async def wait(self, timeout: float, *, once: bool = False) -> bool:
        """Return whether a connection stands, at the latest in `timeout` seconds; `once`: after one attempt, too."""
        await in_time((self._tried if once else self._up).wait(), timeout)
        return self._up.is_set()

    async def close(self) -> None:
        await end(task for task in (self._task, *self._extra) if task is not None)
        self._task = None

    # -- messages --------------------------------------------------------------------------------------------------

    async def request(self, subject: str, payload: bytes, timeout: float) -> bytes:
        """Return the first answer. Raises `NoResponder`, `NoReply`, `NatsUnavailable`."""
        from nats import errors

        client = self.client
        try:
            answer = await client.request(subject, payload, timeout=timeout)
        except errors.NoRespondersError as error:
            raise NoResponder(f"no relay listens to {subject}") from error
        except (errors.TimeoutError, TimeoutError) as error:
            self.doubt()
            raise NoReply(f"no answer on {subject} within {timeout:g} s") from error
        except (errors.Error, OSError) as error:
            raise NatsUnavailable(f"NATS failed: {type(error).__name__}", retry_after=5) from error
        return bytes(answer.data)

    async def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        """Send without waiting for a reply. Raises `NatsUnavailable`."""
        from nats import errors

        try:
            await self.client.publish(subject, payload, reply=reply)
        except (errors.Error, OSError) as error:
            raise NatsUnavailable(f"NATS failed: {type(error).__name__}", retry_after=5) from error

    async def subscribe(self, subject: str, handler: Callable[[Msg], None], queue: str = "") -> Subscription:
        """Call `handler` for each message on `subject`, of which each group `queue` gets one; from now on, or from
        the next connection on."""
        subscription = Subscription(subject, queue, handler)
        self._wanted[id(subscription)] = subscription
        if self._client is not None:
            await self._subscribe(self._client, subscription)
        return subscription

    async def unsubscribe(self, subscription: Subscription) -> None:
        self._wanted.pop(id(subscription), None)
        live, subscription.live, subscription.client = subscription.live, None, None
        if live is not None:
            await _unsubscribe(live)

    def is_below(self, kind: str, subject: str) -> bool:
        """Return whether a subject that another program names is one of the fleet's own of this `kind`."""
        return subject.startswith(f"{self.prefix}.{kind}.") and _SUBJECT.fullmatch(subject) is not None

    async def flush(self, timeout: float) -> None:
        """Wait until the server has dealt with all that was sent. Raises `NatsUnavailable`."""
        from nats import errors

        try:
            await self._settle(self.client, timeout)
        except (errors.Error, OSError) as error:
            raise NatsUnavailable("NATS does not answer", retry_after=5) from error

    async def _settle(self, client: Client, timeout: float) -> None:
        """Ask the server alone, behind everything else that waits to be sent.

        The library's own `flush` is no such thing: its PING overtakes what is queued.
        """
        from nats import errors

        try:
            await client.request(f"{self.prefix}.inbox.{self.name}.none", b"", timeout=timeout)
        except errors.NoRespondersError:
            # As it should be.
            pass

    def doubt(self) -> None:
        """Find out whether the server is there at all, because an answer did not come."""
        client = self._client
        if client is not None and not self._asking:
            self._asking = True
            self._extra.start(self._probe(client))

    # -- inside ----------------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        while True:
            try:
                await self._once()
            except Exception as error:
                # The library raises its own, OSError, ssl's, and for odd files anything.
                self._tell(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
            await asyncio.sleep(random.uniform(*PAUSES))

    async def _once(self) -> None:
        """Run one connection from its beginning to its end."""
        from nats.aio.client import Client

        client = Client()
        lost = asyncio.Event()

        async def closed() -> None:
            lost.set()

        try:
            async with asyncio.timeout(CONNECT_DEADLINE):
                await client.connect(**self._options(), closed_cb=closed, error_cb=self._failed)
                self._client = client
                for subscription in list(self._wanted.values()):
                    await self._subscribe(client, subscription)
                await self._settle(client, _CONNECT_ONE)
            self._silent = False
            self._up.set()
            self._tried.set()
            self.connections += 1
            self._told = ""
            self.on_change()
            log.info("connected to NATS", server=_shown(client), name=self.name)
            while not lost.is_set() and not client.is_closed:
                # Also by the clock: the library closes a connection before it says so, and may hang in between.
                await in_time(lost.wait(), 1.0)
            self._tell("the connection was lost")
        finally:
            self._client = None
            self._up.clear()
            self._silent = False
            await _discard(client)

    def _options(self) -> dict[str, Any]:
        config = self._config
        options: dict[str, Any] = {
            "servers": list(config.servers),
            "name": f"arcbridge {self.name}",
            "allow_reconnect": False,
            # Each server once; more rounds are the loop's.
            "max_reconnect_attempts": 1,
            "reconnect_time_wait": 0,
            "connect_timeout": _CONNECT_ONE,
            "ping_interval": PING,
            "max_outstanding_pings": 2,
            "pending_size": 0,
            # A relay that asks is in the queue group itself, and knows without NATS what it holds.
            "no_echo": True,
            "inbox_prefix": f"{config.prefix}.inbox.{self.name}",
        }
        if config.credentials is not None:
            options["user_credentials"] = str(config.credentials)
        if config.user:
            options["user"] = config.user
            if config.password_file is not None:
                options["password"] = read_text("fleet.password_file", config.password_file, "text").strip()
        if config.ca_file is not None or config.certificate is not None or config.servers[0].startswith("tls:"):
            options["tls"] = _tls(config)
        return options

    async def _subscribe(self, client: Client, subscription: Subscription) -> None:
        if subscription.client is client:
            return
        subscription.client = client

        async def deliver(message: Msg) -> None:
            if message.reply and not self.is_below("inbox", message.reply):
                if not self.foreign_replies:
                    log.warning(
                        "NATS message with a foreign reply subject dropped: only relays should publish here",
                        subject=message.subject,
                    )
                self.foreign_replies += 1
                return
            subscription.handler(message)

        from nats import errors

        try:
            live = await client.subscribe(
                subscription.subject, queue=subscription.queue, cb=deliver, pending_msgs_limit=_PENDING
            )
        except (errors.Error, OSError):
            # This connection is over; the next one begins with all of them.
            return
        if id(subscription) in self._wanted and subscription.client is client:
            subscription.live = live
        else:
            await _unsubscribe(live)

    async def _failed(self, error: Exception) -> None:
        from nats import errors

        if isinstance(error, errors.SlowConsumerError):
            self.slow_consumers += 1
            for subscription in self._wanted.values():
                if subscription.live is error.sub:
                    self._extra.start(self._renew(subscription))
            return
        if not isinstance(error, OSError):
            # Permissions, mostly: the operator has to know which subject.
            log.warning("NATS complains", reason=str(error) or type(error).__name__)

    async def _renew(self, subscription: Subscription) -> None:
        live, client = subscription.live, subscription.client
        if live is None or client is None or client is not self._client:
            return
        log.warning("NATS subscription made anew", subject=subscription.subject, reason="it could not keep up")
        subscription.live = subscription.client = None
        await _unsubscribe(live)
        await self._subscribe(client, subscription)

    async def _probe(self, client: Client) -> None:
        try:
            answer = asyncio.get_running_loop().create_task(_ping(client))
            done, _ = await asyncio.wait({answer}, timeout=_DOUBT)
            if not done:
                self._silent = client is self._client
                self.on_change()
                self._tell("it does not answer")
            if await answer and client is self._client:
                if self._silent:
                    log.info("NATS answers again")
                self._silent = False
                self._told = ""
                self.on_change()
            elif client is self._client:
                _abort(client)
        finally:
            self._asking = False

    def _tell(self, reason: str) -> None:
        self._tried.set()
        if reason != self._told:
            self._told = reason
            log.warning("NATS unavailable", reason=reason)
            self.on_change()


def check(config: RelayFleetConfig) -> None:
    """Raise `ConfigError` for settings that contradict each other or that NATS would not take."""
    for server in config.servers:
        scheme, _, rest = server.partition("://")
        if scheme not in ("nats", "tls") or not rest:
            raise ConfigError(f"fleet.servers: {_safe(server)} is not of the form nats://host:port or tls://host:port")
        if "@" in rest:
            raise ConfigError("fleet.servers: no passwords in addresses; use fleet.credentials or fleet.password_file")
    if config.name and _NAME.fullmatch(config.name) is None:
        raise ConfigError("fleet.name: at most 64 letters, digits, '-' and '_'")
    if _SUBJECT.fullmatch(config.prefix) is None:
        raise ConfigError("fleet.prefix: letters, digits, '-' and '_', in parts joined by '.'")
    if _NAME.fullmatch(config.bucket) is None:
        raise ConfigError("fleet.bucket: at most 64 letters, digits, '-' and '_'")
    if not 1 <= config.replicas <= 5:
        raise ConfigError("fleet.replicas: 1 to 5; JetStream keeps no more copies")
    if config.credentials is not None and config.user:
        raise ConfigError("fleet: credentials and user are two ways to log in; give one of them")
    if bool(config.user) != (config.password_file is not None):
        raise ConfigError("fleet: user and password_file go together; set both or neither")
    if (config.certificate is None) != (config.key is None):
        raise ConfigError("fleet: certificate and key go together; set both or neither")


async def end(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks that call the library, until they are over.

    More than once: `asyncio.wait_for`, which the library uses, swallows a cancellation that comes in the same instant
    as the answer (before Python 3.12).
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.1)


def subject_token(name: str) -> str:
    """Return a canonical cluster name as one token of a subject or of a key: dots would make it several, `_` is in no
    name.

    Raises `ConfigError` for any other name, so `*`, `>` and blanks never get into a subject.
    """
    from arcbridge.pki.names import check_cluster_name

    return check_cluster_name(name).replace(".", "_")


def require_library() -> None:
    """Raise `ConfigError` where the package for NATS is not installed."""
    try:
        import nats  # noqa: F401
    except ImportError as error:
        raise ConfigError("fleet.servers: a fleet needs the package nats-py: pip install 'arcbridge[fleet]'") from error


def _tls(config: RelayFleetConfig) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
    if config.ca_file is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            text = read_text("fleet.ca_file", config.ca_file)
            context.load_verify_locations(cadata=text.encode("ascii", "ignore").decode())  # comments may be in UTF-8
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(f"fleet.ca_file: {config.ca_file} holds no PEM certificate") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if config.certificate is not None and config.key is not None:
        chain, key = read_text("fleet.certificate", config.certificate), read_text("fleet.key", config.key)
        load_chain(context, chain, key)
    return context


def _safe(server: str) -> str:
    """Return an address as it may be shown: what stands before an `@` may be a password."""
    return repr(server.rpartition("@")[2][:80])


def _shown(client: Client) -> str:
    url = client.connected_url
    return "" if url is None else f"{url.hostname}:{url.port}"


async def _ping(client: Client) -> bool:
    try:
        await client.flush(timeout=2 * PING)
    except Exception:
        return False
    return True


async def _unsubscribe(live: Any) -> None:
    from nats import errors

    try:
        await live.unsubscribe()
    except (errors.Error, OSError):
        # The connection is over, and the subscription with it.
        pass


def _abort(client: Client) -> None:
    """Cut the connection under the library, which then notices that it is over."""
    writer = getattr(client._transport, "_io_writer", None)
    if writer is not None:
        writer.transport.abort()


async def _discard(client: Client) -> None:
    """End a client whatever state it is in, without sending what it still holds (rule 1).

    Its own `close` waits until the server has taken everything, which a frozen one never does, and a connection that
    broke while there was something to send leaves tasks behind: hence the parts by name. tests/relay/test_nats.py
    holds that nothing is left.
    """
    client._pending.clear()
    client._pending_data_size = 0
    _abort(client)
    for live in list(client._subs.values()):
        live._stop_processing()
    try:
        async with asyncio.timeout(1.0):
            await client.close()
    except Exception:
        # It is being thrown away because it does not work.
        pass
    for task in (client._reading_task, client._ping_interval_task, client._flusher_task):
        if task is not None and not task.done() and task is not asyncio.current_task():
            task.cancel()
