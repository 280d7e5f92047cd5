"""What an operator does on the relay's machine: join tokens and clusters, while the relay runs or before it does.

The commands work on the registry in the data directory, or on the fleet's in NATS. The relay sees a new token at once
and a revocation within seconds; nothing has to be restarted and no port of the relay is involved. Whoever can write
that directory, or that bucket, is the operator.

`run_admin` is the whole of it for the command line. The functions beside it return plain data, for anybody who
prints it in another way:

    create_token(config, cluster=…, uses=…, ttl=…) -> NewToken      delete_token(config, id)
    list_tokens(config) -> [row]                                    list_clusters(config) -> [row]
    revoke_cluster(config, name)                                    restore_cluster(config, name)
"""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol, TextIO

from arcbridge.config import RelayConfig, parse_duration
from arcbridge.errors import ConfigError, ExitCode, StateError
from arcbridge.net.address import parse_address
from arcbridge.pki.names import check_cluster_name
from arcbridge.relay.backend import registry_of
from arcbridge.relay.data_dir import open_authority
from arcbridge.relay.registry.base import ClusterRecord, cluster_state

Row = dict[str, Any]

DEFAULT_TTL = 3600.0
"""Seconds: long enough to walk over to the cluster, short enough that a forgotten token does not matter."""

MAX_TTL = 366 * 86400.0

SEEN_RECENTLY = 150.0
"""Seconds. This process cannot ask the relay who is connected, but the relay notes it every minute."""

_TOKEN_COLUMNS = ("id", "cluster", "state", "used", "uses", "created", "expires_at")
_CLUSTER_COLUMNS = ("name", "state", "last_seen", "certificate_expires", "version", "ca_pin")
_TIMES = frozenset(("created", "expires_at", "last_seen", "certificate_expires"))


class AdminArguments(Protocol):
    """What `run_admin` reads, by `getattr`; any namespace will do. All but `command` may be missing or None.

    `cluster`: name. `uses`: number (or its text). `ttl`: seconds, or text as `90s`, `15m`, `1h30m`, `7d`.
    `rebind`: whether the cluster may come back with another CA. `id`: of a token. `output`: table, json, yaml, name.
    """

    command: Sequence[str]
    """`("token", "create")`, `("token", "list")`, `("token", "delete")`, `("cluster", "list")`,
    `("cluster", "revoke")` or `("cluster", "restore")`."""


@dataclass(frozen=True, slots=True)
class NewToken:
    """A join token as it is shown once, with what an agent needs besides."""

    id: str
    token: str = field(repr=False)
    cluster: str
    uses: int
    expires_at: float
    relay: str
    """`https://host:port`."""
    relay_ca_pin: str
    """Empty when the relay's certificate comes from elsewhere (`[tls]`): the pin of our CA says nothing about it."""
    command: str = field(repr=False)
    """Shell lines to paste on the agent's machine. The token goes into a file and not into an argument list, which
    every user of that machine could read."""


def run_admin(args: AdminArguments, config: RelayConfig, out: TextIO) -> int:
    """Run one command, print its result to `out`, return the exit code; raises `ArcbridgeError` for what goes wrong."""
    command = tuple(args.command)
    output = getattr(args, "output", None) or "table"
    if output not in ("table", "json", "yaml", "name"):
        raise ConfigError("the output is one of table, json, yaml and name")
    if command == ("token", "create"):
        made = asyncio.run(
            create_token(
                config,
                cluster=getattr(args, "cluster", None) or "",
                uses=parse_uses(getattr(args, "uses", None)),
                ttl=parse_ttl(getattr(args, "ttl", None)),
                rebind=bool(getattr(args, "rebind", False)),
            )
        )
        out.write(_told(made) if output == "table" else _formatted([asdict(made)], (), output, "token", single=True))
    elif command == ("token", "list"):
        out.write(_formatted(asyncio.run(list_tokens(config)), _TOKEN_COLUMNS, output, "id"))
    elif command == ("token", "delete"):
        token_id = asyncio.run(delete_token(config, getattr(args, "id", None) or ""))
        out.write(f"join token {token_id} is deleted: it enrols nobody any more\n")
    elif command == ("cluster", "list"):
        out.write(_formatted(asyncio.run(list_clusters(config)), _CLUSTER_COLUMNS, output, "name"))
    elif command == ("cluster", "revoke"):
        name = asyncio.run(revoke_cluster(config, getattr(args, "cluster", None) or ""))
        out.write(f"cluster {name} is revoked: its agents are cut off within seconds and refused\n")
    elif command == ("cluster", "restore"):
        name = asyncio.run(restore_cluster(config, getattr(args, "cluster", None) or ""))
        out.write(f"cluster {name} is restored: its agents come back by themselves while their certificate is valid\n")
    else:
        raise ConfigError("unknown command: use token create|list|delete or cluster list|revoke|restore")
    return ExitCode.DONE


async def create_token(
    config: RelayConfig,
    *,
    cluster: str,
    uses: int = 1,
    ttl: float = DEFAULT_TTL,
    rebind: bool = False,
    clock: Callable[[], float] = time.time,
) -> NewToken:
    """Make a join token for `cluster`; `ttl` in seconds. Raises `ConfigError`, `StateError`, `RegistryUnavailable`."""
    if not cluster:
        raise ConfigError("which cluster? give --cluster NAME")
    check_cluster_name(cluster)
    if not config.public_address:
        raise ConfigError("public_address is not set: it is the host:port that agents dial")
    relay = parse_address(config.public_address).url
    authority = await asyncio.to_thread(open_authority, config.data_dir, clock=clock)
    async with registry_of(config, clock=clock) as registry:
        record = await registry.cluster(cluster)
        if record is not None and record.revoked:
            raise ConfigError(f"cluster {cluster} is revoked: restore it first, with 'cluster restore {cluster}'")
        expires_at = clock() + ttl
        token = await registry.create_join_token(cluster, uses=uses, expires_at=expires_at, rebind=rebind)
    pin = "" if config.tls.certificate is not None else authority.pin
    return NewToken(
        id=token.partition(".")[0],
        token=token,
        cluster=cluster,
        uses=uses,
        expires_at=expires_at,
        relay=relay,
        relay_ca_pin=pin,
        command=_agent_command(token, cluster, relay, pin),
    )


async def list_tokens(config: RelayConfig, *, clock: Callable[[], float] = time.time) -> list[Row]:
    """All join tokens, without their secrets; times in unix seconds."""
    async with registry_of(config, must_exist=True, clock=clock) as registry:
        tokens = await registry.list_join_tokens()
    now = clock()

    def state(used: int, uses: int, expires_at: float) -> str:
        if used >= uses:
            return "used up"
        return "expired" if expires_at <= now else "open"

    return [{**asdict(token), "state": state(token.used, token.uses, token.expires_at)} for token in tokens]


async def delete_token(config: RelayConfig, token_id: str) -> str:
    """Void a join token and return its id; a whole token in its place is taken too. `StateError`: there is none."""
    # What was pasted may hold the secret, so it is never quoted.
    token_id = token_id.strip().partition(".")[0]
    async with registry_of(config, must_exist=True) as registry:
        if not await registry.delete_join_token(token_id):
            raise StateError("there is no join token with this id: 'token list' shows those that are")
    return token_id


async def list_clusters(config: RelayConfig, *, clock: Callable[[], float] = time.time) -> list[Row]:
    """All clusters, by name; times in unix seconds, 0 for never."""
    async with registry_of(config, must_exist=True, clock=clock) as registry:
        records = await registry.clusters()
    return [_cluster_row(record, clock()) for record in records]


async def revoke_cluster(config: RelayConfig, name: str) -> str:
    """Cut a cluster off and refuse it from now on; raises `StateError` when there is none of this name."""
    return await _set_revoked(config, name, True)


async def restore_cluster(config: RelayConfig, name: str) -> str:
    """Take `revoke_cluster` back."""
    return await _set_revoked(config, name, False)


async def _set_revoked(config: RelayConfig, name: str, revoked: bool) -> str:
    check_cluster_name(name)
    async with registry_of(config, must_exist=True) as registry:
        change = registry.revoke_cluster if revoked else registry.unrevoke_cluster
        if not await change(name):
            raise StateError(f"there is no cluster {name}: 'cluster list' shows those that are")
    return name


def parse_ttl(ttl: object) -> float:
    """Seconds from a number or a text as `90s`, `15m`, `1h30m`, `7d`; None: the default. Raises `ConfigError`."""
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
    """A number of uses from a number or its text; None: 1. Raises `ConfigError`; the registry checks its range."""
    if uses is None or uses == "":
        return 1
    if re.fullmatch(r"[0-9]{1,6}", str(uses).strip()) is None:
        raise ConfigError("the uses of a join token are a whole number")
    return int(str(uses))


def _cluster_row(record: ClusterRecord, now: float) -> Row:
    agents = 1 if not record.revoked and 0 <= now - record.last_seen <= SEEN_RECENTLY else 0
    row = asdict(record)
    del row["ca_pem"]
    row["labels"] = dict(record.labels)
    row["state"] = "Revoked" if record.revoked else cluster_state(record, agents, now)
    return row


def _agent_command(token: str, cluster: str, relay: str, pin: str) -> str:
    file, state = f"arcbridge-{cluster}.token", f"./arcbridge-{cluster}"
    arguments = ["arcbridge", "--role", "agent", "--relay", relay]
    if pin:
        arguments += ["--relay-ca-pin", pin]
    arguments += ["--join-token-file", file, "--state-dir", state]
    return f"(umask 077; printf '%s\\n' {shlex.quote(token)} > {shlex.quote(file)})\n{shlex.join(arguments)}"


def _told(made: NewToken) -> str:
    uses = "once" if made.uses == 1 else f"{made.uses} times"
    lines = [
        f"Join token for cluster {made.cluster}, usable {uses} until {_time(made.expires_at)}; shown only now:",
        "",
        f"  {made.token}",
        "",
        "Run the agent where it reaches the cluster's API server:",
        "",
        *(f"  {line}" for line in made.command.splitlines()),
        "",
    ]
    if not made.relay_ca_pin:
        lines += [
            "The relay's certificate comes from another CA: agents check it against their system's CAs, or against "
            "--relay-ca-file.",
            "",
        ]
    return "\n".join(lines)


def _formatted(rows: list[Row], columns: Sequence[str], output: str, name: str, *, single: bool = False) -> str:
    if output == "name":
        return "".join(f"{row[name]}\n" for row in rows)
    if output == "json":
        return json.dumps(rows[0] if single else rows, indent=2, ensure_ascii=False) + "\n"
    if output == "yaml":
        import yaml

        return yaml.safe_dump(rows[0] if single else rows, sort_keys=False, allow_unicode=True)
    table = [[column.replace("_", " ").upper() for column in columns]]
    table += [[_cell(row, column) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in table) for index in range(len(columns))]
    return "".join(
        "   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n"
        for line in table
    )


def _cell(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if column in _TIMES:
        return _time(value)
    return "-" if value == "" else str(value)


def _time(when: float) -> str:
    """UTC, to the second; `-` for never."""
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if when > 0 else "-"
