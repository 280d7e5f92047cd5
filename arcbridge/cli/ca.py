"""The sub-commands that rotate a CA, the relay's own or that of the agent's cluster."""

from __future__ import annotations

import asyncio
import sys
from importlib import import_module

from arcbridge.cli.commands import FOR_PEOPLE
from arcbridge.cli.output import format_rows, plain, print_prose, print_warning, rfc3339
from arcbridge.cli.parser import Invocation
from arcbridge.cli.screen import Column
from arcbridge.cli.settings import start
from arcbridge.errors import ExitCode
from arcbridge.pki.rotation import named

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_COLUMNS = (Column("ca"), Column("pin"), Column("certificate_expires", "UNTIL"))
_DONE = {
    "next": "the next CA is {pin}; it is announced within minutes",
    "activate": "CA {pin} signs within minutes",
    "retire": "CA {pin} alone counts within minutes",
}


def status(invocation: Invocation) -> int:
    """Print the CAs that count, and who has not followed the last step."""
    rotation, config = _rotation(invocation)
    found = asyncio.run(rotation.status(config))
    for one in named(found.missing):
        print_warning(one)
    form = invocation.text("output", "table")
    rows = [{**row, "certificate_expires": rfc3339(row["certificate_expires"])} for row in found.rows]
    sys.stdout.write(format_rows(rows, _COLUMNS, form, name="ca"))
    if form in FOR_PEOPLE and found.followed:
        counted = ", ".join(filter(None, (found.followed, found.agents)))
        print_prose(f"followed by {counted}; relays that answered: {', '.join(found.relays)}")
        if found.users:
            print_prose(f"kept by the clients of {plain(found.users)}")
    return ExitCode.DONE


def _step(step: str) -> Callable[[Invocation], int]:
    def command(invocation: Invocation) -> int:
        rotation, config = _rotation(invocation)
        found = asyncio.run(rotation.take_step(config, step, force=invocation.switch("force")))
        print_prose(_DONE[step].format(pin=found.list.pins[-1]))
        if invocation.role == "relay":
            copied = config.data_dir / rotation.ROTATION_FILE
            print_prose(f"of several relays each other one needs a copy of {copied} now, before any other step")
        return ExitCode.DONE

    return command


def _rotation(invocation: Invocation) -> tuple[Any, Any]:
    config = start(invocation, "warning")
    return import_module(f"arcbridge.{invocation.role}.ca_rotation"), config


make_next, activate, retire = map(_step, _DONE)
