"""Tells a person once a day that the relay has a newer client, in one line on a terminal.

The relay names its clients in a header of an answer that the client reads anyway (`relay.http.client_files`). Nothing
is downloaded here, a pipe sees nothing, and ARCBRIDGE_NO_UPDATE_NOTICE switches it off. What the relay sends is taken
for a version only if it looks like one.
"""

from __future__ import annotations

import platform
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TextIO

from arcbridge import __version__
from arcbridge.errors import StateError
from arcbridge.pki.private_files import ensure_private_directory, read_file, write_private

HEADER: Final = "Arcbridge-Client"
"""`platform=version`, several separated by commas."""
INTERVAL: Final = 86400.0
"""Seconds between two notices."""
OFF: Final = "ARCBRIDGE_NO_UPDATE_NOTICE"

_VERSION: Final = re.compile(r"(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?([a-z0-9.+-]{0,20})", re.ASCII)


def platform_name() -> str:
    """Return this platform as a relay names it, such as `linux-x86_64`."""
    return f"{sys.platform}-{platform.machine().lower()}"


def newer(header: str, own: str = __version__, here: str = "") -> str:
    """Return the version that `header` offers for the platform `here` (default: this one) if it is above `own`.

    Empty when it is not, or when the header makes no sense. A release is above its own pre-releases (PEP 440).
    """
    here = here or platform_name()
    for entry in header[:1000].split(","):
        name, _, version = entry.strip().partition("=")
        if name == here and (offered := _order(version)) is not None:
            mine = _order(own)
            return version if mine is None or offered > mine else ""
    return ""


def tell(
    header: str,
    relay: str,
    cache: Path,
    stream: TextIO,
    environment: Mapping[str, str],
    clock: Callable[[], float] = time.time,
) -> None:
    """Write the notice to `stream` where there is something to tell and a user to read it.

    `relay`: `https://host:port` of the relay that sent `header`. `cache`: a directory of this user, which keeps when
    the last notice was. It never fails: a notice is not worth an error.
    """
    if not header or environment.get(OFF) or not stream.isatty():
        return
    version = newer(header)
    if not version:
        return
    noticed, now = cache / "update-notice", clock()
    try:
        last = float((read_file(noticed) or b"0").decode("ascii", "replace"))
        if 0 <= now - last < INTERVAL:
            return
        ensure_private_directory(cache)
        write_private(noticed, f"{now:.0f}\n".encode())
    except (StateError, ValueError):
        return
    stream.write(
        f"notice: this client is {__version__}, the relay offers {version}: {relay}/client/{platform_name()} "
        f"({OFF}=1 hides this)\n"
    )
    stream.flush()


def _order(version: str) -> tuple[int, int, int, bool] | None:
    matched = _VERSION.fullmatch(version)
    if matched is None:
        return None
    major, minor, patch, rest = matched.groups()
    return int(major), int(minor), int(patch or 0), not re.match(r"\.?(a|b|rc|dev)", rest)
