"""The registry of a fleet: a JetStream key-value bucket, changed by compare-and-set alone.

Keys (a cluster's name has its dots replaced by `_`, which is in no name):

    token.ID              a join token: what may be shown of it, the SHA-256 of its secret, its redemptions
    cluster.NAME.binding  the cluster's CA, since when, and how often each agent's key was renewed
    cluster.NAME.revoked  when it was revoked, also where it has no binding; deleted when it is restored
    seen.NAME             what is noted of its agents; the only key that changes every minute
    user.HASH             a user whose logins are revoked (a user may have any name); deleted when the user is restored
    back.HASH             a revocation of a user or a cluster that was taken back, and when
    recovery              which revocations the registry may lack; deleted once it lacks none

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
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Final, TypeVar

import structlog

from arcbridge.errors import EnrolmentRefused, StateError
from arcbridge.observe.untrusted_text import printable
from arcbridge.pki.enrolment import JoinToken
from arcbridge.pki.names import check_cluster_name
from arcbridge.pki.pins import pin_of
from arcbridge.relay.nats import NatsConnection, end, subject_token
from arcbridge.relay.registry import base, generations
from arcbridge.relay.registry.base import (
    AccessChange,
    ClusterRecord,
    JoinTokenRecord,
    Recovery,
    Registry,
    RegistrySnapshot,
    RegistryUnavailable,
    UserRevocation,
)
from arcbridge.relay.registry.generations import RenewedTwice, ShownCertificate
from arcbridge.relay.registry.nats_bucket import CALL, CHANGE, NOTHING, Bucket, Faster, Malformed, Value, is_entry
from arcbridge.untrusted_json import read_json

T = TypeVar("T")

READ: Final = 1.0
"""Seconds for a read that the copy can answer instead."""
PAUSES: Final = (0.001, 0.02)
FOLLOW: Final = 300.0
"""Seconds until the copy is read anew, in case the server lost the watch without a word."""
FOLLOW_AGAIN: Final = (0.5, 2.0)

_TOKEN_FIELDS: Final = ("cluster", "uses", "used", "created", "expires_at", "rebind")
"""Those of a `JoinTokenRecord` behind its id."""

log = structlog.get_logger("arcbridge.relay")


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
        self._bucket = Bucket(connection, name=bucket, replicas=replicas, monotonic=monotonic)
        self._outage = outage
        self._clock = clock
        self._monotonic = monotonic
        self._following: asyncio.Task[None] | None = None
        # The copy: bindings and revocations by subject token, users' by hash, each with its revision; whether it was
        # ever read whole; when the bucket was made, because revisions count from 1 in another one.
        self._bindings: dict[str, Value] = {}
        self._revoked: dict[str, Value] = {}
        self._users: dict[str, Value] = {}
        self._users_read = False
        """Whether the users of the bucket were ever read whole."""
        self._taken_back: dict[str, Value] | None = None
        """What was taken back, as it was read last; None: it was not read yet."""
        self._recovery: Value | None = None
        """The recovery as it was read last; None: it was not read yet."""
        self._complete = False
        self._made: object = None

    def start(self) -> None:
        """Begin to follow the bucket."""
        self._following = asyncio.get_running_loop().create_task(self._follow())

    async def close(self) -> None:
        self._bucket.closed = True
        if self._following is not None:
            await end([self._following])
            self._following = None

    # Join tokens.

    async def create_join_token(self, cluster: str, *, uses: int = 1, expires_at: float, rebind: bool = False) -> str:
        now = self._clock()
        base.check_join_token(cluster, uses, expires_at, now, rebind=rebind)
        token = JoinToken.create()
        data = {
            "secret_hash": token.secret_hash, "cluster": cluster, "uses": uses, "used": 0, "created": now,
            "expires_at": expires_at, "rebind": rebind, "redemptions": {},
        }  # fmt: skip

        async def create() -> None:
            await self._bucket.write(f"token.{token.id}", data, 0)

        await self._changing(create)
        await _drop_expired(self._bucket, now)
        return token.text

    async def list_join_tokens(self) -> list[JoinTokenRecord]:
        found = [
            JoinTokenRecord(key.removeprefix("token."), *(data[field] for field in _TOKEN_FIELDS))
            for key, (data, _) in (await self._bucket.read_all("token.>")).items()
            if data is not None
        ]
        return sorted(found, key=lambda record: (record.created, record.id))

    async def delete_join_token(self, token_id: str) -> bool:
        if not token_id.isascii() or not token_id.isalnum():
            return False
        if (await self._bucket.read(f"token.{token_id}")).data is None:
            return False
        await self._bucket.remove(f"token.{token_id}")
        return True

    async def redeem_join_token(self, text: str, key_hash: str, cluster_ca_pem: str) -> ClusterRecord:
        token = JoinToken.parse(text)
        pin = pin_of(cluster_ca_pem)

        async def redeem() -> str:
            now = self._clock()
            found, revision = await _known_token(self._bucket, token)
            again = found["redemptions"].get(key_hash)
            # `abs`: after the wall clock was set back, "earlier" is no longer a reason to trust a redemption for ever.
            repeated = again is not None and abs(now - again) <= base.REDEEM_AGAIN
            if not repeated and (why := base.spent(found["used"], found["uses"], found["expires_at"], now)):
                raise EnrolmentRefused(why)
            cluster: str = found["cluster"]
            place = f"cluster.{subject_token(cluster)}"
            revoked, binding = await asyncio.gather(
                self._revocation(subject_token(cluster)), self._bucket.read(f"{place}.binding")
            )
            if revoked:
                raise EnrolmentRefused(base.REVOKED)
            known = binding.data
            cas = "" if known is None else known.get("cas", "")
            same = known is None or base.is_bound_to(known["ca_pin"], cas, pin)
            if known is not None and not same and not found["rebind"]:
                raise EnrolmentRefused(base.foreign_ca(known["ca_pin"], pin))
            if not repeated:
                kept = {one: at for one, at in found["redemptions"].items() if abs(now - at) <= base.REDEEM_AGAIN}
                used = {"used": found["used"] + 1, "redemptions": {**kept, key_hash: now}}
                await self._bucket.write(f"token.{token.id}", {**found, **used}, revision)
            bound = {
                "name": cluster,
                "ca_pem": cluster_ca_pem,
                "ca_pin": pin,
                "created": now if known is None else known["created"],
                "valid_since": (0.0 if known is None else known["valid_since"]) if same else now,
                "keys": generations.to_json(generations.enrolled(_keys(known), key_hash, now, repeated=repeated)),
                **({"cas": cas} if same and cas else {}),
            }
            if bound != known:
                await self._bucket.write(f"{place}.binding", bound, binding.revision)
            return cluster

        record = await self.cluster(await self._changing(redeem))
        if record is None:
            raise RegistryUnavailable("the cluster was removed from the registry while it enrolled: try again")
        return record

    async def check_join_token(self, text: str) -> str:
        token = JoinToken.parse(text)
        found, _ = await _known_token(self._bucket, token)
        if why := base.spent(found["used"], found["uses"], found["expires_at"], self._clock()):
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
            found, revision = await self._bucket.read(f"cluster.{token}.binding")
            # A revocation without a binding is what is left of a bucket that was emptied: it still holds.
            if found is not None or await self._revocation(token):
                return False
            await self._bucket.write(f"cluster.{token}.binding", data, revision)
            return True

        return await self._changing(adopt)

    async def succeed(self, known: ClusterRecord, ca_pem: str, cas: str) -> bool:
        key = f"cluster.{subject_token(known.name)}.binding"

        async def succeed() -> bool:
            found, revision = await self._bucket.read(key)
            if found is None or (found["ca_pin"], found.get("cas", "")) != (known.ca_pin, known.cas):
                return False
            await self._bucket.write(key, {**found, "ca_pem": ca_pem, "ca_pin": pin_of(ca_pem), "cas": cas}, revision)
            return True

        return await self._changing(succeed)

    async def clusters(self) -> list[ClusterRecord]:
        bound, seen = await asyncio.gather(self._bucket.read_all("cluster.>"), self._bucket.read_all("seen.>"))
        records = []
        for key, (data, _) in bound.items():
            if key.endswith(".binding") and data is not None:
                token = subject_token(data["name"])
                revoked = self._held(token, bound.get(f"cluster.{token}.revoked", NOTHING))
                records.append(_record(data, seen.get(f"seen.{token}", NOTHING).data, revoked))
        return sorted(records, key=lambda record: record.name)

    async def certificate_issued(self, name: str, expires_at: float) -> None:
        await self._note(name, {"certificate_expires": expires_at})

    async def seen(self, name: str, when: float, *, version: str | None = None) -> None:
        changes: dict[str, Any] = {"last_seen": when}
        if version is not None:
            changes["version"] = printable(version, base.MAX_VERSION)
        await self._note(name, changes)

    async def _note(self, name: str, changes: Mapping[str, Any]) -> None:
        token = subject_token(name)

        async def note() -> None:
            # The copy is good enough, because only the existence of the cluster is in question.
            known = self._bindings.get(token, NOTHING).data is not None
            if not known and (await self._bucket.read(f"cluster.{token}.binding")).data is None:
                return
            found, revision = await self._bucket.read(f"seen.{token}")
            noted = dict(found or {})
            for field, value in changes.items():
                # Times only go up: notes of several relays come in any order.
                noted[field] = max(noted.get(field, 0.0), value) if isinstance(value, float | int) else value
            if noted != found:
                await self._bucket.write(f"seen.{token}", noted, revision)

        await self._changing(note)

    async def renew(self, name: str, shown: ShownCertificate, request: str) -> int:
        token = subject_token(name)

        async def renew() -> generations.CountedRenewal:
            revoked, binding = await asyncio.gather(
                self._revocation(token), self._bucket.read(f"cluster.{token}.binding")
            )
            if binding.data is None:
                raise EnrolmentRefused(base.NOT_ENROLLED)
            if revoked:
                raise EnrolmentRefused(base.REVOKED)
            known = _keys(binding.data)
            renewal = generations.renewed(known, shown, request, self._clock())
            if renewal.keys != known:
                data = {**binding.data, "keys": generations.to_json(renewal.keys)}
                await self._bucket.write(f"cluster.{token}.binding", data, binding.revision)
            return renewal

        renewal = await self._changing(renew)
        if not renewal.generation:
            # If this process dies before the write, or NATS does not answer, both certificates are void, but
            # connections that stand go on. Later renewals are refused as void, so that none of them raises the alarm.
            try:
                await self.revoke_cluster(name)
            except RegistryUnavailable as error:
                advice = f"arcbridge --role relay cluster revoke {name}"
                log.error("cluster not revoked", cluster=name, reason=error.message, advice=advice)
            raise RenewedTwice
        return renewal.generation

    async def revoke_cluster(self, name: str) -> bool:
        token = subject_token(name)

        async def revoke() -> bool:
            known = await _is_bound(self._bucket, token)
            found, revision = await self._bucket.read(f"cluster.{token}.revoked")
            # The time of the first revocation stays.
            if found is None:
                at = base.later(self._clock(), await _taken_back_at(self._bucket, "cluster", name))
                data = {"at": at}
                self._revoked[token] = Value(data, await self._bucket.write(f"cluster.{token}.revoked", data, revision))
                await _forget_taken_back(self._bucket, "cluster", name, at)
            return known

        return await self._changing(revoke)

    async def unrevoke_cluster(self, name: str) -> bool:
        token = subject_token(name)

        async def restore() -> bool:
            bound, held = await _is_bound(self._bucket, token), await self._revocation(token)
            if not bound and not held:
                return False
            await _note_taken_back(self._bucket, "cluster", name, held, self._clock())
            # Also when there is nothing to delete: the mark of the deletion is what other relays believe.
            await self._bucket.remove(f"cluster.{token}.revoked")
            await self._revocation(token)
            return True

        return await self._changing(restore)

    async def delete_cluster(self, name: str) -> bool:
        token = subject_token(name)

        async def delete() -> bool:
            bound, held = await _is_bound(self._bucket, token), await self._revocation(token)
            await _note_taken_back(self._bucket, "cluster", name, held, self._clock())
            # Also what is not there: the mark of the deletion is what other relays believe.
            for key in (f"cluster.{token}.binding", f"seen.{token}", f"cluster.{token}.revoked"):
                await self._bucket.remove(key)
            await self._revocation(token)
            return bound or bool(held)

        return await self._changing(delete)

    async def revocations(self) -> frozenset[str]:
        try:
            for key, value in (await self._bucket.read_all("cluster.*.revoked", CALL)).items():
                self._held(key.split(".")[1], value)
        except RegistryUnavailable:
            self._require_copy()
        return frozenset(token.replace("_", ".") for token, (data, _) in self._revoked.items() if data is not None)

    # Users.

    async def revoke_user(self, user: str, before: int, reason: str = "") -> UserRevocation:
        base.check_revocation(user, before, reason)
        digest = _digest(user)
        await self._make_room(digest)

        async def revoke() -> UserRevocation:
            found, revision = await self._bucket.read(f"user.{digest}")
            at = base.later(self._clock(), await _taken_back_at(self._bucket, "user", user))
            former = None if found is None else _user(found)
            at = base.later(at, None if former is None else former.revoked)
            record = base.added(former, UserRevocation(user, before, reason, at))
            data = asdict(record)
            self._users[digest] = Value(data, await self._bucket.write(f"user.{digest}", data, revision))
            await _forget_taken_back(self._bucket, "user", user, at)
            return record

        return await self._changing(revoke)

    async def _make_room(self, digest: str) -> None:
        """Raise `StateError` where the list is full. Two operators at once may put one more into it than may be in it,
        which harms nothing."""
        known = await self._bucket.read_all("user.>")
        known.pop(f"user.{digest}", None)
        entries = {key: _user(data) for key, (data, _) in known.items() if data is not None}
        if len(entries) < base.MAX_REVOKED_USERS:
            return
        old = [key for key, entry in entries.items() if base.may_go(entry, self._clock())]
        if not old:
            raise base.full()
        for key in old:
            await self._bucket.remove(key)

    async def restore_user(self, user: str) -> bool:
        digest = _digest(base.check_user(user))

        async def restore() -> bool:
            known = (await self._bucket.read(f"user.{digest}")).data or self._users.get(digest, NOTHING).data
            revoked = 0.0 if known is None else known["revoked"]
            await _note_taken_back(self._bucket, "user", user, revoked, self._clock())
            # Also when there is nothing to delete: the mark of the deletion is what other relays believe.
            await self._bucket.remove(f"user.{digest}")
            _take(self._users, digest, await self._bucket.read(f"user.{digest}"))
            return known is not None

        return await self._changing(restore)

    async def user_revocations(self) -> Mapping[str, UserRevocation]:
        try:
            for key, value in (await self._bucket.read_all("user.>", CALL)).items():
                _take(self._users, key.removeprefix("user."), value)
            self._users_read = True
        except RegistryUnavailable:
            self._require_copy()
            if not self._users_read:  # `_require_copy` knows of the clusters' copy alone
                raise
        records = [_user(data) for data, _ in self._users.values() if data is not None]
        return {record.user: record for record in sorted(records, key=lambda record: record.user)}

    # What outlives the registry.

    async def access_changes(self) -> list[AccessChange]:
        try:
            self._taken_back = await self._bucket.read_all("back.>", CALL)
        except RegistryUnavailable:
            self._require_copy()
            if self._taken_back is None:
                raise
        await asyncio.gather(self.revocations(), self.user_revocations())
        return list(_changes_of(self._taken_back, self._revoked, self._users).values())

    async def merge(self, changes: Iterable[AccessChange]) -> list[AccessChange]:
        self._taken_back = await self._bucket.read_all("back.>", CALL)  # no copy of it decides a change
        await asyncio.gather(self.revocations(), self.user_revocations())
        known = _changes_of(self._taken_back, self._revoked, self._users)
        news = base.news_of(known, changes, self._clock())
        for change in news:
            await self._changing(partial(self._put, change))
        if any(not one.before for one in news):
            await _prune_taken_back(self._bucket)
        return news

    async def snapshot(self) -> RegistrySnapshot:
        found = {key: [value.revision, value.data] for key, value in (await self._bucket.read_all(">")).items()
                 if value.data is not None}  # fmt: skip
        return RegistrySnapshot("nats", 1, json.dumps(found).encode())

    async def replace(self, data: bytes, recovery: Recovery, former: Iterable[AccessChange] = ()) -> list[AccessChange]:
        try:
            stored = {
                key: data for key, (_, data) in read_json(data, len(data)).items() if not key.startswith("token.")
            }
            if not all(isinstance(data, dict) and is_entry(key, data) for key, data in stored.items()):
                raise ValueError("an entry of another form")
        except (ValueError, TypeError, AttributeError) as error:
            raise StateError("the registry in the backup is damaged, or none") from error
        news = base.news_of(_changes_in(stored), former, self._clock())
        for change in news:
            _put_into(stored, change)
        present = await self._bucket.read_all(">")
        # What takes rights away comes first, and nothing that is there goes before all is written: a restore that was
        # interrupted can be made again.
        order = ("recovery", "user", "back", "cluster", "seen")
        names = tuple(data["name"] for key, data in stored.items() if key.endswith(".binding"))
        stored["recovery"] = asdict(replace(recovery, awaited=names))
        for key in sorted(stored, key=lambda key: (*[key.partition(".")[0] != one for one in order], "binding" in key)):
            try:
                await self._bucket.write(key, stored[key], present.get(key, NOTHING).revision)
            except Faster as error:
                raise RegistryUnavailable(
                    "a relay of the fleet writes to the registry: stop every relay of it, and restore again",
                    retry_after=None,
                ) from error
        for key, value in present.items():
            if key not in stored and value.data is not None:
                await self._bucket.remove(key)
        for copy in (self._bindings, self._revoked, self._users):
            copy.clear()
        return news

    async def _put(self, change: AccessChange) -> None:
        """Put a change in force. What two relays merge at once is the same, or the next look merges it again."""
        kind, name, at, before, _ = change
        if not before:
            await _write_taken_back(self._bucket, kind, name, at)
        if kind == "user":
            copy, token = self._users, _digest(name)
        else:
            copy, token = self._revoked, subject_token(name)
        key, data = _entry(change)
        if before:
            copy[token] = Value(data, await self._bucket.write(key, data, (await self._bucket.read(key)).revision))
            await _forget_taken_back(self._bucket, kind, name, at)
        else:
            await self._bucket.remove(key)
            _take(copy, token, await self._bucket.read(key))

    async def recovery(self) -> Recovery | None:
        try:
            self._recovery = await self._bucket.read("recovery", READ)
        except RegistryUnavailable:
            self._require_copy()
            if self._recovery is None:
                raise
        found = self._recovery.data
        return None if found is None else base.recovery_of(found)

    async def change_recovery(self, change: Callable[[Recovery | None], Recovery | None]) -> Recovery | None:
        async def keep() -> Recovery | None:
            found, revision = await self._bucket.read("recovery")
            was = None if found is None else base.recovery_of(found)
            now = change(was)
            if now is not None and now != was:
                await self._bucket.write("recovery", asdict(now), revision)
            elif now is None and was is not None:
                await self._bucket.remove("recovery")
            return now

        return await self._changing(keep)

    # The copy.

    async def _read_or_copy(self, key: str, copy: dict[str, Value], token: str) -> Value:
        try:
            return await self._bucket.read(key, READ)
        except RegistryUnavailable as error:
            known = copy.get(token, NOTHING)
            if isinstance(error, Malformed) and known.data is None:
                # Nothing else is known of it: neither "there is no such cluster" nor "it is not revoked" may follow.
                raise
            self._require_copy()
            return known

    async def _read_or_nothing(self, key: str) -> Value:
        """Read a key that decides nothing: where NATS does not answer and the copy is young enough, it has no value."""
        try:
            return await self._bucket.read(key, READ)
        except RegistryUnavailable:
            self._require_copy()
            return NOTHING

    async def _revocation(self, token: str) -> float:
        """Return when the cluster was revoked, 0 if it is not."""
        return self._held(token, await self._read_or_copy(f"cluster.{token}.revoked", self._revoked, token))

    def _held(self, token: str, found: Value) -> float:
        """Take over what was read of a cluster's revocation; return when it was revoked, or 0."""
        known = _take(self._revoked, token, found)
        return 0.0 if known.data is None else float(known.data["at"])

    def _require_copy(self) -> None:
        silence = math.inf if self._bucket.contact is None else self._monotonic() - self._bucket.contact
        if self._bucket.closed or not self._complete or silence > self._outage:
            raise RegistryUnavailable("the fleet's registry does not answer: is NATS up?")

    async def _follow(self) -> None:
        """Keep the copy, through every connection."""
        while True:
            try:
                await self._follow_once()
            except RegistryUnavailable:
                # Not logged here: the call that needs the registry raises, and is.
                pass
            except Exception as error:
                log.warning("registry not followed, trying again", reason=type(error).__name__)
            await asyncio.sleep(random.uniform(*FOLLOW_AGAIN))

    async def _follow_once(self) -> None:
        """Read everything there is, then follow every change, for the life of one connection."""
        client, store = await self._bucket.opened()
        made = (await self._bucket.answered(store.status(), CALL)).stream_info.created
        if self._made not in (None, made):
            log.warning(
                "registry bucket replaced",
                reason="another one is there; revocations known from the former one still hold",
            )
            for copy in (self._revoked, self._users):
                copy.update({token: Value(value.data, 0) for token, value in copy.items()})
        self._made = made
        watch = await self._bucket.answered(self._bucket.watch(store, "cluster.>"), CALL)
        until = self._monotonic() + FOLLOW
        fresh: dict[str, Value] | None = {}
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
                    self._bucket.contact = self._monotonic()
                    continue
                key, value = found
                _, token, kind = key.split(".")
                if kind == "revoked":
                    self._held(token, value)
                elif kind == "binding":
                    (self._bindings if fresh is None else fresh)[token] = value
        finally:
            await watch.stop()

    async def _changing(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Run `attempt`, again whenever another relay was faster; each time it reads and judges anew."""
        until = self._monotonic() + CHANGE
        pause = PAUSES[0]
        while True:
            try:
                return await attempt()
            except Faster:
                if self._monotonic() > until:
                    raise RegistryUnavailable("too many changes at once in the registry: try again") from None
                await asyncio.sleep(random.uniform(0, pause))
                pause = min(2 * pause, PAUSES[1])


async def _known_token(bucket: Bucket, token: JoinToken) -> tuple[dict[str, Any], int]:
    """Return what is stored of a token, and the revision. An unknown id costs the same comparison as a wrong
    secret, and gets the same answer."""
    found, revision = await bucket.read(f"token.{token.id}")
    if not token.matches("0" * 64 if found is None else found["secret_hash"]) or found is None:
        raise EnrolmentRefused(base.UNKNOWN_TOKEN)
    return found, revision


def _changes_of(
    taken_back: Mapping[str, Value], revoked: Mapping[str, Value], users: Mapping[str, Value]
) -> dict[tuple[str, str], AccessChange]:
    """Return what was said last of each name, by the copies: of clusters by subject token, of users by hash."""
    entries = {key: data for key, (data, _) in taken_back.items()}
    entries |= {f"cluster.{token}.revoked": data for token, (data, _) in revoked.items()}
    entries |= {f"user.{digest}": data for digest, (data, _) in users.items()}
    return _changes_in(entries)


def _changes_in(entries: Mapping[str, Mapping[str, Any] | None]) -> dict[tuple[str, str], AccessChange]:
    """Return what was said last of each name, by the keys of the bucket and what they hold."""
    found: list[AccessChange] = []
    for key, data in entries.items():
        kind, _, rest = key.partition(".")
        if data is None:
            continue
        if kind == "back":
            found.append(AccessChange(data["kind"], data["name"], data["at"]))
        elif kind == "user":
            found.append(AccessChange("user", data["user"], data["revoked"], data["before"], data["reason"]))
        elif kind == "cluster" and rest.endswith(".revoked"):
            name = rest.removesuffix(".revoked").replace("_", ".")
            found.append(AccessChange("cluster", name, data["at"], 1))
    return {(one.kind, one.name): one for one in sorted(found, key=lambda one: one.at)}


def _put_into(entries: dict[str, dict[str, Any]], change: AccessChange) -> None:
    """Put a change in force in entries that are not written yet."""
    back, (key, data) = _back_key(change.kind, change.name), _entry(change)
    for one in (back, key):
        entries.pop(one, None)
    if change.before:
        entries[key] = data
    else:
        entries[back] = {"kind": change.kind, "name": change.name, "at": change.at}


def _back_key(kind: str, name: str) -> str:
    """Return the key of what was taken back."""
    return f"back.{_digest(f'{kind}.{name}')}"


def _entry(change: AccessChange) -> tuple[str, dict[str, Any]]:
    """Return the key of a revocation, and what it holds."""
    if change.kind == "user":
        data = {"user": change.name, "before": change.before, "reason": change.reason, "revoked": change.at}
        return f"user.{_digest(change.name)}", data
    return f"cluster.{subject_token(change.name)}.revoked", {"at": change.at}


async def _drop_expired(bucket: Bucket, now: float) -> None:
    """Housekeeping of who makes tokens; the new one stands, whatever comes of it."""
    try:
        for key, value in (await bucket.read_all("token.>")).items():
            if value.data is not None and value.data["expires_at"] < now - base.KEEP_EXPIRED:
                await bucket.remove(key)
    except RegistryUnavailable as error:
        log.warning("long expired join tokens not removed", reason=error.message)


async def _taken_back_at(bucket: Bucket, kind: str, name: str) -> float | None:
    """Return when a revocation was taken back; None: none was, or there is another one since."""
    known = (await bucket.read(_back_key(kind, name))).data
    return None if known is None else float(known["at"])


async def _forget_taken_back(bucket: Bucket, kind: str, name: str, at: float) -> None:
    """Forget that a revocation was taken back, for the one of this time is written. Not before: an attempt in which
    another relay was faster is made again, and has to be later than that, too."""
    known = await _taken_back_at(bucket, kind, name)
    if known is not None and known < at:
        await bucket.remove(_back_key(kind, name))


async def _note_taken_back(bucket: Bucket, kind: str, name: str, revoked: float, at: float) -> None:
    """Remember that a revocation of this time, 0 for none, is taken back."""
    if revoked:
        await _write_taken_back(bucket, kind, name, base.later(at, revoked))
        await _prune_taken_back(bucket)


async def _write_taken_back(bucket: Bucket, kind: str, name: str, at: float) -> None:
    key = _back_key(kind, name)
    await bucket.write(key, {"kind": kind, "name": name, "at": at}, (await bucket.read(key)).revision)


async def _prune_taken_back(bucket: Bucket) -> None:
    """Forget the oldest of what was taken back, where there is too much: it reads all of it."""
    known = [(one.data["at"], key) for key, one in (await bucket.read_all("back.>")).items() if one.data]
    for _, key in sorted(known)[: -base.MAX_TAKEN_BACK]:
        await bucket.remove(key)


async def _is_bound(bucket: Bucket, token: str) -> bool:
    """Return whether the cluster has a binding, be it a malformed one: who revokes or deletes must not need it."""
    try:
        return (await bucket.read(f"cluster.{token}.binding")).data is not None
    except Malformed:
        return True


def _take(copy: dict[str, Value], token: str, found: Value) -> Value:
    """Take over what was read of a revocation, unless the copy knows better; return what holds.

    A key that is missing says nothing (rule of the module), and neither does a revision older than a known one, as
    long as the bucket is the same; one that was made anew counts from 1 again, and there a revocation wins.
    """
    known = copy.get(token, NOTHING)
    if found.revision and (found.revision >= known.revision or (found.data is not None and known.data is None)):
        copy[token] = known = found
    return known


def _user(data: Mapping[str, Any]) -> UserRevocation:
    return UserRevocation(data["user"], data["before"], data["reason"], data["revoked"])


def _digest(user: str) -> str:
    """Return a user as part of a key, for which only some characters may be used."""
    return hashlib.sha256(user.encode()).hexdigest()[:40]


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
        revoked=revoked,
        valid_since=binding["valid_since"],
        keys=_keys(binding),
        cas=binding.get("cas") or "",
    )


def _keys(binding: Mapping[str, Any] | None) -> generations.Keys:
    """Return what a binding holds of keys; one that was written by a relay that counts nothing has nothing of them."""
    return generations.from_json((binding or {}).get("keys", {}))
