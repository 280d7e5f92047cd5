"""`python -m tests.blindness`: opens a recording with the relay's keys, says what is seen, and searches for markers.

Exit status 1: a marker was found; 2: the search could not be made.
"""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from tests.blindness.capture import BadCapture
from tests.blindness.sight import Seen, find, look, memory
from tests.blindness.tls import Closed, read_key_log


def main(argv: list[str] | None = None) -> int:
    """Run one command line; answers the exit status."""
    try:
        return _search(argv)
    except (BadCapture, Closed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _search(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.blindness", description=__doc__)
    parser.add_argument("--recording", type=Path, help="what tcpdump -w wrote")
    parser.add_argument("--port", type=int, help="the relay's port")
    parser.add_argument("--relay-keys", type=Path, help="key log of the relay")
    parser.add_argument("--client-keys", type=Path, help="key log of the client: opens what the relay cannot open")
    parser.add_argument("--write", type=Path, metavar="DIRECTORY", help="write all that the relay sees, to read it")
    parser.add_argument("--memory", type=int, metavar="PID", help="search the memory of this process as well")
    parser.add_argument("--marker", action="append", default=[], help="a text to look for; may come several times")
    arguments = parser.parse_args(argv)
    places: dict[str, bytes] = {}
    if arguments.recording is not None:
        if arguments.port is None or arguments.relay_keys is None:
            parser.error("--recording needs --port and --relay-keys")
        end_keys = None if arguments.client_keys is None else read_key_log(arguments.client_keys)
        seen = look(arguments.recording, arguments.port, read_key_log(arguments.relay_keys), end_keys)
        for number, connection in enumerate(seen, 1):
            print(describe(number, connection))
            places |= {f"connection {number}: {name}": data for name, data in connection.of_relay.items()}
            if connection.carried is not None:
                places[f"connection {number}: OPENED WITH THE CLIENT'S KEYS, from the client"] = (
                    connection.carried.from_client
                )
                places[f"connection {number}: OPENED WITH THE CLIENT'S KEYS, from the agent"] = (
                    connection.carried.from_server
                )
    if arguments.memory is not None:
        places |= memory(arguments.memory)
    if arguments.write is not None:
        arguments.write.mkdir(parents=True, exist_ok=True)
        for name, data in places.items():
            if data:
                (arguments.write / name.replace(":", "").replace(",", "").replace(" ", "-")).write_bytes(data)
    found = find(arguments.marker, places)
    print(f"{len(arguments.marker)} markers, {sum(map(len, places.values()))} bytes searched: {len(found)} found")
    for line in found:
        print(f"  {line}")
    return 1 if found else 0


def describe(number: int, seen: Seen) -> str:
    """Say in a few lines what is to be seen of a connection."""
    began = datetime.fromtimestamp(seen.recorded.began, UTC).isoformat(timespec="milliseconds")
    host, port = seen.recorded.client
    outer = seen.outer
    lines = [
        f"connection {number}: {began} from {host} port {port}, for {', '.join(outer.hello.protocols) or 'HTTP'}",
        f"  open to the relay: {len(outer.from_client)} bytes from its client, {len(outer.from_server)} to it",
    ]
    if seen.inner is not None:
        lines += [
            f"  carried: {len(outer.rest_of_client)} bytes from its client, {len(outer.rest_of_server)} to it",
            f"  readable of these: a ClientHello for {seen.inner.server_name!r}, {', '.join(seen.inner.protocols)}",
        ]
    if not seen.recorded.ended:
        lines.append("  NOT RECORDED TO ITS END")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
