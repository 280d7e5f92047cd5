"""Runs a program of the user's settings that prints a token, and returns what it printed.

It neither interprets what was printed nor keeps it, and reads no more than `OUTPUT_LIMIT`. Invariant: no byte of the
output is in an error, because it may be a token, and the program has ended when `output_of` returns or raises.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from arcbridge.errors import Unauthenticated

DEADLINE = 120.0
"""Seconds: a program may itself ask the user."""
OUTPUT_LIMIT = 256 * 1024
"""Bytes of the output: several tokens with many groups are some ten KiB."""


async def output_of(setting: str, command: tuple[str, ...], environment: Mapping[str, str] | None = None) -> bytes:
    """Return the standard output of `command`.

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
    assert process.stdout is not None
    output = bytearray()
    try:
        async with asyncio.timeout(DEADLINE):
            while received := await process.stdout.read(65536):
                output += received
                if len(output) > OUTPUT_LIMIT:
                    most = f"more than {OUTPUT_LIMIT // 1024} KiB, which is no token"
                    raise Unauthenticated(f"{setting}: {name} printed {most}")
            await process.wait()
    except TimeoutError as error:
        raise Unauthenticated(f"{setting}: {name} gave no token within {DEADLINE:.0f} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise Unauthenticated(f"{setting}: {name} ended with code {process.returncode}")
    return bytes(output)
