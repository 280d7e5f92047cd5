"""`arcbridge admin …`: the relay's own commands over HTTPS, by the user's login, printed as on the relay's machine."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from arcbridge.cli.administration import format_done, format_list, format_token
from arcbridge.cli.client import answering
from arcbridge.cli.commands import find_command
from arcbridge.cli.output import print_warning
from arcbridge.cli.parser import Invocation
from arcbridge.errors import ExitCode, Unreachable
from arcbridge.pki.new_token import API_SERVER_FLAGS, api_server_arguments
from arcbridge.settings.flags import CLIENT

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from arcbridge.client.service import ClientContext


@answering
async def administer(invocation: Invocation, context: ClientContext) -> int:
    """Have a relay do what stands behind `admin`."""
    from arcbridge.client.commands import administration

    command = " ".join(invocation.command[1:])
    kubernetes = api_server_arguments({name: invocation.text(name) for name in API_SERVER_FLAGS})
    given = _given(invocation)
    answer = await administration.administer(context.relays, context.tokens, command, given)
    try:
        text = _text(command, answer.rows, given, kubernetes, invocation.text("output", "table"))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise Unreachable(
            "the relay answered in another form than this version reads: is it of another version?"
            + ("" if command.endswith(" list") else " The command may have been done: look with a list")
        ) from error
    sys.stdout.write(text)
    if answer.more:
        print_warning(f"the relay has more than these {len(answer.rows)} rows, and sends no more of them")
    return ExitCode.DONE


def _text(
    command: str, rows: list[dict[str, Any]], given: Mapping[str, str], kubernetes: list[str], output: str
) -> str:
    """Return what is printed of an answer. Raises KeyError, TypeError, ValueError or OverflowError for rows of another
    form than the relay's commands give."""
    if command.endswith(" list"):
        return format_list(command, rows, output)
    if not rows:
        raise ValueError("an act without a row")
    if command == "token create":
        from arcbridge.client.commands.administration import new_token

        return format_token(new_token(rows[0], given["cluster"], kubernetes), output)
    return format_done(command, rows)


def _given(invocation: Invocation) -> dict[str, str]:
    """Return what the relay is to be given of a command line: all but how to print, and what the agent is given."""
    command = find_command(CLIENT, invocation.command)
    names = [flag.dest for flag in command.flags] + ([command.argument.name] if command.argument is not None else [])
    given = {name: "yes" if invocation.switch(name) else invocation.text(name).strip() for name in names}
    return {name: value for name, value in given.items() if value and name not in ("output", *API_SERVER_FLAGS)}
