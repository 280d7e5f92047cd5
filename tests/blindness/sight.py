"""What a relay sees: each connection as recorded, what its own keys open of it, and what stays closed.

A marker is looked for as it is, and as hexadecimal digits, base64 and UTF-16, in everything that was recorded and in
everything that was opened.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.blindness.capture import Connection, connections
from tests.blindness.tls import Closed, Hello, KeyLog, Opened, decrypt, hello

_BLOCK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Seen:
    """One connection at the relay."""

    recorded: Connection
    outer: Opened
    """The TLS with the relay, opened with the relay's keys."""
    inner: Hello | None
    """The beginning of the TLS between client and agent, on the client's connection; None where nothing was joined."""
    carried: Opened | None
    """The same opened with the client's keys, where these were given too."""

    @property
    def of_relay(self) -> dict[str, bytes]:
        """All that the relay has of this connection, by name."""
        return {
            "recorded, from its client": self.recorded.from_client,
            "recorded, from the relay": self.recorded.from_server,
            "handshake with the relay": self.outer.handshake,
            "told to the relay": self.outer.from_client,
            "told by the relay": self.outer.from_server,
            "carried, from its client": self.outer.rest_of_client,
            "carried, from the relay": self.outer.rest_of_server,
        }


def look(recording: Path, port: int, relay_keys: KeyLog, end_keys: KeyLog | None = None) -> list[Seen]:
    """Open what the keys open. Raises `Closed` for a connection that the relay's keys do not open, `BadCapture`."""
    seen = []
    for connection in connections(recording, port):
        if not connection.from_client:
            continue  # a probe of the port
        outer = decrypt(connection.from_client, connection.from_server, relay_keys)
        inner, carried = None, None
        for client, server in (
            (outer.rest_of_client, outer.rest_of_server),
            (outer.rest_of_server, outer.rest_of_client),
        ):
            # On the agent's connection it is the relay from which the client's bytes come.
            try:
                inner = hello(client)
            except Closed:
                continue
            try:
                carried = decrypt(client, server, end_keys or {})
            except Closed:
                pass  # as it must be, unless the client gave its keys
            break
        seen.append(Seen(connection, outer, inner, carried))
    return seen


def forms(marker: str) -> dict[bytes, str]:
    """The texts that stand for a marker -> how each is called."""
    raw = marker.encode()
    found = {raw: "as it is", marker.encode("utf-16-le"): "UTF-16"}
    found |= {raw.hex().encode(): "hexadecimal", raw.hex().upper().encode(): "hexadecimal"}
    for shift in range(3):
        padded = bytes(shift) + raw + bytes(-(shift + len(raw)) % 3)
        # The characters that depend on the marker alone.
        first, last = -(-shift * 8 // 6), (shift + len(raw)) * 8 // 6
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            found[encode(padded)[first:last]] = "base64"
    return found


def find(markers: Iterable[str], places: dict[str, bytes]) -> list[str]:
    """Say which marker is where."""
    return [
        f"{marker!r} ({how}) in {name!r}"
        for marker in markers
        for form, how in forms(marker).items()
        for name, data in places.items()
        if form in data
    ]


def memory(pid: int) -> dict[str, bytes]:
    """The writable memory of a process, region by region. Needs the right to trace it."""
    found = {}
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        for line in maps:
            span, rights, *rest = line.split()
            if "w" not in rights or "r" not in rights or rest[-1] in ("[vvar]", "[vsyscall]"):
                continue
            begin, end = (int(number, 16) for number in span.split("-"))
            data = bytearray()
            file.seek(begin)
            while begin + len(data) < end:
                try:
                    piece = file.read(min(_BLOCK, end - begin - len(data)))
                except OSError:
                    break  # unmapped in the meantime
                if not piece:
                    break
                data += piece
            found[f"memory {span}"] = bytes(data)
    return found
