"""Bodies of the frames that are not plain numbers: small typed records.

A record is a sequence of fields, each `tag (u8) | length (u24, big endian) | value`. Integers are unsigned, big
endian, of the least length; texts are UTF-8; absent means the field's default. A reader skips tags that it does not
know, so a later version may add fields; a tag given twice, a truncated field, a text that is not UTF-8 or an integer
of more than 8 bytes is an error of the peer. The relay's JOIN messages use the same records.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple, Self

from arcbridge.errors import RemoteProtocolError

MAX_RECORD = 80 * 1024
"""Largest record anywhere (a JOIN with a 64 KiB token)."""
_HEAD = struct.Struct(">I")
"""A field's tag (u8) and length (u24)."""


class Record:
    """Base of the records; subclasses are dataclasses.

    Their fields have the tags 1, 2, … in order: a new one is the last. A field that no log may have is left out of the
    text of its record (`repr=False`).
    """

    __slots__ = ()
    strict: ClassVar[bool] = False
    """Whether a tag that is not known is an error: of a record that takes rights away, none may be skipped."""

    def encode(self) -> bytes:
        """Return the record's bytes; fields that equal their default are left out."""
        out = bytearray()
        table = _table(type(self))
        for tag, value in enumerate(table.values(self), 1):
            _, kind, default = table.fields[tag]
            if value == default:
                continue
            if kind is str:
                raw = value.encode()
            elif kind is bytes:
                raw = bytes(value)
            else:
                raw = int(value).to_bytes((int(value).bit_length() + 7) // 8 or 1, "big")
            out += _HEAD.pack(tag << 24 | len(raw)) + raw
        return bytes(out)

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Self:
        """Read a record from its bytes. Raises `RemoteProtocolError` without quoting what was received."""
        known = _table(cls).fields
        values: dict[str, object] = {}
        seen = 0  # a bit for each tag
        at, end = 0, len(data)
        while at < end:
            if end - at < 4:
                raise RemoteProtocolError(f"a {cls.__name__} record ends inside a field's header")
            (head,) = _HEAD.unpack_from(data, at)
            tag, length = head >> 24, head & 0xFFFFFF
            at += 4
            if length > end - at:
                raise RemoteProtocolError(f"a {cls.__name__} record ends inside field {tag}")
            if seen >> tag & 1:
                raise RemoteProtocolError(f"a {cls.__name__} record has field {tag} twice")
            seen |= 1 << tag
            if tag in known:
                name, kind, _ = known[tag]
                raw = bytes(data[at : at + length])
                if kind is bytes:
                    values[name] = raw
                elif kind is bool:
                    values[name] = raw not in (b"", b"\0")
                elif kind is int:
                    if length > 8:
                        raise RemoteProtocolError(
                            f"field {tag} of a {cls.__name__} record is an integer of more than 8 bytes"
                        )
                    values[name] = int.from_bytes(raw, "big")
                else:
                    try:
                        values[name] = raw.decode()
                    except UnicodeDecodeError as error:
                        raise RemoteProtocolError(f"field {tag} of a {cls.__name__} record is not UTF-8") from error
            elif cls.strict:
                raise RemoteProtocolError(f"field {tag} of a {cls.__name__} record is not known here")
            at += length
        return cls(**values)


class _Table(NamedTuple):
    """What is known of a kind of record."""

    fields: dict[int, tuple[str, type, object]]
    """Name, type and default of each field, by tag."""
    values: Callable[[Record], tuple[Any, ...]]
    """Returns the values of all fields, in the order of their tags."""


_tables: dict[type, _Table] = {}


def _table(kind: type[Record]) -> _Table:
    """Return what is known of a kind of record; looked up once for each, because every stream that opens asks."""
    table = _tables.get(kind)
    if table is None:
        specs = fields(kind)  # type: ignore[arg-type]  # subclasses are dataclasses
        known = {tag: (spec.name, type(spec.default), spec.default) for tag, spec in enumerate(specs, 1)}
        names = [spec.name for spec in specs]
        # A getter of one name returns no tuple.
        one = attrgetter(names[0])
        values = attrgetter(*names) if len(names) > 1 else lambda record: (one(record),)
        table = _tables[kind] = _Table(known, values)
    return table


@dataclass(frozen=True, slots=True)
class Hello(Record):
    """First frame of each connection, in both directions.

    `version` is the highest the sender speaks, `least` the lowest. `features` are space-separated words; an unknown
    one is ignored. `stream_window` is the credit (bytes) with which every stream towards the sender starts,
    `max_streams` how many the peer may have open at once. `agent` is the instance id of an agent (empty elsewhere),
    `software` a version for people.

    With `session_id` the connection resumes a session: the initiator proves by `resume_secret` that it is its own,
    `received` and `sent` say how much of the session's byte sequences this end has and has sent, and `epoch` is higher
    than that of every connection before. The acceptor's answer has the same but for the secret. `cluster_ca` is the
    PEM of an agent's cluster CA: on a control connection the one of its certificate, on a session, where the CA was
    ever rotated, the oldest one that counts. `join_id` is a client's: the join that it was told of; the
    agent refuses another one than its own, because the relay has then crossed two joins (docs/threats.md#B2).
    """

    version: int = 0
    least: int = 0
    features: str = ""
    stream_window: int = 0
    max_streams: int = 0
    agent: str = ""
    software: str = ""
    session_id: bytes = b""
    resume_secret: bytes = field(default=b"", repr=False)
    received: int = 0
    sent: int = 0
    epoch: int = 0
    cluster_ca: str = field(default="", repr=False)
    join_id: str = ""


@dataclass(frozen=True, slots=True)
class Auth(Record):
    """The caller's token: `oidc` (verified by the agent) or `bearer` (the API server judges it).

    `proof` shows that the caller holds the key to which the token is bound (`identity.proof`); empty for others.
    `restrictions` is a `Restrictions` record, and `kind` begins with RESTRICTED then: an agent that does not know it
    refuses the kind, where it would skip the field.
    """

    kind: str = "oidc"
    token: str = field(default="", repr=False)
    proof: str = field(default="", repr=False)
    restrictions: bytes = b""


RESTRICTIONS_FEATURE = "restrictions"
"""The word in an agent's HELLO by which a client sees that the agent knows restrictions."""
RESTRICTED = "restricted-"
"""What the kind of an `Auth` with restrictions begins with."""


@dataclass(frozen=True, slots=True)
class Restrictions(Record):
    """What a session gives up of its user's rights. Lists are separated by spaces; an empty one restricts nothing."""

    strict: ClassVar[bool] = True

    read_only: bool = False
    no_secrets: bool = False
    namespaces: str = ""
    verbs: str = ""
    until: int = 0
    """Unix seconds at which the session ends; 0: as any other."""

    def words(self) -> tuple[str, ...]:
        """Return each restriction as a word, for people and for records: `read-only`, `namespaces=shop,web`."""
        found = ["read-only"] * self.read_only + ["no-secrets"] * self.no_secrets
        found += [f"{name}={','.join(value.split())}" for name, value in self._lists() if value]
        return (*found, *([f"until={self.until}"] if self.until else ()))

    def kinds(self) -> tuple[str, ...]:
        """Return the words without their values."""
        return tuple(word.partition("=")[0] for word in self.words())

    def _lists(self) -> tuple[tuple[str, str], ...]:
        return ("namespaces", self.namespaces), ("verbs", self.verbs)


UNRESTRICTED = Restrictions()
RESTRICTION_KINDS = ("read-only", "no-secrets", "namespaces", "verbs", "until")
"""All that `Restrictions.kinds` may return."""
RESTRICTION_VERBS = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")
"""The verbs that `Restrictions.verbs` may have."""
MOST_NAMESPACES = 32
"""Namespaces of one session: each of its records and requests names them."""
NAMESPACE_NAME = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
"""The form of each (an RFC 1123 label)."""


@dataclass(frozen=True, slots=True)
class AuthOk(Record):
    """The agent's consent. `subject` is the user's name in the cluster; `expires_in` is in seconds.

    `targets` are those that the user may open now, separated by spaces, as `Open` names them. An empty text says
    nothing about them: it comes from an older agent, or from one whose list has no room in the frame.
    """

    session_id: bytes = b""
    resume_secret: bytes = field(default=b"", repr=False)
    subject: str = ""
    expires_in: int = 0
    targets: str = ""


@dataclass(frozen=True, slots=True)
class Open(Record):
    """A new stream's target: `kubernetes`, or `tcp:NAME` of the agent's allow-list."""

    target: str = ""


@dataclass(frozen=True, slots=True)
class Goaway(Record):
    """Nothing new after stream `last_stream`; `retry_after` in seconds, 0 for no advice.

    `final`: the session is over, whatever the code; there is nothing left to finish or to resume. `rule` and `wanted`
    are those of a `Refusal`, by which the peer decides; `message` is for people.
    """

    last_stream: int = 0
    code: int = 0
    message: str = ""
    retry_after: int = 0
    final: bool = False
    rule: str = ""
    wanted: str = ""


@dataclass(frozen=True, slots=True)
class Move(Record):
    """The connection that was made under `join_id` goes away soon: resume through another one."""

    join_id: str = ""


@dataclass(frozen=True, slots=True)
class Dial(Record):
    """The relay asks an agent to join `address` under `token` within `deadline` seconds.

    `instance` is the agent instance that a client wants back (empty: any); `hops` counts relays passed.
    """

    token: str = field(default="", repr=False)
    address: str = ""
    cluster: str = ""
    join_id: str = ""
    instance: str = ""
    deadline: int = 0
    hops: int = 0


@dataclass(frozen=True, slots=True)
class Status(Record):
    """The agent's answer to a dial request (`token`, `code`, `message`), or its report on itself (`instance`, and all
    behind it).

    `unready` has the names of the readiness checks that fail, separated by spaces. `checks` are its self-checks,
    separated by spaces: the name alone of one that passes, `name:code` of one that fails. `sessions` are those that it
    serves, `round_trip` is that of this connection in microseconds, 0 while none was measured. `relay_ca` is the pin of
    the newest of the relay's CAs that the agent knows, `certificate_ca` that of the one by which its certificate is,
    `cluster_ca` that of the newest of its cluster's CAs. An older agent reports `ready` alone.
    """

    token: str = field(default="", repr=False)
    code: int = 0
    message: str = ""
    instance: str = ""
    ready: bool = False
    unready: str = ""
    checks: str = ""
    sessions: int = 0
    round_trip: int = 0
    relay_ca: str = ""
    certificate_ca: str = ""
    cluster_ca: str = ""


@dataclass(frozen=True, slots=True)
class Revoke(Record):
    """The relay's revocation of one user.

    `user` is a username or a subject. The user's tokens that were issued before `before` (unix seconds) count no more;
    0: the revocation is taken back. `first` marks the first frame of a connection: what the relay said on the
    connection before is void, and with an empty `user` its list is empty. `reason` is shown to the user.

    With a `session`, the join id of one, and no user: that session alone ends, and no list is changed. An agent that
    does not know the field reads a revocation of no user.
    """

    user: str = ""
    before: int = 0
    first: bool = False
    reason: str = ""
    session: str = ""


@dataclass(frozen=True, slots=True)
class Ledger(Record):
    """Sealed entries of a relay's ledger of revocations, which an agent keeps and gives back (`wire.ledger`).

    An agent begins with the `digest` of what it holds of this relay. With `wanted` the relay asks for all of it; the
    agent's frame with `last` ends it. The relay's `entries` replace those of the same id, and with `first` all others.
    """

    entries: bytes = field(default=b"", repr=False)
    digest: bytes = b""
    wanted: bool = False
    first: bool = False
    last: bool = False


@dataclass(frozen=True, slots=True)
class CaSuccession(Record):
    """The CAs of the sender, a relay's own or those of an agent's cluster, as `pki.succession` writes them.

    `oldest` is the certificate (PEM), over its own key, of the oldest one that counts.
    """

    cas: str = field(default="", repr=False)
    oldest: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class JoinRequest(Record):
    """JOIN of either end: `role` is `client` (token: access token) or `agent` (token: the dial request's).

    `proof` is a client's, as in `Auth`. `first_session` is a client's, too: the join id under which the session began
    that it resumes, for logs alone. `round_trip` is an agent's: microseconds between it and the relay, as it has
    measured them; 0 while it has not. `restricted` is a client's: the kinds of the session's restrictions, by the
    client's word, for the relay's operators: which namespaces, the agent alone learns. `relay_ca` is a client's that
    has followed the relay's CA to another one: the pin of the newest that it keeps.
    """

    role: str = ""
    cluster: str = ""
    token: str = field(default="", repr=False)
    instance: str = ""
    version: str = ""
    hops: int = 0
    proof: str = field(default="", repr=False)
    first_session: str = ""
    round_trip: int = 0
    restricted: str = ""
    relay_ca: str = ""


@dataclass(frozen=True, slots=True)
class JoinReply(Record):
    """The relay's answer: `code` is a `net.join.JoinCode`; `cluster_ca` (PEM) is to be checked against a pin.

    `rule` and `wanted` are those of a `Refusal`, as in `Goaway`; so are `groups`, one a line, and `more_groups`.
    `relay_cas` and `cluster_cas` are the relay's own CAs and the cluster's (`pki.succession`), where they were ever
    rotated. `agent_round_trip` is what the agent of this join has said of its `round_trip`, microseconds; 0: nothing.
    """

    code: int = 0
    message: str = ""
    retry_after: int = 0
    join_id: str = ""
    cluster_ca: str = ""
    subject: str = ""
    rule: str = ""
    wanted: str = ""
    groups: str = ""
    more_groups: int = 0
    relay_cas: str = field(default="", repr=False)
    cluster_cas: str = field(default="", repr=False)
    agent_round_trip: int = 0
