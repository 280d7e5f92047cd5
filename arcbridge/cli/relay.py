"""The relay's sub-commands that work on its data directory, answer and end: what each prints."""

from __future__ import annotations

import asyncio
import os
import sys

from arcbridge.cli.commands import DOCUMENTS
from arcbridge.cli.output import format_document, format_rows, print_warning, rfc3339
from arcbridge.cli.parser import Invocation
from arcbridge.cli.settings import load_settings
from arcbridge.errors import ExitCode
from arcbridge.observe import logging
from arcbridge.relay import admin
from arcbridge.relay.settings import require_complete
from arcbridge.settings.config import RelayConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from typing import Any


_TOKEN_COLUMNS = ("id", "cluster", "state", "used", "uses", "created", "expires_at")
_CLUSTER_COLUMNS = ("name", "state", "agents", "last_seen", "certificate_expires", "version", "cluster_ca_pin")
_BYTES = ("bytes_to_agent", "bytes_to_client")
_WIDE_COLUMNS = ("name", "state", "agents", "ready", "failing", "sessions", "round_trip", "last_seen",
                 "certificate_expires", "version", "cluster_ca_pin")  # fmt: skip
_SESSION_COLUMNS = ("session", "user", "cluster", "since", *_BYTES, "agent", "relay", "worker")
_USER_COLUMNS = ("user", "before", "revoked_at", "reason")
_TIMES = frozenset(
    ("created", "expires_at", "last_seen", "certificate_expires", "before", "revoked_at", "since", "valid_since")
)
"""Keys whose values are unix seconds, 0 for never; people and scripts get them as RFC 3339."""


def _printing(answer: Callable[[Invocation, RelayConfig], Coroutine[Any, Any, str]]) -> Callable[[Invocation], int]:
    """Return a command that prints what `answer` returns."""

    def command(invocation: Invocation) -> int:
        config: RelayConfig = load_settings(invocation, os.environ)
        # What is wrong is the command's error; a line of the log before it would say half of it.
        logging.configure("relay", "critical", config.observe.log_format)
        sys.stdout.write(asyncio.run(answer(invocation, config)))
        return ExitCode.DONE

    return command


@_printing
async def token_create(invocation: Invocation, config: RelayConfig) -> str:
    require_complete(config)
    made = await admin.create_token(
        config,
        cluster=invocation.text("cluster"),
        uses=admin.parse_uses(invocation.text("uses")),
        ttl=admin.parse_ttl(invocation.text("ttl")),
        rebind=invocation.switch("rebind"),
        api_server={name: invocation.text(name) for name in admin.API_SERVER_FLAGS},
    )
    return _format_token(made, invocation.text("output", "table"))


@_printing
async def cluster_list(invocation: Invocation, config: RelayConfig) -> str:
    found = await admin.list_clusters(config)
    if not found.asked:
        print_warning(
            f"no relay runs on {config.data_dir} that could be asked who is connected; states follow from when agents "
            "were seen last"
        )
    if found.missing:
        print_warning(f"{found.missing}; 'recovery list' shows from which clusters")
    wide = invocation.text("output", "table") == "wide"
    return _format_list(found.rows, _WIDE_COLUMNS if wide else _CLUSTER_COLUMNS, invocation)


@_printing
async def session_end(invocation: Invocation, config: RelayConfig) -> str:
    ended = await admin.end_session(config, invocation.text("session"), invocation.text("reason").strip())
    return "".join(
        f"session {row['session']} of {row['user']} with cluster {row['cluster']} ends within seconds\n"
        for row in ended
    )


@_printing
async def cluster_revoke(invocation: Invocation, config: RelayConfig) -> str:
    name, known = await admin.revoke_cluster(config, invocation.text("cluster"))
    if not known:
        return (
            f"cluster {name} is revoked, and was not known here (was the name meant?): its agents are refused when "
            "they come, at this relay and at those that share its registry\n"
        )
    return f"cluster {name} is revoked: its agents are cut off within seconds and refused\n"


@_printing
async def user_revoke(invocation: Invocation, config: RelayConfig) -> str:
    made = await admin.revoke_user(
        config, invocation.text("user"), invocation.text("before"), invocation.text("reason").strip()
    )
    return (
        f"user {made.user} is revoked: tokens issued before {rfc3339(made.before)} are refused, and what runs under "
        "them ends within seconds\n"
    )


@_printing
async def recovery_end(invocation: Invocation, config: RelayConfig) -> str:
    return f"no more revocations are awaited; as it stood: {await admin.end_recovery(config)}\n"


# --- what only lists, or says that it is done -----------------------------------------------------------------------


def _listing(
    rows: Callable[[RelayConfig], Coroutine[Any, Any, Sequence[admin.Row]]], columns: Sequence[str]
) -> Callable[[Invocation], int]:
    """Return a command that prints rows, which the first column names."""

    async def answer(invocation: Invocation, config: RelayConfig) -> str:
        return _format_list(await rows(config), columns, invocation)

    return _printing(answer)


def _saying(
    act: Callable[[RelayConfig, str], Coroutine[Any, Any, str]], argument: str, done: str
) -> Callable[[Invocation], int]:
    """Return a command that acts on its argument and says so; `{}` in `done` is the name by which that is known."""

    async def answer(invocation: Invocation, config: RelayConfig) -> str:
        return done.format(await act(config, invocation.text(argument))) + "\n"

    return _printing(answer)


token_list = _listing(admin.list_tokens, _TOKEN_COLUMNS)
session_list = _listing(admin.list_sessions, _SESSION_COLUMNS)
policy_list = _listing(admin.list_policies, ("hash", "rules", "held", "reason", "relay", "worker"))
policy_accept = _saying(admin.accept_policy, "hash", "version {} of the policy counts from now on")
recovery_list = _listing(admin.list_recovery, ("cluster", "last_seen"))
user_list = _listing(admin.list_users, _USER_COLUMNS)
token_delete = _saying(admin.delete_token, "id", "join token {} is deleted: it enrols no more agents")
cluster_delete = _saying(
    admin.delete_cluster, "cluster", "cluster {} is forgotten: the name is free, also for another cluster CA"
)
cluster_restore = _saying(
    admin.restore_cluster,
    "cluster",
    "cluster {} is restored: its agents come back by themselves while their certificate is valid",
)
user_restore = _saying(admin.restore_user, "user", "user {} is restored: tokens count again until they lapse")


# --- formats --------------------------------------------------------------------------------------------------------


def _format_list(rows: Sequence[admin.Row], columns: Sequence[str], invocation: Invocation) -> str:
    heads = [(column, column.replace("_", " ").upper()) for column in columns]
    return format_rows(
        [_dated(row) for row in rows],
        heads,
        invocation.text("output", "table").replace("wide", "table"),
        name=columns[0],
    )


def _format_token(made: admin.NewToken, output: str) -> str:
    from dataclasses import asdict

    if output in DOCUMENTS:
        return format_document(_dated(asdict(made)), output)
    if output not in ("", "table"):
        return format_rows([asdict(made)], (), output, name="token")
    uses, until = "once" if made.uses == 1 else f"{made.uses} times", rfc3339(made.expires_at) or "-"
    lines = [
        f"Join token for cluster {made.cluster}, usable {uses} until {until}; shown only now:",
        "",
        f"  {made.token}",
        "",
        "Where kubectl reaches the cluster, with the Helm chart (values.yaml says whose tokens count):"
        if made.in_cluster
        else "On the agent's machine:",
        "",
        *(f"  {line}" for line in made.command.splitlines()),
        "",
        "The first line holds the token. The spaces before it keep it out of the history of a shell that is set so "
        "(bash: HISTCONTROL=ignorespace); `-o name` prints the token alone, for `> FILE`.",
        "",
    ]
    if made.in_cluster:
        lines += [
            "For an agent on a machine that is no pod give this command --kube-server https://HOST:PORT and "
            "--kube-token-file FILE (and --kube-ca-file FILE) too: it prints what starts that agent.",
            "",
        ]
    if not made.relay_ca_pin:
        lines += [
            "The relay's certificate comes from another CA: agents check it against their system's CAs, or against "
            "--relay-ca-file.",
            "",
        ]
    return "\n".join(lines)


def _dated(row: admin.Row) -> admin.Row:
    """Return the row with its times as text; None, which tables show as `-`, for never."""
    return {key: rfc3339(value or 0.0) if key in _TIMES else value for key, value in row.items()}
