"""Runs a program of the user's settings that prints a token, and returns what it printed.

It neither reads what was printed nor keeps it. Invariant: no byte of the output is in an error, because it may be a
token, and the program has ended when `output_of` returns or raises.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from arcbridge.errors import Unauthenticated

DEADLINE = 120.0
"""Seconds: a program may itself ask the user."""
OUTPUT_LIMIT = 256 * 1024


async def output_of(setting: str, command: tuple[str, ...], environment: Mapping[str, str] | None = None) -> bytes:
    """Return the standard output of `command`; empty when it is over 256 KiB.

    `setting` is where the command was configured, for messages. `environment`: instead of this process's own. Raises
    Unauthenticated.
    """
    name = command[0]
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, env=environment
        )
    except OSError as error:
        raise Unauthenticated(f"{setting}: cannot run {name}: {error.strerror}") from error
    try:
        async with asyncio.timeout(DEADLINE):
            output, _ = await process.communicate()
    except TimeoutError as error:
        raise Unauthenticated(f"{setting}: {name} gave no token within {DEADLINE:.0f} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise Unauthenticated(f"{setting}: {name} ended with code {process.returncode}")
    return output if len(output) <= OUTPUT_LIMIT else b""
