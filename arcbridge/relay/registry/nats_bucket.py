"""The JetStream key-value bucket in which a fleet's registry is kept: one key at a time, read with its revision,
written only at the revision that was read, and watched.

What a key holds is checked before a relay believes it (`is_entry`, docs/threats.md#F22); what follows from it is the
business of `relay.registry.nats`. Invariant: what NATS does not answer in time, or refuses, is `RegistryUnavailable`;
an answer that means something (no such key, another revision) never is.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import structlog

from arcbridge.pki.names import is_cluster_name
from arcbridge.relay.nats import NatsConnection, NatsUnavailable
from arcbridge.relay.registry.base import RegistryUnavailable
from arcbridge.untrusted_json import read_json

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.js.kv import KeyValue

T = TypeVar("T")

CALL: Final = 2.0
"""Seconds for one request to JetStream. A leader that is being elected takes longer; then the caller tries again."""
CHANGE: Final = 15.0
"""Seconds for a change with all its repeats, when many relays want the same key."""
UNREAD: Final = 10.0
"""Seconds after which the server drops a watch that no connection reads. By nats-py's five minutes, each reconnect of a
relay would leave a consumer for as long; one that is dropped too early is made anew, for its heartbeats are missed."""

log = structlog.get_logger("arcbridge.relay")


class Value(NamedTuple):
    """What a key holds, and at which revision. `data` None: nothing (any more); revision 0: never anything."""

    data: dict[str, Any] | None
    revision: int


class Malformed(RegistryUnavailable):
    """A key holds something that no relay writes there."""


class Faster(Exception):
    """Another relay has written the key since it was read."""


NOTHING: Final = Value(None, 0)


class Bucket:
    """The bucket over whatever connection stands; made where there is none. The caller starts and closes the
    connection."""

    def __init__(self, connection: NatsConnection, *, name: str, replicas: int, monotonic: Callable[[], float]) -> None:
        self.connection = connection
        self._name = name
        self._replicas = replicas
        self._monotonic = monotonic
        self.closed = False
        """Whether the registry was closed; every call is refused then."""
        self.contact: float | None = None
        """Monotonic seconds at which JetStream last answered; None: never."""
        self._store: tuple[Client, KeyValue] | None = None
        self._opening = asyncio.Lock()

    async def opened(self) -> tuple[Client, KeyValue]:
        """Return the bucket over the connection that stands, made if there is none."""
        if self.closed:
            raise RegistryUnavailable("the registry is closed: the relay is stopping")
        try:
            client = self.connection.client
        except NatsUnavailable as error:
            raise RegistryUnavailable("the fleet's registry does not answer: is NATS up?") from error
        if self._store is not None and self._store[0] is client:
            return self._store
        async with self._opening:
            if self._store is not None and self._store[0] is client:
                return self._store
            from nats.js import api, errors

            jetstream = client.jetstream(timeout=CALL)
            try:
                store = await self._asked(jetstream.key_value(self._name), CALL, errors.NotFoundError)
            except errors.NotFoundError:
                # Another relay may make it at the same time: the same settings, so both succeed.
                config = api.KeyValueConfig(
                    bucket=self._name,
                    description="arcbridge relays: clusters, join tokens, revocations",
                    history=1,
                    replicas=self._replicas,
                    # Reads go to the leader, which has every write: an old replica would bring revoked clusters back.
                    direct=False,
                )
                try:
                    store = await self.answered(jetstream.create_key_value(config), 2 * CALL)
                except errors.APIError as error:
                    log.error("registry bucket not made", bucket=self._name, reason=error.description)
                    raise RegistryUnavailable(
                        f"the registry's bucket {self._name} is not there and cannot be made: {error.description}"
                    ) from error
                log.info("registry bucket made", bucket=self._name, replicas=self._replicas)
            self._store = (client, store)
            return self._store

    async def answered(self, call: Awaitable[T], timeout: float) -> T:
        """Return the result of a call to JetStream; answers that mean something pass as they are.

        Raises `RegistryUnavailable`.
        """
        from nats import errors
        from nats.js import errors as answers

        try:
            async with asyncio.timeout(timeout):
                return await call
        except (answers.NotFoundError, answers.KeyDeletedError, answers.KeyWrongLastSequenceError):
            self.contact = self._monotonic()
            raise
        except (answers.ServiceUnavailableError, answers.NoStreamResponseError, errors.NoRespondersError) as error:
            raise RegistryUnavailable("JetStream is not available: is it enabled, and has it a leader?") from error
        except (errors.TimeoutError, TimeoutError) as error:
            self.connection.doubt()
            raise RegistryUnavailable("the fleet's registry does not answer: is NATS up?") from error
        except answers.APIError:
            raise
        except (errors.Error, OSError) as error:
            raise RegistryUnavailable("the fleet's registry does not answer: is NATS up?") from error

    async def _asked(self, call: Awaitable[T], timeout: float = CALL, *meant: type[Exception]) -> T:
        """Return the result of a call about keys, as `answered` does; what JetStream refuses is `RegistryUnavailable`,
        but the answers that are `meant`."""
        from nats.js import errors

        try:
            found = await self.answered(call, timeout)
        except meant:
            raise
        except errors.APIError as error:
            words = getattr(error, "description", "") or type(error).__name__
            raise RegistryUnavailable(f"JetStream refused: {words}") from error
        self.contact = self._monotonic()
        return found

    async def read(self, key: str, timeout: float = CALL) -> Value:
        """Return what the key holds. Raises `RegistryUnavailable`, of which `Malformed` is one."""
        from nats.js import errors

        _, store = await self.opened()
        try:
            entry = await self._asked(store._get(key), timeout, errors.NotFoundError)
        except errors.KeyDeletedError as error:
            return Value(None, (error.entry.revision if error.entry is not None else None) or 0)
        except errors.NotFoundError:
            return NOTHING
        return Value(self._decoded(key, entry.value), entry.revision or 0)

    async def write(self, key: str, data: Mapping[str, Any], revision: int) -> int:
        """Write only if the key is still at `revision`; raises `Faster` otherwise."""
        from nats.js import errors

        _, store = await self.opened()
        encoded = json.dumps(data, separators=(",", ":"), sort_keys=True).encode()
        try:
            return await self._asked(store.update(key, encoded, last=revision), CALL, errors.KeyWrongLastSequenceError)
        except errors.KeyWrongLastSequenceError as error:
            raise Faster from error

    async def remove(self, key: str) -> None:
        _, store = await self.opened()
        await self._asked(store.delete(key))

    async def read_all(self, keys: str, timeout: float = CHANGE) -> dict[str, Value]:
        """Return every key that matches, deleted ones too, as they are now; those that are malformed are left out."""
        _, store = await self.opened()
        found: dict[str, Value] = {}

        async def collect() -> None:
            watch = await self.watch(store, keys)
            try:
                while (entry := await watch.next(timeout)) is not None:
                    found[entry[0]] = entry[1]
            finally:
                await watch.stop()

        await self._asked(collect(), timeout)
        return found

    async def watch(self, store: KeyValue, keys: str) -> Watch:
        """Return the entries of these keys and what becomes of them; raises as nats-py does."""
        return Watch(await store.watch(keys, inactive_threshold=UNREAD), self._decoded)

    def _decoded(self, key: str, value: bytes | None) -> dict[str, Any]:
        try:
            data = read_json(value or b"")
        except ValueError:
            data = None
        if not isinstance(data, dict) or not is_entry(key, data):
            raise Malformed(
                f"the registry's key {key} holds something that no relay wrote: see who may write to the bucket "
                f"{self._name}, and remove the key"
            )
        return data


class Watch:
    """The entries of a bucket, and each change behind them.

    nats-py marks the end of what was there when it has handed over no entry yet, also where some have arrived and wait
    for their turn of the loop. Here the mark comes behind all that the server had sent by then. Malformed entries are
    left out, and logged: one of them must not keep the others from being read.
    """

    def __init__(self, watcher: KeyValue.KeyWatcher, decoded: Callable[[str, bytes | None], dict[str, Any]]) -> None:
        self._watcher = watcher
        self._decoded = decoded
        self._seen = 0
        """Entries so far."""
        self._marked = -1
        """Entries behind which the end is to be marked, because nats-py did so too early; -1: it did not."""

    async def next(self, timeout: float) -> tuple[str, Value] | None:
        """Return a key and its value; None once, when all that was there at the beginning has been told.

        Raises TimeoutError after `timeout` seconds without either.
        """
        while (entry := await self._entry(timeout)) is not None:
            try:
                data = self._decoded(entry.key, entry.value) if entry.operation is None else None
            except Malformed as error:
                log.warning("registry entry left out", key=entry.key, reason=error.message)
                continue
            return entry.key, Value(data, entry.revision or 0)
        return None

    async def _entry(self, timeout: float) -> Any:
        if self._seen == self._marked:
            self._marked = -1
            return None
        async with asyncio.timeout(timeout):
            entry: Any = await self._watcher._updates.get()
            if entry is None and not self._seen:
                subscription: Any = self._watcher._sub
                sent = (await subscription.consumer_info()).delivered.consumer_seq
                if sent:
                    self._marked = sent
                    entry = await self._watcher._updates.get()
        self._seen += entry is not None
        return entry

    async def stop(self) -> None:
        """End it; the consumer goes by itself where its connection is over."""
        try:
            async with asyncio.timeout(1.0):
                await self._watcher.stop()  # type: ignore[no-untyped-call]
        except Exception:
            # Whatever nats-py raises here, the reader has finished, and NATS drops a consumer that no connection has.
            pass


_MOST: Final = 1e15
"""Largest number, in seconds or counted: far behind every date, far below what a float holds exactly."""


def is_entry(key: str, data: Mapping[str, Any]) -> bool:
    """Return whether `data` is what a relay writes under `key`.

    What passes has every member which `registry.nats` reads, each of its type, and a number in a range that every clock
    and float holds. Kinds that this version does not know pass: a newer relay may have written them.
    """
    first, _, rest = key.partition(".")
    kind = rest.partition(".")[2] if first == "cluster" else first
    members = _MEMBERS.get(kind)
    if members is None:
        return True
    if not all(check(data.get(member)) for member, check in members.items()):
        return False
    # Dots of the name are underscores in the key: one cluster's entry is not another's.
    return kind != "binding" or data["name"].replace(".", "_") == rest.partition(".")[0]


def _text(value: object) -> bool:
    return isinstance(value, str)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MOST


def _whole(value: object) -> bool:
    return isinstance(value, int) and _number(value)


def _keys(value: object) -> bool:
    return value is None or (isinstance(value, dict) and all(_key_state(state) for state in value.values()))


def _key_state(value: object) -> bool:
    checks = (_whole, _text, _number, _whole)
    return (
        isinstance(value, list)
        and 1 <= len(value) <= len(checks)
        and all(check(one) for check, one in zip(checks, value, strict=False))
    )


def _absent_or(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or check(value)


def _times(value: object) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


_MEMBERS: Final[Mapping[str, Mapping[str, Callable[[object], bool]]]] = {
    "binding": {
        "name": lambda value: isinstance(value, str) and is_cluster_name(value),
        "ca_pem": _text,
        "ca_pin": _text,
        "created": _number,
        "valid_since": _number,
        "keys": _keys,
        "cas": _absent_or(_text),
    },
    "revoked": {"at": lambda value: _number(value) and value != 0},
    "seen": {
        "last_seen": _absent_or(_number),
        "certificate_expires": _absent_or(_number),
        "version": _absent_or(_text),
    },
    "token": {
        "secret_hash": _text,
        "cluster": lambda value: isinstance(value, str) and is_cluster_name(value),
        "uses": _whole,
        "used": _whole,
        "created": _number,
        "expires_at": _number,
        "rebind": lambda value: isinstance(value, bool),
        "redemptions": _times,
    },
    "back": {"kind": lambda value: value in ("user", "cluster"), "name": _text, "at": _number},
    "recovery": {
        "cause": _text,
        "began": _number,
        "backup": _number,
        "serving": _number,
        "awaited": lambda value: isinstance(value, list) and all(map(_text, value)),
        "returned": _whole,
    },
    "user": {"user": _text, "before": _number, "reason": _text, "revoked": _number},
}
"""By kind of key: its members, and what each has to be."""
