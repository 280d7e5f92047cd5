"""The registry of a fleet: a JetStream key-value bucket, changed by compare-and-set alone.

Keys (a cluster's name has its dots replaced by `_`, which is in no name):

    token.ID              a join token: what may be shown of it, the SHA-256 of its secret, its redemptions
    cluster.NAME.binding  the cluster's CA, since when, and how often each agent's key was renewed
    cluster.NAME.revoked  when it was revoked, also where it has no binding; deleted when it is restored
    seen.NAME             what is noted of its agents; the only key that changes every minute
    user.HASH             a user whose logins are revoked (a user may have any name); deleted when the user is restored

Several keys and no transaction, so the order of writes decides. A redemption reads the token, the binding and the
revocation, refuses where it must, then writes the token (the use), then the binding. Each write names the revision that
was read, and when another relay was faster everything is read and judged again. So:

* Of one token of N uses N writes succeed, at whichever relays: an extra use is impossible.
* Dying between the two writes leaves a use without a binding. The same key may redeem again for ten minutes, which
  writes the binding; no other key gains anything.
* A use is never given back. Where a name is bound to another CA, or revoked, between the reading and the writing, the
  loser is refused and its use stays spent: giving it back could give it twice.
* A revocation is a key of its own that no redemption writes: it holds whatever else happens at the same time. Users'
  are read anew every few seconds; the copy has what was read last.

When NATS does not answer, changes are refused: `RegistryUnavailable`. Bindings and revocations are also followed in
a copy (one watch), and *reads* are answered from it for `outage` seconds after the last contact, so that agents and
clients of known clusters go on; after that it fails closed. What was not read before (the relay was started while NATS
was down) cannot be served. A relay that is cut off alone does not hear of new revocations meanwhile: that is what
bounds `outage`. A revocation once seen holds in this process until the key is seen *deleted*; that it is missing (a
bucket that was emptied, an old replica) is no reason to believe that the cluster was restored.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import structlog

from arcbridge.errors import EnrolmentRefused
from arcbridge.pki.enrolment import JoinToken
from arcbridge.pki.names import check_cluster_name
from arcbridge.pki.pins import pin_of, same_pin
from arcbridge.relay.nats import NatsConnection, NatsUnavailable, end, subject_token
from arcbridge.relay.registry import generations
from arcbridge.relay.registry.base import (
    KEEP_EXPIRED,
    MAX_REVOKED_USERS,
    NOT_ENROLLED,
    REDEEM_AGAIN,
    REVOKED,
    UNKNOWN_TOKEN,
    ClusterRecord,
    JoinTokenRecord,
    Registry,
    RegistryUnavailable,
    UserRevocation,
    added,
    check_join_token,
    check_labels,
    check_revocation,
    check_user,
    foreign_ca,
    full,
    may_go,
    shown_version,
    spent,
)

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.js.kv import KeyValue

from arcbridge.relay.registry.generations import RenewedTwice, ShownCertificate

T = TypeVar("T")

CALL: Final = 2.0
"""Seconds for one request to JetStream. A leader that is being elected takes longer; then the caller tries again."""
READ: Final = 1.0
"""... for a read that the copy can answer instead."""
CHANGE: Final = 15.0
"""Seconds for a change with all its repeats, when many relays want the same key."""
PAUSES: Final = (0.001, 0.02)
FOLLOW: Final = 300.0
"""Seconds until the copy is read anew, in case the server lost the watch without a word."""
FOLLOW_AGAIN: Final = (0.5, 2.0)

log = structlog.get_logger("arcbridge.relay")


class _Value(NamedTuple):
    """What a key holds, and at which revision. `data` None: nothing (any more); revision 0: never anything."""

    data: dict[str, Any] | None
    revision: int


class _Faster(Exception):
    """Another relay has written the key since it was read."""


class NatsRegistry(Registry):
    """See the module's docstring. `start` before use; the caller starts and closes the connection."""

    def __init__(
        self,
        connection: NatsConnection,
        *,
        bucket: str = "arcbridge",
        replicas: int = 1,
        outage: float = 1800.0,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nats = connection
        self._bucket = bucket
        self._replicas = replicas
        self._outage = outage
        self._clock = clock
        self._monotonic = monotonic
        self._closed = False
        self._store: tuple[Client, KeyValue] | None = None
        self._opening = asyncio.Lock()
        self._following: asyncio.Task[None] | None = None
        # The copy: bindings and revocations by subject token, users' by hash, each with its revision; when JetStream
        # last answered; whether it was ever read whole; when the bucket was made, because revisions count from 1 in
        # another one.
        self._bindings: dict[str, _Value] = {}
        self._revoked: dict[str, _Value] = {}
        self._users: dict[str, _Value] = {}
        self._users_read = False
        """Whether the users of the bucket were ever read whole."""
        self._contact: float | None = None
        self._complete = False
        self._made: object = None

    def start(self) -> None:
        """Begin to follow the bucket."""
        self._following = asyncio.get_running_loop().create_task(self._follow())

    async def close(self) -> None:
        self._closed = True
        if self._following is not None:
            await end([self._following])
            self._following = None

    # Join tokens.

    async def create_join_token(self, cluster: str, *, uses: int = 1, expires_at: float, rebind: bool = False) -> str:
        now = self._clock()
        check_join_token(cluster, uses, expires_at, now, rebind=rebind)
        token = JoinToken.create()
        data = {
            "secret_hash": token.secret_hash, "cluster": cluster, "uses": uses, "used": 0, "created": now,
            "expires_at": expires_at, "rebind": rebind, "redemptions": {},
        }  # fmt: skip

        async def create() -> None:
            await self._write(f"token.{token.id}", data, 0)

        await self._changing(create)
        await self._drop_expired(now)
        return token.text

    async def _drop_expired(self, now: float) -> None:
        """Housekeeping of who makes tokens; the new one stands, whatever comes of it."""
        try:
            for key, value in (await self._all("token.>")).items():
                if value.data is not None and value.data["expires_at"] < now - KEEP_EXPIRED:
                    await self._remove(key)
        except RegistryUnavailable as error:
            log.warning("long expired join tokens not removed", reason=error.message)

    async def list_join_tokens(self) -> list[JoinTokenRecord]:
        found = [
            JoinTokenRecord(
                id=key.removeprefix("token."),
                cluster=data["cluster"],
                uses=data["uses"],
                used=data["used"],
                created=data["created"],
                expires_at=data["expires_at"],
                rebind=data["rebind"],
            )
            for key, (data, _) in (await self._all("token.>")).items()
            if data is not None
        ]
        return sorted(found, key=lambda record: (record.created, record.id))

    async def delete_join_token(self, token_id: str) -> bool:
        if not token_id.isascii() or not token_id.isalnum():
            return False
        if (await self._read(f"token.{token_id}")).data is None:
            return False
        await self._remove(f"token.{token_id}")
        return True

    async def redeem_join_token(self, text: str, key_hash: str, cluster_ca_pem: str) -> ClusterRecord:
        token = JoinToken.parse(text)
        pin = pin_of(cluster_ca_pem)

        async def redeem() -> str:
            now = self._clock()
            key = f"token.{token.id}"
            found, revision = await self._read(key)
            # An unknown id costs the same comparison as a wrong secret, and gets the same answer.
            if not token.matches("0" * 64 if found is None else found["secret_hash"]) or found is None:
                raise EnrolmentRefused(UNKNOWN_TOKEN)
            again = found["redemptions"].get(key_hash)
            # `abs`: after the wall clock was set back, "earlier" is no longer a reason to trust a redemption for ever.
            repeated = again is not None and abs(now - again) <= REDEEM_AGAIN
            if not repeated and (why := spent(found["used"], found["uses"], found["expires_at"], now)):
                raise EnrolmentRefused(why)
            cluster: str = found["cluster"]
            place = f"cluster.{subject_token(cluster)}"
            revoked, binding = await asyncio.gather(
                self._revocation(subject_token(cluster)), self._read(f"{place}.binding")
            )
            if revoked:
                raise EnrolmentRefused(REVOKED)
            known = binding.data
            same = known is None or same_pin(known["ca_pin"], pin)
            if known is not None and not same and not found["rebind"]:
                raise EnrolmentRefused(foreign_ca(known["ca_pin"], pin))
            if not repeated:
                kept = {one: at for one, at in found["redemptions"].items() if abs(now - at) <= REDEEM_AGAIN}
                used = {"used": found["used"] + 1, "redemptions": {**kept, key_hash: now}}
                await self._write(key, {**found, **used}, revision)
            bound = {
                "name": cluster,
                "ca_pem": cluster_ca_pem,
                "ca_pin": pin,
                "created": now if known is None else known["created"],
                "valid_since": (0.0 if known is None else known["valid_since"]) if same else now,
                "keys": generations.to_json(generations.enrolled(_keys(known), key_hash, now, repeated=repeated)),
            }
            if bound != known:
                await self._write(f"{place}.binding", bound, binding.revision)
            return cluster

        record = await self.cluster(await self._changing(redeem))
        if record is None:
            raise RegistryUnavailable("the cluster was removed from the registry while it enrolled: try again")
        return record

    async def check_join_token(self, text: str) -> str:
        token = JoinToken.parse(text)
        found = (await self._read(f"token.{token.id}")).data
        if not token.matches("0" * 64 if found is None else found["secret_hash"]) or found is None:
            raise EnrolmentRefused(UNKNOWN_TOKEN)
        if why := spent(found["used"], found["uses"], found["expires_at"], self._clock()):
            raise EnrolmentRefused(why)
        return str(found["cluster"])

    # Clusters.

    async def cluster(self, name: str) -> ClusterRecord | None:
        token = subject_token(name)
        binding, seen, revoked = await asyncio.gather(
            self._read_or_copy(f"cluster.{token}.binding", self._bindings, token),
            self._read_or_nothing(f"seen.{token}"),
            self._revocation(token),
        )
        return None if binding.data is None else _record(binding.data, seen.data, revoked)

    async def adopt(self, name: str, ca_pem: str, when: float) -> bool:
        token = subject_token(name)
        data = {"name": name, "ca_pem": ca_pem, "ca_pin": pin_of(ca_pem), "created": when, "valid_since": 0.0}

        async def adopt() -> bool:
            found, revision = await self._read(f"cluster.{token}.binding")
            # A revocation without a binding is what is left of a bucket that was emptied: it still holds.
            if found is not None or await self._revocation(token):
                return False
            await self._write(f"cluster.{token}.binding", data, revision)
            return True

        return await self._changing(adopt)

    async def clusters(self) -> list[ClusterRecord]:
        bound, seen = await asyncio.gather(self._all("cluster.>"), self._all("seen.>"))
        records = []
        for key, (data, _) in bound.items():
            if key.endswith(".binding") and data is not None:
                token = subject_token(data["name"])
                revoked = self._held(token, bound.get(f"cluster.{token}.revoked", _NOTHING))
                records.append(_record(data, seen.get(f"seen.{token}", _NOTHING).data, revoked))
        return sorted(records, key=lambda record: record.name)

    async def certificate_issued(self, name: str, expires_at: float) -> None:
        await self._note(name, {"certificate_expires": expires_at})

    async def seen(
        self, name: str, when: float, *, version: str | None = None, labels: Mapping[str, str] | None = None
    ) -> None:
        changes: dict[str, Any] = {"last_seen": when}
        if version is not None:
            changes["version"] = shown_version(version)
        if labels is not None:
            changes["labels"] = check_labels(labels)
        await self._note(name, changes)

    async def _note(self, name: str, changes: Mapping[str, Any]) -> None:
        token = subject_token(name)

        async def note() -> None:
            # The copy will do: it is asked only whether there is such a cluster.
            if token not in self._bindings and (await self._read(f"cluster.{token}.binding")).data is None:
                return
            found, revision = await self._read(f"seen.{token}")
            noted = dict(found or {})
            for field, value in changes.items():
                # Times only go up: notes of several relays come in any order.
                noted[field] = max(noted.get(field, 0.0), value) if isinstance(value, float | int) else value
            if noted != found:
                await self._write(f"seen.{token}", noted, revision)

        await self._changing(note)

    async def renew(self, name: str, shown: ShownCertificate, request: str) -> int:
        token = subject_token(name)

        async def renew() -> generations.Renewal:
            revoked, binding = await asyncio.gather(self._revocation(token), self._read(f"cluster.{token}.binding"))
            if binding.data is None:
                raise EnrolmentRefused(NOT_ENROLLED)
            if revoked:
                raise EnrolmentRefused(REVOKED)
            known = _keys(binding.data)
            renewal = generations.renewed(known, shown, request, self._clock())
            if renewal.keys != known:
                data = {**binding.data, "keys": generations.to_json(renewal.keys)}
                await self._write(f"cluster.{token}.binding", data, binding.revision)
            return renewal

        renewal = await self._changing(renew)
        if not renewal.generation:
            # Dying before this write leaves both certificates void, and the connections that stand.
            await self.revoke_cluster(name)
            raise RenewedTwice
        return renewal.generation

    async def revoke_cluster(self, name: str) -> bool:
        token = subject_token(name)

        async def revoke() -> bool:
            known = (await self._read(f"cluster.{token}.binding")).data is not None
            found, revision = await self._read(f"cluster.{token}.revoked")
            # The time of the first revocation stays.
            if found is None:
                data = {"at": self._clock()}
                self._revoked[token] = _Value(data, await self._write(f"cluster.{token}.revoked", data, revision))
            return known

        return await self._changing(revoke)

    async def unrevoke_cluster(self, name: str) -> bool:
        token = subject_token(name)

        async def restore() -> bool:
            bound, held = (await self._read(f"cluster.{token}.binding")).data, await self._revocation(token)
            if bound is None and not held:
                return False
            # Also when there is nothing to delete: the mark of the deletion is what other relays believe.
            await self._remove(f"cluster.{token}.revoked")
            await self._revocation(token)
            return True

        return await self._changing(restore)

    async def delete_cluster(self, name: str) -> bool:
        token = subject_token(name)

        async def delete() -> bool:
            bound, held = (await self._read(f"cluster.{token}.binding")).data, await self._revocation(token)
            # Also what is not there: the mark of the deletion is what other relays believe.
            for key in (f"cluster.{token}.binding", f"seen.{token}", f"cluster.{token}.revoked"):
                await self._remove(key)
            await self._revocation(token)
            return bound is not None or bool(held)

        return await self._changing(delete)

    async def revocations(self) -> frozenset[str]:
        try:
            for key, value in (await self._all("cluster.*.revoked", CALL)).items():
                self._held(key.split(".")[1], value)
        except RegistryUnavailable:
            self._require_copy()
        return frozenset(token.replace("_", ".") for token, (data, _) in self._revoked.items() if data is not None)

    # Users.

    async def revoke_user(self, user: str, before: int, reason: str = "") -> UserRevocation:
        check_revocation(user, before, reason)
        digest = _digest(user)
        await self._make_room(digest)

        async def revoke() -> UserRevocation:
            found, revision = await self._read(f"user.{digest}")
            record = added(None if found is None else _user(found), UserRevocation(user, before, reason, self._clock()))
            data = asdict(record)
            self._users[digest] = _Value(data, await self._write(f"user.{digest}", data, revision))
            return record

        return await self._changing(revoke)

    async def _make_room(self, digest: str) -> None:
        """Raise `StateError` where the list is full. Two operators at once may put one more into it than may be in it,
        which harms nothing."""
        known = await self._all("user.>")
        known.pop(f"user.{digest}", None)
        entries = {key: _user(data) for key, (data, _) in known.items() if data is not None}
        if len(entries) < MAX_REVOKED_USERS:
            return
        old = [key for key, entry in entries.items() if may_go(entry, self._clock())]
        if not old:
            raise full()
        for key in old:
            await self._remove(key)

    async def restore_user(self, user: str) -> bool:
        digest = _digest(check_user(user))
        known = (await self._read(f"user.{digest}")).data or self._users.get(digest, _NOTHING).data
        # Also when there is nothing to delete: the mark of the deletion is what other relays believe.
        await self._remove(f"user.{digest}")
        _take(self._users, digest, await self._read(f"user.{digest}"))
        return known is not None

    async def user_revocations(self) -> Mapping[str, UserRevocation]:
        try:
            for key, value in (await self._all("user.>", CALL)).items():
                _take(self._users, key.removeprefix("user."), value)
            self._users_read = True
        except RegistryUnavailable:
            self._require_copy()
            if not self._users_read:  # the copy of the clusters says nothing of the users
                raise
        records = [_user(data) for data, _ in self._users.values() if data is not None]
        return {record.user: record for record in sorted(records, key=lambda record: record.user)}

    # The copy.

    async def _read_or_copy(self, key: str, copy: dict[str, _Value], token: str) -> _Value:
        try:
            return await self._read(key, READ)
        except RegistryUnavailable:
            self._require_copy()
            return copy.get(token, _NOTHING)

    async def _read_or_nothing(self, key: str) -> _Value:
        """For what decides nothing."""
        try:
            return await self._read(key, READ)
        except RegistryUnavailable:
            self._require_copy()
            return _NOTHING

    async def _revocation(self, token: str) -> float:
        """Return when the cluster was revoked, 0 if it is not."""
        return self._held(token, await self._read_or_copy(f"cluster.{token}.revoked", self._revoked, token))

    def _held(self, token: str, found: _Value) -> float:
        """Take over what was read of a cluster's revocation; when it was revoked, or 0."""
        known = _take(self._revoked, token, found)
        return 0.0 if known.data is None else float(known.data["at"])

    def _require_copy(self) -> None:
        silence = math.inf if self._contact is None else self._monotonic() - self._contact
        if self._closed or not self._complete or silence > self._outage:
            raise RegistryUnavailable("the fleet's registry does not answer: is NATS up?")

    async def _follow(self) -> None:
        """Keep the copy, through every connection."""
        while True:
            try:
                await self._follow_once()
            except RegistryUnavailable:
                # The caller that needs the registry tells it.
                pass
            except Exception as error:
                log.warning("registry not followed, trying again", reason=type(error).__name__)
            await asyncio.sleep(random.uniform(*FOLLOW_AGAIN))

    async def _follow_once(self) -> None:
        """Everything there is, then every change, for the life of one connection."""
        client, store = await self._opened()
        made = (await self._answered(store.status(), CALL)).stream_info.created
        if self._made not in (None, made):
            log.warning("the registry's bucket is another one; revocations known from the old one still hold")
            for copy in (self._revoked, self._users):
                copy.update({token: _Value(value.data, 0) for token, value in copy.items()})
        self._made = made
        watch = _Watch(await self._answered(store.watch("cluster.>"), CALL))
        until = self._monotonic() + FOLLOW
        fresh: dict[str, _Value] | None = {}
        try:
            while self._monotonic() < until and not client.is_closed:
                try:
                    found = await watch.next(1.0)
                except TimeoutError:
                    continue
                if found is None:
                    # All that was there: what is not among it is gone, revocations aside.
                    self._bindings, fresh = fresh or {}, None
                    self._complete = True
                    self._contact = self._monotonic()
                    continue
                key, value = found
                _, token, kind = key.split(".")
                if kind == "revoked":
                    self._held(token, value)
                elif kind == "binding":
                    (self._bindings if fresh is None else fresh)[token] = value
        finally:
            await watch.stop()

    # The bucket.

    async def _opened(self) -> tuple[Client, KeyValue]:
        """Return the bucket over the connection that stands, made if there is none."""
        if self._closed:
            raise RegistryUnavailable("the registry is closed: the relay is stopping")
        try:
            client = self._nats.client
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
                store = await self._answered(jetstream.key_value(self._bucket), CALL)
            except errors.NotFoundError:
                # Another relay may make it at the same time: the same settings, so both succeed.
                config = api.KeyValueConfig(
                    bucket=self._bucket,
                    description="arcbridge relays: clusters, join tokens, revocations",
                    history=1,
                    replicas=self._replicas,
                    # Reads go to the leader, which has every write: an old replica would bring revoked clusters back.
                    direct=False,
                )
                try:
                    store = await self._answered(jetstream.create_key_value(config), 2 * CALL)
                except errors.APIError as error:
                    log.error("registry bucket not made", bucket=self._bucket, reason=error.description)
                    raise RegistryUnavailable(
                        f"the registry's bucket {self._bucket} is not there and cannot be made: {error.description}"
                    ) from error
                log.info("registry bucket made", bucket=self._bucket, replicas=self._replicas)
            self._store = (client, store)
            return self._store

    async def _answered(self, call: Awaitable[T], timeout: float) -> T:
        """The result of a call to JetStream, or `RegistryUnavailable`; answers that mean something pass as they are."""
        from nats import errors
        from nats.js import errors as answers

        try:
            async with asyncio.timeout(timeout):
                return await call
        except (answers.NotFoundError, answers.KeyDeletedError, answers.KeyWrongLastSequenceError):
            self._contact = self._monotonic()
            raise
        except (answers.ServiceUnavailableError, answers.NoStreamResponseError, errors.NoRespondersError) as error:
            raise RegistryUnavailable("JetStream is not available: is it enabled, and has it a leader?") from error
        except (errors.TimeoutError, TimeoutError) as error:
            self._nats.doubt()
            raise RegistryUnavailable("the fleet's registry does not answer: is NATS up?") from error
        except answers.APIError:
            raise
        except (errors.Error, OSError) as error:
            raise RegistryUnavailable("the fleet's registry does not answer: is NATS up?") from error

    async def _read(self, key: str, timeout: float = CALL) -> _Value:
        from nats.js import errors

        _, store = await self._opened()
        try:
            entry = await self._answered(store._get(key), timeout)
        except errors.KeyDeletedError as error:
            return _Value(None, (error.entry.revision if error.entry is not None else None) or 0)
        except errors.NotFoundError:
            return _NOTHING
        except errors.APIError as error:
            raise _unavailable(error) from error
        self._contact = self._monotonic()
        return _Value(_decoded(entry.value), entry.revision or 0)

    async def _write(self, key: str, data: Mapping[str, Any], revision: int) -> int:
        """Only if the key is still at `revision`; raises `_Faster` otherwise."""
        from nats.js import errors

        _, store = await self._opened()
        encoded = json.dumps(data, separators=(",", ":"), sort_keys=True).encode()
        try:
            written = await self._answered(store.update(key, encoded, last=revision), CALL)
        except errors.KeyWrongLastSequenceError as error:
            raise _Faster from error
        except errors.APIError as error:
            raise _unavailable(error) from error
        self._contact = self._monotonic()
        return written

    async def _remove(self, key: str) -> None:
        from nats.js import errors

        _, store = await self._opened()
        try:
            await self._answered(store.delete(key), CALL)
        except errors.APIError as error:
            raise _unavailable(error) from error
        self._contact = self._monotonic()

    async def _all(self, keys: str, timeout: float = CHANGE) -> dict[str, _Value]:
        """Every key that matches, deleted ones too, as they are now."""
        from nats.js import errors

        _, store = await self._opened()
        found: dict[str, _Value] = {}

        async def collect() -> None:
            watch = _Watch(await store.watch(keys, inactive_threshold=10.0))
            try:
                while (entry := await watch.next(timeout)) is not None:
                    found[entry[0]] = entry[1]
            finally:
                await watch.stop()

        try:
            await self._answered(collect(), timeout)
        except errors.APIError as error:
            raise _unavailable(error) from error
        self._contact = self._monotonic()
        return found

    async def _changing(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Run `attempt`, again whenever another relay was faster; each time it reads and judges anew."""
        until = self._monotonic() + CHANGE
        pause = PAUSES[0]
        while True:
            try:
                return await attempt()
            except _Faster:
                if self._monotonic() > until:
                    raise RegistryUnavailable("too many changes at once in the registry: try again") from None
                await asyncio.sleep(random.uniform(0, pause))
                pause = min(2 * pause, PAUSES[1])


_NOTHING: Final = _Value(None, 0)


def _take(copy: dict[str, _Value], token: str, found: _Value) -> _Value:
    """Take over what was read of a revocation, unless the copy knows better; return what holds.

    A key that is missing says nothing (rule of the module), and neither does a revision older than a known one, as
    long as the bucket is the same; one that was made anew counts from 1 again, and there a revocation wins.
    """
    known = copy.get(token, _NOTHING)
    if found.revision and (found.revision >= known.revision or (found.data is not None and known.data is None)):
        copy[token] = known = found
    return known


def _user(data: Mapping[str, Any]) -> UserRevocation:
    return UserRevocation(data["user"], data["before"], data["reason"], data["revoked"])


def _digest(user: str) -> str:
    """A user as part of a key, for which only some characters may be used."""
    return hashlib.sha256(user.encode()).hexdigest()[:40]


class _Watch:
    """The entries of a bucket, and each change behind them.

    nats-py marks the end of what was there when it has handed over no entry yet, also where some have arrived and wait
    for their turn of the loop. Here the mark comes behind all that the server had sent by then.
    """

    def __init__(self, watcher: KeyValue.KeyWatcher) -> None:
        self._watcher = watcher
        self._seen = 0
        """Entries so far."""
        self._marked = -1
        """Entries behind which the end is to be marked, because nats-py did so too early; -1: it did not."""

    async def next(self, timeout: float) -> tuple[str, _Value] | None:
        """Return a key and its value; None once, when all that was there at the beginning has been told.

        Raises TimeoutError after `timeout` seconds without either.
        """
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
        if entry is None:
            return None
        self._seen += 1
        return entry.key, _Value(_decoded(entry.value) if entry.operation is None else None, entry.revision or 0)

    async def stop(self) -> None:
        """End it; the consumer goes by itself where its connection is over."""
        try:
            async with asyncio.timeout(1.0):
                await self._watcher.stop()  # type: ignore[no-untyped-call]
        except Exception:
            pass


def _decoded(value: bytes | None) -> dict[str, Any]:
    try:
        data = json.loads(value or b"")
    except ValueError as error:
        raise RegistryUnavailable("the registry holds something that is not ours: was its bucket shared?") from error
    if not isinstance(data, dict):
        raise RegistryUnavailable("the registry holds something that is not ours: was its bucket shared?")
    return data


def _record(binding: Mapping[str, Any], seen: Mapping[str, Any] | None, revoked: float) -> ClusterRecord:
    seen = seen or {}
    return ClusterRecord(
        name=check_cluster_name(binding["name"]),
        ca_pem=binding["ca_pem"],
        ca_pin=binding["ca_pin"],
        created=binding["created"],
        last_seen=seen.get("last_seen", 0.0),
        certificate_expires=seen.get("certificate_expires", 0.0),
        version=seen.get("version", ""),
        labels=seen.get("labels", {}),
        revoked=revoked,
        valid_since=binding["valid_since"],
        keys=_keys(binding),
    )


def _keys(binding: Mapping[str, Any] | None) -> generations.Keys:
    """What a binding holds of keys; one that was written by a relay that counts nothing has nothing of them."""
    return generations.from_json((binding or {}).get("keys", {}))


def _unavailable(error: Any) -> RegistryUnavailable:
    return RegistryUnavailable(f"JetStream refused: {getattr(error, 'description', '') or type(error).__name__}")
