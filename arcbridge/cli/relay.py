"""The relay's sub-commands that work on its data directory, answer and end: what each prints."""

from __future__ import annotations

import asyncio
import sys

from arcbridge.cli.administration import format_done, format_list, format_token
from arcbridge.cli.output import print_warning
from arcbridge.cli.parser import Invocation
from arcbridge.cli.settings import start
from arcbridge.errors import ExitCode
from arcbridge.pki.new_token import API_SERVER_FLAGS
from arcbridge.relay import admin
from arcbridge.relay.operations import Row
from arcbridge.relay.settings import require_complete
from arcbridge.settings.config import RelayConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from typing import Any


def _printing(answer: Callable[[Invocation, RelayConfig], Coroutine[Any, Any, str]]) -> Callable[[Invocation], int]:
    """Return a command that prints what `answer` returns."""

    def command(invocation: Invocation) -> int:
        # What is wrong is the command's error; a line of the log before it would say half of it.
        sys.stdout.write(asyncio.run(answer(invocation, start(invocation, "critical"))))
        return ExitCode.DONE

    return command


@_printing
async def token_create(invocation: Invocation, config: RelayConfig) -> str:
    require_complete(config)
    made = await admin.create_token(
        admin.at(config),
        cluster=invocation.text("cluster"),
        uses=admin.parse_uses(invocation.text("uses")),
        ttl=admin.parse_ttl(invocation.text("ttl")),
        rebind=invocation.switch("rebind"),
        api_server={name: invocation.text(name) for name in API_SERVER_FLAGS},
    )
    return format_token(made, invocation.text("output", "table"))


@_printing
async def cluster_list(invocation: Invocation, config: RelayConfig) -> str:
    found = await admin.list_clusters(admin.at(config))
    if not found.asked:
        print_warning(
            f"no relay runs on {config.data_dir} that could be asked who is connected; states follow from when agents "
            "were seen last"
        )
    if found.missing:
        print_warning(f"{found.missing}; 'recovery list' shows from which clusters")
    return format_list("cluster list", found.rows, invocation.text("output", "table"))


@_printing
async def session_end(invocation: Invocation, config: RelayConfig) -> str:
    ended = await admin.end_session(admin.at(config), invocation.text("session"), invocation.text("reason").strip())
    return format_done("session end", ended)


@_printing
async def cluster_revoke(invocation: Invocation, config: RelayConfig) -> str:
    name, known = await admin.revoke_cluster(admin.at(config), invocation.text("cluster"))
    return format_done("cluster revoke", [{"cluster": name, "known": known}])


@_printing
async def user_revoke(invocation: Invocation, config: RelayConfig) -> str:
    made = await admin.revoke_user(
        admin.at(config), invocation.text("user"), invocation.text("before"), invocation.text("reason").strip()
    )
    return format_done("user revoke", [{"user": made.user, "before": made.before}])


@_printing
async def recovery_end(invocation: Invocation, config: RelayConfig) -> str:
    return f"no more revocations are awaited; as it stood: {await admin.end_recovery(admin.at(config))}\n"


# --- what only lists, or says that it is done -----------------------------------------------------------------------


def _listing(
    rows: Callable[[admin.Administered], Coroutine[Any, Any, Sequence[Row]]], command: str
) -> Callable[[Invocation], int]:
    """Return a command that prints rows."""

    async def answer(invocation: Invocation, config: RelayConfig) -> str:
        return format_list(command, await rows(admin.at(config)), invocation.text("output", "table"))

    return _printing(answer)


def _saying(
    act: Callable[[admin.Administered, str], Coroutine[Any, Any, str]], command: str, argument: str
) -> Callable[[Invocation], int]:
    """Return a command that acts on its argument and says so; what the act returns is the name by which that is
    known."""

    async def answer(invocation: Invocation, config: RelayConfig) -> str:
        return format_done(command, [{argument: await act(admin.at(config), invocation.text(argument))}])

    return _printing(answer)


token_list = _listing(admin.list_tokens, "token list")
session_list = _listing(admin.list_sessions, "session list")
refusal_list = _listing(admin.list_refusals, "refusal list")
policy_list = _listing(admin.list_policies, "policy list")
recovery_list = _listing(admin.list_recovery, "recovery list")
user_list = _listing(admin.list_users, "user list")
policy_accept = _saying(admin.accept_policy, "policy accept", "hash")
token_delete = _saying(admin.delete_token, "token delete", "id")
cluster_delete = _saying(admin.delete_cluster, "cluster delete", "cluster")
cluster_restore = _saying(admin.restore_cluster, "cluster restore", "cluster")
user_restore = _saying(admin.restore_user, "user restore", "user")
