"""The registry: what a relay must remember. Clusters, join tokens, revocations of clusters and of users' logins; never
a session, never a secret.

One interface, engines side by side (SQLite for one relay), one suite that all of them pass
(`tests/relay/registry/conformance.py`). What every engine promises:

1. A change is whole or absent, whatever dies in the middle, and lasts once its call has returned (`seen` alone may
   be forgotten in a power cut).
2. A join token of N uses enrols exactly N keys, however many relays redeem it at once (docs/threats.md#E1). The key
   that used it may use it again for ten minutes, because its answer may have been lost on the way
   (docs/threats.md#E2).
3. The first enrolment binds a cluster's name to the key of that cluster's CA (docs/threats.md#E5). Later enrolments
   need the same key, or one that succeeded it (`succeed`), so a lapsed cluster comes back as itself with a new join
   token, and no other can take its name. A name that is not bound may be *adopted* instead; one that is bound, or
   revoked, never is.
4. Of a join token only the SHA-256 of its secret is kept; comparing takes the same time whatever matches
   (docs/threats.md#E9).
5. When it cannot answer it says so with `RegistryUnavailable`. Nothing fails open.
6. A generation of an agent's certificate is renewed once: counting is atomic, and a second renewal with another request
   revokes the cluster (`registry.generations`, docs/threats.md#E11).
7. A cluster that is not known can be revoked too: its name is kept, and neither redeemed nor adopted
   (docs/threats.md#E12).
8. A user's revocation holds until the operator takes it back, or until no token that it refuses can still be valid: an
   entry goes when room is made for another one and `KEEP_REVOKED` has passed since its time. The list is bounded, for
   each agent is sent all of it (docs/protocol.md, "Revocations"); a full one refuses the next entry in words.

Times are unix seconds. Cluster names are canonical (`pki.names`); any other raises `ConfigError`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal, NamedTuple, Protocol

from arcbridge.errors import ArcbridgeError, ConfigError, EnrolmentRefused, StateError
from arcbridge.identity.names import is_plain
from arcbridge.pki.authority import (
    agent_ca_pin,
    agent_generation,
    agent_issued_at,
    agent_key_hash,
    check_ca_certificate,
)
from arcbridge.pki.names import check_cluster_name
from arcbridge.pki.pins import pin_of, same_pin
from arcbridge.pki.succession import Succession
from arcbridge.relay.registry.generations import Keys, ShownCertificate, check_generation
from arcbridge.wire.records import CaSuccession

REDEEM_AGAIN = 600.0
"""Seconds in which the same key may redeem its token again: long enough for an agent to restart and retry, short
enough that a leaked old token is of no use to who does not hold that key anyway."""

MAX_USES = 10_000
"""Uses of one join token. More is not a token but a password; make several."""

KEEP_EXPIRED = 30 * 86400.0
"""Seconds for which an expired join token stays in the list, so that an operator can see what became of it."""

MAX_REVOKED_USERS = 10_000
"""Users whose logins are revoked, at once; some 0.6 MB at each control connection of an agent when it begins."""

KEEP_REVOKED = 401 * 86400.0
"""Seconds behind the time of a user's revocation after which its entry may go. Every token that it refuses has lapsed
by then, because relay and agent take none that is valid for longer than 400 days (`identity.verifier.MAX_LIFETIME`).
Only an entry whose user begins with `system:` stays: it is about a ServiceAccount, whose tokens may have no end."""

MAX_USER = 2048
"""Bytes of a user name, or of a subject, which an issuer's URL begins."""

MAX_REASON = 200
"""Characters of the reason for a revocation."""

NOT_ENROLLED = "this cluster is not enrolled here: enrol with a new join token"

REVOKED = "this cluster is revoked: the relay's operator has to restore it first"

MAX_VERSION = 64
"""Printable characters of an agent's version that are kept and shown (docs/threats.md#O2)."""


class RegistryUnavailable(ArcbridgeError):
    """The registry cannot answer now (locked, disk full, read-only, gone); worth trying again."""

    status_code = 503
    reason = "ServiceUnavailable"

    def __init__(self, message: str, *, retry_after: int | None = 5) -> None:
        super().__init__(message, retry_after=retry_after)


@dataclass(frozen=True, slots=True)
class ClusterRecord:
    """One enrolled cluster."""

    name: str
    ca_pem: str
    """The certificate of the cluster's own CA, exactly one."""
    ca_pin: str
    created: float
    last_seen: float = 0.0
    """0: never connected."""
    certificate_expires: float = 0.0
    """When the agents' newest certificate lapses; 0: none was issued yet."""
    version: str = ""
    """The agent's version at its last connection."""
    revoked: float = 0.0
    """When it was revoked; 0: it is not."""
    valid_since: float = 0.0
    """Agents' certificates from before this do not count: the name has gone over to another cluster CA since."""
    keys: Keys = field(default_factory=dict)
    """What is held of the agents' keys: how often each one's certificate was renewed."""
    cas: str = ""
    """The CAs that followed each other there (`pki.succession`), `ca_pem` among them; empty: it was never rotated."""

    @property
    def succession(self) -> Succession:
        with contextlib.suppress(ConfigError):  # one that cannot be read: agents announce it again
            if self.cas:
                return Succession.read(self.cas, own=True)
        return Succession.of_ca(self.ca_pem)

    @property
    def newest_ca_pin(self) -> str:
        """Pin of the newest of the cluster's CAs."""
        return self.succession.pins[-1] if self.cas else self.ca_pin


@dataclass(frozen=True, slots=True)
class JoinTokenRecord:
    """What may be shown of a join token."""

    id: str
    cluster: str
    uses: int
    used: int
    created: float
    expires_at: float
    rebind: bool = False
    """Whether it lets the cluster come back with another CA."""


@dataclass(frozen=True, slots=True)
class UserRevocation:
    """Logins of one user that count no more."""

    user: str
    """A user name as the policy has it, or a subject (`ISSUER#SUB`)."""
    before: int
    """Unix seconds: tokens that were issued before count no more. It may lie ahead."""
    reason: str = ""
    """Shown to the user; may be empty."""
    revoked: float = 0.0
    """When the operator said so, unix seconds."""


class AccessChange(NamedTuple):
    """What was said last of a user's or a cluster's access. Of two about one name the later one holds."""

    kind: Literal["user", "cluster"]
    name: str
    at: float
    """When it was said, unix seconds; each later one of a name has a later time, also where the clock was set back."""
    before: int = 0
    """Tokens of the user that were issued before count no more; of a cluster that is revoked 1; 0: it was taken back.
    """
    reason: str = ""


MAX_TAKEN_BACK: Final = 10_000
"""Revocations that were taken back and are remembered; the oldest go first."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """A registry that may lack revocations which were made before."""

    cause: str
    """`restored` from a backup, `lost`, or `older`: agents have brought later revocations than it has."""
    began: float
    """When that was found, unix seconds."""
    backup: float = 0.0
    """When the backup was made; 0: it is not known."""
    serving: float = 0.0
    """When a relay began to serve with it; 0: none has yet."""
    awaited: tuple[str, ...] = ()
    """Clusters whose agents have not said yet which revocations they know."""
    returned: int = 0
    """Revocations that came back from agents."""


class RegistrySnapshot(NamedTuple):
    """All that a registry holds at one moment, for a backup."""

    kind: str
    """`sqlite` or `nats`."""
    schema: int
    data: bytes


class Registry(Protocol):
    """See the module's docstring. Every method may raise `RegistryUnavailable`.

    When a call is cancelled, its change may still happen: read to find out.
    """

    # Join tokens.

    async def create_join_token(self, cluster: str, *, uses: int = 1, expires_at: float, rebind: bool = False) -> str:
        """Return a new join token for `cluster`, as text: shown once, never readable again. Raises `ConfigError`.

        `rebind` is the way back for a cluster that has lost its own CA: the next enrolment may bring another one.
        """

    async def list_join_tokens(self) -> list[JoinTokenRecord]:
        """Return all tokens, oldest first; used up and expired ones too, until `KEEP_EXPIRED` after their end."""

    async def delete_join_token(self, token_id: str) -> bool:
        """Void a token; False when there is none. Clusters that it enrolled stay."""

    async def redeem_join_token(self, text: str, key_hash: str, cluster_ca_pem: str) -> ClusterRecord:
        """Consume one use, or repeat the use of the same key, and bind the cluster; atomic.

        `key_hash` is `pki.enrolment.key_hash` of the request, `cluster_ca_pem` one checked certificate. Raises
        `EnrolmentRefused` for a token that is malformed, unknown, expired or used up, for a revoked cluster and for
        a foreign cluster CA; nothing is consumed then.
        """

    # Clusters.

    async def check_join_token(self, text: str) -> str:
        """Return the cluster of a join token that could be redeemed by another key now; changes nothing. Raises
        `EnrolmentRefused` as `redeem_join_token` does."""

    async def cluster(self, name: str) -> ClusterRecord | None:
        """Return the record of `name`, revoked or not; None when it never enrolled."""

    async def adopt(self, name: str, ca_pem: str, when: float) -> bool:
        """Bind `name` to this CA without a join token, as a record created at `when`; atomic.

        For a cluster that enrolled at another relay of the same CA: the caller has found the pin of `ca_pem`, one
        checked certificate, in a certificate that this CA signed for `name`. Only when no record is there: False when
        there is one, revoked or not, of this CA or another; that one stays as it is, so read it and judge it.
        """

    async def succeed(self, known: ClusterRecord, ca_pem: str, cas: str) -> bool:
        """Bind the name of `known` to this CA and these that followed each other; atomic.

        The caller has found in the signatures of `cas` that they follow those of `known`. False, and nothing is
        changed, where the cluster is bound in another way by now.
        """

    async def clusters(self) -> list[ClusterRecord]:
        """Return all records, by name."""

    async def certificate_issued(self, name: str, expires_at: float) -> None:
        """Note that an agent of `name` holds a certificate until then; a time earlier than the noted one is ignored."""

    async def renew(self, name: str, shown: ShownCertificate, request: str) -> int:
        """Count a renewal of the certificate that was shown; return the generation of the one to issue; atomic.

        `request` is the SHA-256 of a stored request, or `generations.OLDER_AGENT`. Raises `RenewedTwice` once the
        cluster is revoked for it, and `EnrolmentRefused`.
        """

    async def seen(self, name: str, when: float, *, version: str | None = None) -> None:
        """Note that an agent of `name` was connected at `when`; what is None stays. An unknown name is ignored."""

    async def revoke_cluster(self, name: str) -> bool:
        """Refuse the cluster's agents from now on; its record stays.

        False when it is not known here: then its name is kept, so that it cannot come to be known.
        """

    async def unrevoke_cluster(self, name: str) -> bool:
        """Take `revoke_cluster` back; False when there is neither such a cluster nor such a name.

        Certificates issued before count again, until they lapse; those of a key that was renewed twice do not.
        """

    async def delete_cluster(self, name: str) -> bool:
        """Forget a cluster and that it was revoked; return whether it was known. An agent of it that is still there is
        adopted again by its certificate."""

    async def revocations(self) -> frozenset[str]:
        """Return the names of the clusters that are revoked, known or not; cheap enough to ask every few seconds."""

    # Users.

    async def revoke_user(self, user: str, before: int, reason: str = "") -> UserRevocation:
        """Refuse the tokens of `user` that were issued before that time, from now on; return what holds then.

        Of two revocations of one user the later time holds, and the later reason that was given. Raises `ConfigError`
        for what cannot be kept, and `StateError` when the list is full.
        """

    async def restore_user(self, user: str) -> bool:
        """Take `revoke_user` back; False when the user is not revoked."""

    async def user_revocations(self) -> Mapping[str, UserRevocation]:
        """Return all of them, by user; cheap enough to ask every few seconds."""

    # What outlives the registry.

    async def access_changes(self) -> list[AccessChange]:
        """Return what was said last of each user's and cluster's access, what was taken back included."""

    async def merge(self, changes: Iterable[AccessChange]) -> list[AccessChange]:
        """Take over what another copy of this registry knows, where `merged` says that it is news; return that."""

    async def recovery(self) -> Recovery | None:
        """Return the recovery that is under way; None: there is none."""

    async def change_recovery(self, change: Callable[[Recovery | None], Recovery | None]) -> Recovery | None:
        """Keep what `change` makes of the recovery that is under way, None for none; return it; atomic."""

    async def snapshot(self) -> RegistrySnapshot:
        """Return all of it, as it was at one moment, while others change it."""

    async def replace(self, data: bytes, recovery: Recovery, former: Iterable[AccessChange] = ()) -> list[AccessChange]:
        """Put the data of a snapshot in the place of all that is there, without its join tokens: one of them may have
        been used since. All clusters of the snapshot are awaited then. What the snapshot lacks of `former` is merged
        with it before anything is replaced; return that. Raises `StateError` for what is no snapshot, or of a newer
        arcbridge; then nothing is changed.
        """

    async def close(self) -> None:
        """Finish what was asked and let go; a call after that raises `RegistryUnavailable`."""


def check_join_token(cluster: str, uses: int, expires_at: float, now: float, *, rebind: bool) -> None:
    """Raise `ConfigError` unless a join token may be made with these."""
    check_cluster_name(cluster)
    if not 1 <= uses <= MAX_USES:
        raise ConfigError(f"a join token has 1 to {MAX_USES} uses")
    if rebind and uses != 1:
        raise ConfigError("a join token that lets a cluster come back with another CA has exactly one use")
    if not now < expires_at < math.inf:
        raise ConfigError("a join token must expire in the future")


def check_user(user: str) -> str:
    """Return `user`, or raise `ConfigError` unless it can be a user name or a subject."""
    if not is_plain(user, MAX_USER):
        raise ConfigError(
            f"a user is a user name as the policy has it, or ISSUER#SUBJECT: at most {MAX_USER} bytes, without blanks "
            "at its ends and without invisible characters"
        )
    return user


def check_revocation(user: str, before: int, reason: str) -> None:
    """Raise `ConfigError` unless a user's revocation may be kept."""
    check_user(user)
    if not 0 < before < 1 << 53:
        raise ConfigError("the time of a revocation lies after 1970 and within the reach of a calendar")
    if len(reason) > MAX_REASON or not reason.isprintable():
        raise ConfigError(f"the reason for a revocation has at most {MAX_REASON} printable characters")


def added(known: UserRevocation | None, new: UserRevocation) -> UserRevocation:
    """Return what holds when a user who was revoked as `known` is revoked again."""
    if known is None:
        return new
    return replace(new, before=max(known.before, new.before), reason=new.reason or known.reason)


def merged(known: AccessChange | None, new: AccessChange, now: float) -> AccessChange | None:
    """Return what holds from now on where another copy of the registry knows `new`; None: what is known holds.

    Of two revocations the one that refuses more tokens holds. What refuses no valid token any more is no news.
    """
    if known is None:
        return None if new.kind == "user" and may_go(_user_of(new), now) else new
    if known.before and new.before:
        before = max(known.before, new.before)
        latest = max(known, new, key=lambda one: one.at)
        return latest._replace(before=before) if (before, latest.at) != (known.before, known.at) else None
    return new if new.at > known.at else None


def news_of(
    known: dict[tuple[str, str], AccessChange], changes: Iterable[AccessChange], now: float
) -> list[AccessChange]:
    """Return what of the changes holds from now on besides what is known, by kind and name, and add it to that."""
    news = []
    for change in changes:
        found = merged(known.get((change.kind, change.name)), change, now)
        if found is not None:
            known[found.kind, found.name] = found
            news.append(found)
    return news


def later(now: float, former: float | None) -> float:
    """Return the time of what is said now of a name of which something was said at `former`: a later one, always."""
    return now if former is None else max(now, former + 0.001)


def change_of(stored: object) -> AccessChange | None:
    """Read a change of which a relay has made JSON; None for one that this version does not know. A newer one may
    have more behind it."""
    match stored:
        case [("user" | "cluster") as kind, str(name), int() | float() as at, int(before), str(reason), *_]:
            return AccessChange(kind, name, at, before, reason)
    return None


def recovery_of(stored: Mapping[str, Any]) -> Recovery:
    """Read what a relay has stored of a recovery as JSON; a newer one may have stored more."""
    known = {one.name: stored[one.name] for one in fields(Recovery) if one.name in stored}
    return Recovery(**{**known, "awaited": tuple(stored["awaited"])})


def _user_of(change: AccessChange) -> UserRevocation:
    return UserRevocation(change.name, change.before or math.ceil(change.at), change.reason, change.at)


def may_go(entry: UserRevocation, now: float) -> bool:
    """Return whether no token that the entry refuses can be valid any more."""
    return entry.before + KEEP_REVOKED < now and not entry.user.startswith("system:")


def full() -> StateError:
    """Return what an operator hears whose revocation has no place in the list."""
    return StateError(
        f"{MAX_REVOKED_USERS} users are revoked, and no more can be: restore those who have no valid token left "
        "('user list' shows since when each is revoked), or take the user out of the policy"
    )


UNKNOWN_TOKEN = "the join token is not known here: ask the relay's operator for a new one"
"""What an agent hears whose join token has an unknown id, or a wrong secret: one answer for both."""


def spent(used: int, uses: int, expires_at: float, now: float) -> str:
    """Return why a join token cannot be used any more; empty when it can."""
    if now >= expires_at:
        return "the join token has expired: ask the relay's operator for a new one"
    return "the join token is used up: ask the relay's operator for a new one" if used >= uses else ""


class ForeignCa(EnrolmentRefused):
    """A certificate states another CA of its cluster than the registry knows."""


def foreign_ca(known_pin: str, pin: str) -> str:
    """Return what an agent hears whose cluster's name is bound to another CA."""
    return (
        f"this cluster's name belongs to another cluster CA: expected {known_pin}, found {pin}. Restore the agent's "
        "stored credential, choose another name, or have the operator make a join token with --rebind"
    )


def admit(record: ClusterRecord | None, certificate_der: bytes) -> ClusterRecord:
    """Return `record` if an agent with this certificate may act for it, else raise `EnrolmentRefused`.

    `record` is what the registry has for the cluster that the certificate names; TLS has verified the certificate.
    Asked at each control connection, each join of an agent and each renewal. It is `ForeignCa` where all is right but
    the cluster's CA, which may have been rotated while this relay was away.
    """
    if record is None:
        raise EnrolmentRefused(NOT_ENROLLED)
    if record.revoked:
        raise EnrolmentRefused(REVOKED)
    check_generation(record.keys, agent_key_hash(certificate_der), agent_generation(certificate_der))
    # Two seconds: X.509 has whole seconds, and a certificate is issued just after its redemption.
    if agent_issued_at(certificate_der) + 2 < record.valid_since:
        raise EnrolmentRefused("this cluster's name belongs to another cluster CA now: enrol with a new join token")
    # Two relays over one CA may have bound one name to two clusters, each with a join token of its own.
    pin = agent_ca_pin(certificate_der)
    # Also a retired one: the certificate was issued before, to this cluster, and its renewal states the present one.
    if pin and not is_bound_to(record.ca_pin, record.cas, pin, retired=True):
        raise ForeignCa(
            f"this cluster's name belongs to another cluster CA at this relay: expected {record.ca_pin}, the agent's "
            f"certificate states {pin}. Enrol under another name, or have the operator make a join token with --rebind "
            "at this relay"
        )
    return record


async def follow_cluster_ca(registry: Registry, name: str, announced: CaSuccession) -> str:
    """Take over what an agent of a cluster announces of the cluster's CAs; return the pin of the newest one where
    anything is another now, else an empty text.

    Raises `ConfigError`, `EnrolmentRefused` or `PinMismatch` for what the cluster's present CA has not signed, and
    `RegistryUnavailable`.
    """
    known = await registry.cluster(name)
    if known is None or known.cas == announced.cas:
        return ""
    found = Succession.read(announced.cas)
    followed = known.succession.follow(found, f"the CA of cluster {name}", retire=True)
    oldest = check_ca_certificate(announced.oldest)
    if followed.pins[followed.since] != pin_of(oldest):
        oldest = known.ca_pem  # an agent that has not yet read the last step
    if followed == known.succession or followed.pins[followed.since] != pin_of(oldest):
        return ""
    if not await registry.succeed(known, oldest, followed.text):
        raise RegistryUnavailable("the cluster was bound in another way meanwhile")
    return followed.pins[-1]


def is_bound_to(ca_pin: str, cas: str, pin: str, *, retired: bool = False) -> bool:
    """Return whether a name that is bound to `ca_pin`, and to those in `cas`, is bound to `pin`; `retired`: also to one
    that counts no more."""
    with contextlib.suppress(ConfigError):  # as in `ClusterRecord.succession`
        if same_pin(ca_pin, pin) or not cas:
            return same_pin(ca_pin, pin)
        known = Succession.read(cas, own=True)
        return pin in known.pins[0 if retired else known.since :]
    return False


def cluster_state(record: ClusterRecord, agents: int, now: float) -> str:
    """Return the state. Connected: an agent is there. Connecting: enrolled, and none was there yet. Expired: none is
    there, and the certificate has lapsed, so none will be without a new join token. Offline: none is there."""
    if agents > 0:
        return "Connected"
    if 0 < record.certificate_expires <= now:
        return "Expired"
    return "Offline" if record.last_seen > 0 or record.revoked else "Connecting"
