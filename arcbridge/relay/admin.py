"""Does what an operator wants of a relay: join tokens, clusters and users' logins, while the relay runs or before it
does.

Commands on the relay's machine work on the registry in the data directory, or on the fleet's in NATS (`at`). The relay
sees a new token at once and a revocation within seconds; nothing has to be restarted and no port of the relay is
involved. A user who can write that directory, or that bucket, is the operator. What only the relay that runs can know
(sessions, connected agents) is asked through its `admin_socket`.

Every function returns plain data, with times in unix seconds; the command line (`arcbridge.cli.relay`) prints it.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial

from arcbridge.errors import ConfigError, StateError
from arcbridge.identity.policy import EVERY_CLUSTER
from arcbridge.net.address import parse_address
from arcbridge.net.join import JOIN_ID
from arcbridge.pki.authority import Authority
from arcbridge.pki.names import check_cluster_name
from arcbridge.pki.new_token import NewToken, api_server_arguments
from arcbridge.relay.admin_socket import ask
from arcbridge.relay.audit.commands import acting
from arcbridge.relay.backend import registry_of
from arcbridge.relay.data_dir import is_locked, open_authority
from arcbridge.relay.operations import Question, Row
from arcbridge.relay.recovery_words import recovery_words
from arcbridge.relay.registry.base import ClusterRecord, Registry, UserRevocation, cluster_state
from arcbridge.settings.config import RelayConfig
from arcbridge.settings.config_loader import parse_duration
from arcbridge.units import rfc3339

DEFAULT_TTL = 3600.0
"""Seconds: long enough to walk over to the cluster, short enough that a forgotten token does not matter."""

MAX_TTL = 366 * 86400.0

PIN_SHOWN = len("sha256:") + 12
"""Characters of the pin of a relay's CA that are shown in a table."""

TURN = 100
"""Clusters that are worked out in one turn of the loop."""

SEEN_RECENTLY = 150.0
"""Seconds. Where no relay runs here that can be asked who is connected, what relays note every minute has to do."""


@dataclass(frozen=True, slots=True)
class Administered:
    """A relay, as those who administer it reach it."""

    config: RelayConfig
    registry: Callable[[bool], AbstractAsyncContextManager[Registry]]
    """Opens the registry; True: it has to exist."""
    authority: Callable[[], Awaitable[Authority]]
    ask: Callable[[Question], Awaitable[list[Row] | None]]
    """Asks the relay that runs, with all its processes and its fleet; None: none runs."""
    acting: Callable[..., AbstractAsyncContextManager[dict[str, object]]]
    """Records an act before it is done and when it is over, as `relay.audit.commands.acting` does."""
    clock: Callable[[], float] = time.time


def at(config: RelayConfig, *, clock: Callable[[], float] = time.time) -> Administered:
    """Return the relay of these settings, whether it runs or not, for a command on its machine."""
    return Administered(
        config,
        lambda must_exist: registry_of(config, must_exist=must_exist, clock=clock),
        lambda: asyncio.to_thread(open_authority, config.data_dir, clock=clock),
        lambda question: ask(config.data_dir, question),
        partial(acting, config),
        clock,
    )


async def create_token(
    relay: Administered,
    *,
    cluster: str,
    uses: int = 1,
    ttl: float = DEFAULT_TTL,
    rebind: bool = False,
    api_server: Mapping[str, str] | None = None,
) -> NewToken:
    """Make a join token for `cluster`; `ttl` in seconds. `api_server`: values of `API_SERVER_FLAGS`, for an agent
    on a machine that is no pod.

    Raises `ConfigError`, `StateError`, `RegistryUnavailable`.
    """
    if not cluster:
        raise ConfigError("which cluster? give --cluster NAME")
    check_cluster_name(cluster)
    kubernetes = api_server_arguments(api_server or {})
    config = relay.config
    if not config.public_address:
        raise ConfigError("public_address is not set: it is the host:port that agents dial")
    url = parse_address(config.public_address).url
    authority = await relay.authority()
    async with relay.registry(False) as registry:
        record = await registry.cluster(cluster)
        if (record is not None and record.revoked) or cluster in await registry.revocations():
            raise ConfigError(f"cluster {cluster} is revoked: restore it first, with 'cluster restore {cluster}'")
        expires_at = relay.clock() + ttl
        until = rfc3339(expires_at)
        async with relay.acting("token create", cluster=cluster, uses=uses, until=until, rebind=rebind) as result:
            token = await registry.create_join_token(cluster, uses=uses, expires_at=expires_at, rebind=rebind)
            result["token_id"] = token.partition(".")[0]
    return NewToken.of(
        token,
        cluster=cluster,
        uses=uses,
        expires_at=expires_at,
        relay=url,
        pin="" if config.tls.certificate is not None else authority.pin,
        kubernetes=kubernetes,
    )


async def list_tokens(relay: Administered) -> list[Row]:
    """Return all join tokens, without their secrets; times in unix seconds."""
    async with relay.registry(True) as registry:
        tokens = await registry.list_join_tokens()
    now = relay.clock()

    def state(used: int, uses: int, expires_at: float) -> str:
        if used >= uses:
            return "used up"
        return "expired" if expires_at <= now else "open"

    return [{**asdict(token), "state": state(token.used, token.uses, token.expires_at)} for token in tokens]


async def delete_token(relay: Administered, token_id: str) -> str:
    """Void a join token and return its id; a whole token in its place is taken too. `StateError`: there is none."""
    # What was pasted may hold the secret, so it is never quoted.
    token_id = token_id.strip().partition(".")[0]
    async with relay.registry(True) as registry, relay.acting("token delete", token_id=token_id):
        if not await registry.delete_join_token(token_id):
            raise StateError("there is no join token with this id: 'token list' shows those that are")
    return token_id


@dataclass(frozen=True, slots=True)
class ClusterList:
    """The clusters, and whether the relay that runs has said who is connected."""

    rows: list[Row]
    """Those of the registry, with `agents` and, from their reports, `ready`, `failing`, `sessions`, `round_trip`."""
    missing: str
    """What is the matter where revocations may be missing; else empty."""
    asked: bool
    """False where no relay runs on this data directory: `agents` is unknown, and states follow from dates."""


async def list_clusters(relay: Administered, patterns: Sequence[str] = (EVERY_CLUSTER,)) -> ClusterList:
    """Return all clusters, by name; times in unix seconds, 0 for never. Agents are asked for of those that `patterns`
    name; the caller leaves out the other clusters."""
    async with relay.registry(True) as registry:
        records, revoked = await registry.clusters(), await registry.revocations()
        recovery = await registry.recovery()
    missing = "" if recovery is None else recovery_words(recovery)
    asked = {} if EVERY_CLUSTER in patterns else {"patterns": list(patterns)}
    agents = await relay.ask({"ask": "agents", **asked})
    reports = None if agents is None else _reports(agents)
    known = {record.name for record in records}
    # Names that were revoked before this relay knew the cluster; there is nothing else to say of them.
    unknown = [
        _cluster_row(ClusterRecord(name, "", "", 0.0), relay.clock(), reports) | {"state": "Revoked"}
        for name in revoked - known
    ]
    rows = []
    for number, record in enumerate(records):
        if number % TURN == TURN - 1:
            await asyncio.sleep(0)  # a relay that serves works it out in its own loop
        rows.append(_cluster_row(record, relay.clock(), reports))
    return ClusterList(sorted((*rows, *unknown), key=lambda row: str(row["name"])), missing, reports is not None)


async def list_sessions(relay: Administered) -> list[Row]:
    """Return the sessions that run through this relay, its workers, or its fleet, oldest first; times in unix seconds.
    Raises `StateError` where no relay runs here."""
    rows = await _ask(relay, {"ask": "sessions"})
    return sorted(rows, key=lambda row: float(row.get("since", 0.0)))


async def list_refusals(relay: Administered) -> list[Row]:
    """Return who was refused a cluster lately, the oldest first. Raises `StateError` where no relay runs here."""
    return sorted(await _ask(relay, {"ask": "refusals"}), key=lambda row: float(row.get("at", 0.0)))


async def end_session(relay: Administered, session: str, reason: str = "") -> list[Row]:
    """End the session with this id, its present or its first one; return what was ended. Raises `StateError`."""
    if JOIN_ID.fullmatch(session) is None:
        raise ConfigError("which session? give its id: 'session list' shows those that run")
    rows = await _ask(relay, {"ask": "end", "session": session, "reason": reason})
    if not rows:
        raise StateError(f"there is no session {session} here: 'session list' shows those that run")
    return rows


async def list_policies(relay: Administered) -> list[Row]:
    """Return the policy that each process of this relay, or its fleet, has in force, and the version that it holds
    back. Raises `StateError` where no relay runs here."""
    return await _ask(relay, {"ask": "policy"})


async def accept_policy(relay: Administered, hash: str) -> str:
    """Put the version of the policy in force that is held back under this hash; return it. Raises `StateError`."""
    rows = await _ask(relay, {"ask": "accept_policy", "hash": hash})
    if not rows:
        raise StateError(f"no version {hash} of the policy is held back: 'policy list' shows what is in force")
    return hash


async def list_recovery(relay: Administered) -> list[Row]:
    """Return the clusters from which lost revocations may come back; empty also where none is known to be lost."""
    async with relay.registry(True) as registry:
        found, records = await registry.recovery(), await registry.clusters()
    seen = {record.name: record.last_seen for record in records}
    return [] if found is None else [{"cluster": one, "last_seen": seen.get(one, 0.0)} for one in found.awaited]


async def end_recovery(relay: Administered) -> str:
    """Wait for no more revocations; return what was known. Raises `StateError` where none is awaited."""
    async with relay.registry(True) as registry, relay.acting("recovery end") as result:
        found = await registry.recovery()
        if found is None:
            raise StateError("no revocation is known to be missing")
        await registry.change_recovery(lambda known: None)
        result["missing"] = recovery_words(found)
    return recovery_words(found)


async def delete_cluster(relay: Administered, name: str) -> str:
    """Forget a cluster that is no more. Raises `StateError` for one that is there, or that would come back.

    An agent with a valid certificate is adopted again at its next connection, so a cluster that is revoked can only be
    forgotten when its last certificate has lapsed.
    """
    check_cluster_name(name)
    agents = await relay.ask({"ask": "agents", "clusters": [name]})
    if any(row.get("cluster") == name for row in agents or ()):
        raise StateError(
            f"cluster {name} has a connected agent: stop its agents first, or shut it out with 'cluster revoke {name}'"
        )
    async with relay.registry(True) as registry, relay.acting("cluster delete", cluster=name):
        record = await registry.cluster(name)
        if record is not None and record.revoked and record.certificate_expires > relay.clock():
            until = rfc3339(record.certificate_expires)
            raise StateError(
                f"cluster {name} is revoked, and its certificates are valid until {until}: forgotten before that, its "
                "agents would be let in again"
            )
        if not await registry.delete_cluster(name):
            raise StateError(f"there is no cluster {name}: 'cluster list' shows those that are")
    return name


async def _ask(relay: Administered, question: Question) -> list[Row]:
    """Ask the relay that runs; raise `StateError` where none does."""
    rows = await relay.ask(question)
    if rows is not None:
        return rows
    if is_locked(relay.config.data_dir):
        raise StateError(
            f"the relay that runs on {relay.config.data_dir} answers no commands: it is of an older version, or its "
            "log says `admin socket not opened`; restart it with this version"
        )
    raise StateError(
        f"no relay runs on {relay.config.data_dir} that could be asked: give the relay's own --config, on its machine"
    )


async def revoke_cluster(relay: Administered, name: str) -> tuple[str, bool]:
    """Cut a cluster off and refuse it from now on; return its name, and whether it was known here.

    Where it was not, its name is kept, so that the relay does not adopt it later.
    """
    check_cluster_name(name)
    async with relay.registry(True) as registry:
        async with relay.acting("cluster revoke", cluster=name) as result:
            known = await registry.revoke_cluster(name)
            result["known"] = known
        return name, known


async def restore_cluster(relay: Administered, name: str) -> str:
    """Take `revoke_cluster` back; raises `StateError` when nothing of this name is revoked or known."""
    check_cluster_name(name)
    async with relay.registry(True) as registry, relay.acting("cluster restore", cluster=name):
        if not await registry.unrevoke_cluster(name):
            raise StateError(f"there is no cluster {name}: 'cluster list' shows those that are")
    return name


async def revoke_user(relay: Administered, user: str, before: object = None, reason: str = "") -> UserRevocation:
    """Refuse the user's tokens from before a time (`parse_before`) and end what runs under them; return what holds."""
    if not user:
        raise ConfigError("which user? give the name as the policy has it, or ISSUER#SUBJECT")
    when = parse_before(before, relay.clock())
    async with relay.registry(True) as registry:
        async with relay.acting("user revoke", user=user, before=rfc3339(when), reason=reason) as result:
            made = await registry.revoke_user(user, when, reason)
            result["before"] = rfc3339(made.before)
        return made


async def restore_user(relay: Administered, user: str) -> str:
    """Take `revoke_user` back; raises `StateError` when the user is not revoked."""
    async with relay.registry(True) as registry, relay.acting("user restore", user=user):
        if not await registry.restore_user(user):
            raise StateError("this user is not revoked: 'user list' shows those who are")
    return user


async def list_users(relay: Administered) -> list[Row]:
    """Return all users whose logins are revoked, by user; times in unix seconds."""
    async with relay.registry(True) as registry:
        entries = [asdict(entry) for entry in (await registry.user_revocations()).values()]
    return [{**entry, "revoked_at": entry.pop("revoked")} for entry in entries]


def parse_before(text: object, now: float) -> int:
    """Return unix seconds from a time as `2026-11-25T12:00:00Z`, from a day as `2026-11-25` (its beginning, UTC), or
    from a number of ten digits; None: now, to the end of this second. Raises `ConfigError`."""
    if text is None or text == "":
        return math.ceil(now)
    said = str(text).strip()
    try:
        if said.isascii() and said.isdigit():
            # With ten digits a number is a time since 2001, and no day written as one.
            if len(said) != 10:
                raise ValueError
            return int(said)
        when = datetime.fromisoformat(said)
        if len(said) <= len("2026-11-25"):
            when = when.replace(tzinfo=UTC)
        if when.tzinfo is None:
            raise ValueError
        return math.ceil(when.timestamp())
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            "--before is a time with its zone, as 2026-11-25T12:00:00Z, or a day, as 2026-11-25"
        ) from error


def parse_ttl(ttl: object) -> float:
    """Return seconds from a number or a text as `90s`, `15m`, `1h30m`, `7d`; None: the default. Raises
    `ConfigError`."""
    if ttl is None or ttl == "":
        return DEFAULT_TTL
    try:
        seconds = parse_duration(str(ttl))
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_TTL:
        raise ConfigError("the life of a join token is a time as 90s, 15m, 1h30m or 7d, at most a year")
    return seconds


def parse_uses(uses: object) -> int:
    """Return a number of uses from a number or its text; None: 1. Raises `ConfigError`; the registry checks its
    range."""
    if uses is None or uses == "":
        return 1
    if re.fullmatch(r"[0-9]{1,6}", str(uses).strip()) is None:
        raise ConfigError("the uses of a join token are a whole number")
    return int(str(uses))


def _reports(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the agents of each cluster. One agent keeps connections to several relays of a fleet: the row that is
    worst counts, and the shortest way to a relay."""
    agents: dict[tuple[str, str], Row] = {}
    for row in rows:
        other = agents.setdefault((str(row.get("cluster")), str(row.get("agent"))), row)
        worst, trips = min((other, row), key=_is_well), [one.get("round_trip") or math.inf for one in (other, row)]
        newest = any(one.get("newest") for one in (other, row))  # a relay may not have taken the last step over yet
        agents[str(row.get("cluster")), str(row.get("agent"))] = worst | {"round_trip": min(trips), "newest": newest}
    found: dict[str, list[Row]] = {}
    for (cluster, _), row in agents.items():
        found.setdefault(cluster, []).append(row)
    return found


def _is_well(row: Row) -> bool:
    return bool(row.get("ready", True)) and not row.get("failing")


def _cluster_row(record: ClusterRecord, now: float, reports: Mapping[str, list[Row]] | None) -> Row:
    """`reports`: the agents of each cluster, as the relay that runs has said; None: it was not asked."""
    agents = 0
    found = [] if reports is None else reports.get(record.name, [])
    if reports is not None:
        agents = len(found)
    elif not record.revoked and 0 <= now - record.last_seen <= SEEN_RECENTLY:
        agents = 1
    row = asdict(record)
    del row["ca_pem"], row["keys"], row["cas"]
    row["cluster_ca_pin"] = row.pop("ca_pin")
    row["revoked"] = bool(record.revoked)
    row["revoked_at"] = record.revoked
    row["agents"] = None if reports is None else agents
    row["ready"] = None if reports is None else sum(bool(one.get("ready", True)) for one in found)
    row["failing"] = " ".join(sorted({word for one in found for word in str(one.get("failing", "")).split()}))
    row["sessions"] = sum(int(one.get("sessions", 0)) for one in found)
    row["relay_ca"] = " ".join(sorted({str(one.get("relay_ca", ""))[:PIN_SHOWN] or "-" for one in found}))
    newest = record.newest_ca_pin
    row["newest_relay_ca"] = None if reports is None else sum(bool(one["newest"]) for one in found)
    row["newest_cluster_ca"] = None if reports is None else sum(one.get("cluster_ca") == newest for one in found)
    trips = [float(one["round_trip"]) for one in found if one["round_trip"] < math.inf]
    row["round_trip"] = round(min(trips), 4) if trips else None
    row["state"] = "Revoked" if record.revoked else cluster_state(record, agents, now)
    return row
