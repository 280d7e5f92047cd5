"""The relay's sub-commands: `run`, and those that work on its data directory; what each prints, and its exit code."""

from __future__ import annotations

import os
import signal
import sys

from arcbridge.cli.flags import DOCUMENTS
from arcbridge.cli.output import format_document, format_rows, print_warning, rfc3339
from arcbridge.cli.parser import Invocation
from arcbridge.cli.settings import load_settings, place_of
from arcbridge.errors import ExitCode
from arcbridge.settings.config import RelayConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine, Sequence
    from typing import Any

    from arcbridge.relay.admin import NewToken, Row

_TOKEN_COLUMNS = ("id", "cluster", "state", "used", "uses", "created", "expires_at")
_CLUSTER_COLUMNS = ("name", "state", "agents", "last_seen", "certificate_expires", "version", "ca_pin")
_SESSION_COLUMNS = (
    "session",
    "user",
    "cluster",
    "since",
    "bytes_to_agent",
    "bytes_to_client",
    "agent",
    "relay",
    "worker",
)
_USER_COLUMNS = ("user", "before", "revoked_at", "reason")
_TIMES = frozenset(
    ("created", "expires_at", "last_seen", "certificate_expires", "before", "revoked_at", "since", "valid_since")
)
"""Keys whose values are unix seconds, 0 for never; people and scripts get them as RFC 3339."""


def run_relay(invocation: Invocation) -> int:
    """Run a relay command; returns the exit code."""
    config: RelayConfig = load_settings(invocation, os.environ)
    return _COMMANDS[invocation.command](invocation, config)


def _serve(invocation: Invocation, config: RelayConfig) -> int:
    from arcbridge.observe import logging

    logging.configure("relay", config.observe.log_level, config.observe.log_format)
    from arcbridge.cli.loop import Interrupted, notify, run_until_drained
    from arcbridge.settings.problems import SettingsRefused, located

    several = False
    if config.workers != 1:
        from arcbridge.relay.processes.supervisor import supervise
        from arcbridge.relay.worker_count import worker_count

        several = worker_count(config) > 1
    if not several:
        from arcbridge.relay.service import serve

    def run(stopping: asyncio.Event, hurry: asyncio.Event) -> Coroutine[Any, Any, None]:
        if several:
            return supervise(config, lambda _: notify("READY=1"), stopping, hurry, reread=reread)
        return serve(config, lambda _: notify("READY=1"), stopping, hurry, reread=reread)

    def reread() -> RelayConfig:
        again: RelayConfig = load_settings(invocation, os.environ)
        return again

    try:
        run_until_drained(run)
    except SettingsRefused as error:
        raise SettingsRefused(located(error.problems, place_of(invocation, os.environ))) from error
    except Interrupted as error:
        return ExitCode.DONE if error.signal == signal.SIGTERM else ExitCode.INTERRUPTED
    return ExitCode.DONE


# --- administration: commands that answer and end -------------------------------------------------------------------


def _administer(
    answer: Callable[[Invocation, RelayConfig], Coroutine[Any, Any, str]],
) -> Callable[[Invocation, RelayConfig], int]:
    """Return a command that prints what `answer` returns."""

    def run(invocation: Invocation, config: RelayConfig) -> int:
        import asyncio

        from arcbridge.observe import logging

        logging.configure("relay", "warning", config.observe.log_format)
        sys.stdout.write(asyncio.run(answer(invocation, config)))
        return ExitCode.DONE

    return run


async def _token_create(invocation: Invocation, config: RelayConfig) -> str:
    from arcbridge.relay.admin import ApiServerFlags, create_token, parse_ttl, parse_uses
    from arcbridge.relay.settings import require_complete
    from arcbridge.settings.problems import SettingsRefused, located

    try:
        require_complete(config)
    except SettingsRefused as error:
        raise SettingsRefused(located(error.problems, place_of(invocation, os.environ))) from error
    made = await create_token(
        config,
        cluster=invocation.text("cluster"),
        uses=parse_uses(invocation.text("uses")),
        ttl=parse_ttl(invocation.text("ttl")),
        rebind=invocation.switch("rebind"),
        api_server=ApiServerFlags(
            invocation.text("kube_server"),
            invocation.text("kube_ca_file"),
            invocation.text("kube_token_file"),
            invocation.text("kube_client_certificate_file"),
            invocation.text("kube_client_key_file"),
        ),
    )
    return _format_token(made, invocation.text("output", "table"))


async def _token_list(invocation: Invocation, config: RelayConfig) -> str:
    from arcbridge.relay.admin import list_tokens

    return _format_list(await list_tokens(config), _TOKEN_COLUMNS, invocation, "id")


async def _token_delete(invocation: Invocation, config: RelayConfig) -> str:
    from arcbridge.relay.admin import delete_token

    token_id = await delete_token(config, invocation.text("id"))
    return f"join token {token_id} is deleted: it enrols no more agents\n"


async def _cluster_list(invocation: Invocation, config: RelayConfig) -> str:
    from arcbridge.relay.admin import list_clusters

    found = await list_clusters(config)
    if not found.asked:
        print_warning(
            f"no relay runs on {config.data_dir} that could be asked who is connected; states follow from when agents "
            "were seen last"
        )
    return _format_list(found.rows, _CLUSTER_COLUMNS, invocation, "name")


async def _cluster_delete(invocation: Invocation, config: RelayConfig) -> str:
    from arcbridge.relay.admin import delete_cluster

    name = await delete_cluster(config, invocation.text("cluster"))
    return f"cluster {name} is forgotten: the name is free, also for another cluster CA\n"


async def _session_list(invocation: Invocation, config: RelayConfig) -> str:
    from arcbridge.relay.admin import list_sessions

    return _format_list(await list_sessions(config), _SESSION_COLUMNS, invocation, "session")


async def _session_end(invocation: Invocation, config: RelayConfig) -> str:
    from arcbridge.relay.admin import end_session

    ended = await end_session(config, invocation.text("session"), invocation.text("reason").strip())
    return "".join(
        f"session {row['session']} of {row['user']} with cluster {row['cluster']} ends within seconds\n"
        for row in ended
    )


async def _doctor(invocation: Invocation, config: RelayConfig) -> tuple[str, bool]:
    from arcbridge.checks.diagnosis import first_failure
    from arcbridge.cli.diagnosis import format_findings
    from arcbridge.relay.doctor import diagnose

    found = await diagnose(config, place_of(invocation, os.environ))
    return format_findings(found, invocation.text("output", "table")), first_failure(found) is None


async def _cluster_revoke(invocation: Invocation, config: RelayConfig) -> str:
    from arcbridge.relay.admin import revoke_cluster

    name, known = await revoke_cluster(config, invocation.text("cluster"))
    if not known:
        return (
            f"cluster {name} is revoked, and was not known here (was the name meant?): its agents are refused when "
            "they come, at this relay and at those that share its registry\n"
        )
    return f"cluster {name} is revoked: its agents are cut off within seconds and refused\n"


async def _cluster_restore(invocation: Invocation, config: RelayConfig) -> str:
    from arcbridge.relay.admin import restore_cluster

    name = await restore_cluster(config, invocation.text("cluster"))
    return f"cluster {name} is restored: its agents come back by themselves while their certificate is valid\n"


async def _user_revoke(invocation: Invocation, config: RelayConfig) -> str:
    from arcbridge.relay.admin import revoke_user

    made = await revoke_user(
        config, invocation.text("user"), invocation.text("before"), invocation.text("reason").strip()
    )
    return (
        f"user {made.user} is revoked: tokens issued before {rfc3339(made.before)} are refused, and what runs under "
        "them ends within seconds\n"
    )


async def _user_restore(invocation: Invocation, config: RelayConfig) -> str:
    from arcbridge.relay.admin import restore_user

    user = await restore_user(config, invocation.text("user"))
    return f"user {user} is restored: tokens count again until they lapse\n"


async def _user_list(invocation: Invocation, config: RelayConfig) -> str:
    from arcbridge.relay.admin import list_users

    return _format_list(await list_users(config), _USER_COLUMNS, invocation, "user")


def _run_doctor(invocation: Invocation, config: RelayConfig) -> int:
    import asyncio

    from arcbridge.observe import logging

    logging.configure("relay", "critical", config.observe.log_format)
    text, well = asyncio.run(_doctor(invocation, config))
    sys.stdout.write(text)
    return ExitCode.DONE if well else ExitCode.FAILURE


_COMMANDS: dict[tuple[str, ...], Callable[[Invocation, RelayConfig], int]] = {
    ("run",): _serve,
    ("token", "create"): _administer(_token_create),
    ("token", "list"): _administer(_token_list),
    ("token", "delete"): _administer(_token_delete),
    ("cluster", "list"): _administer(_cluster_list),
    ("cluster", "revoke"): _administer(_cluster_revoke),
    ("cluster", "restore"): _administer(_cluster_restore),
    ("cluster", "delete"): _administer(_cluster_delete),
    ("session", "list"): _administer(_session_list),
    ("session", "end"): _administer(_session_end),
    ("doctor",): _run_doctor,
    ("user", "revoke"): _administer(_user_revoke),
    ("user", "restore"): _administer(_user_restore),
    ("user", "list"): _administer(_user_list),
}


# --- formats --------------------------------------------------------------------------------------------------------


def _format_list(rows: Sequence[Row], columns: Sequence[str], invocation: Invocation, name: str) -> str:
    output = invocation.text("output", "table")
    rows = [_dated(row) for row in rows]
    return format_rows(rows, [(column, column.replace("_", " ").upper()) for column in columns], output, name=name)


def _format_token(made: NewToken, output: str) -> str:
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


def _dated(row: Row) -> Row:
    """Return the row with its times as text; None, which tables show as `-`, for never."""
    return {key: rfc3339(value or 0.0) if key in _TIMES else value for key, value in row.items()}
