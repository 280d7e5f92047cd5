"""Two relays, 10 and 150 ms before their clients: which one fresh clients take, and what a keystroke costs beside the
best path, which is a client that is given the near relay alone.

Each round starts a client of each kind, in turns, with a state directory of its own, so that each is a first start.

    python -m bench.studies.nearest --rounds 10 --seconds 5
"""

from __future__ import annotations

import socket
import statistics
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from bench.address import Address
from bench.path.link import Link
from bench.path.link import Path as Way
from bench.result import rounded
from bench.studies.base import Study, run_alone
from tests.support.reports import records
from tests.support.world import ALICE, ApiServer, World, fixed_port

NEAR_MS, FAR_MS = 10.0, 150.0
PAUSE: Final = 0.02
"""Seconds between two keystrokes."""


class Nearest(Study):
    """Issue 23, point 5."""

    name = "nearest"
    title = f"two relays at {NEAR_MS:.0f} and {FAR_MS:.0f} ms: which one is taken, and a keystroke beside the best path"
    expected_s = 120.0

    def run(self, directory: Path, *, rounds: int, seconds: float) -> dict[str, Any]:
        runs: list[dict[str, Any]] = []
        with ExitStack() as stack:
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            threading.Thread(target=serve_echo, args=(server,), daemon=True).start()
            (directory / "token").write_text("an-unused-token")
            api = ApiServer(f"https://127.0.0.1:{fixed_port()}", token_file=directory / "token")
            world = stack.enter_context(World(api, directory=directory / "world", relays=2))
            world.targets["echo"] = (f"127.0.0.1:{server.getsockname()[1]}", ALICE.groups)
            links = [
                stack.enter_context(Link(Way("way", ms), Address("127.0.0.1", int(listen.rpartition(":")[2]))))
                for ms, listen in zip((NEAR_MS, FAR_MS), world.relay_listens, strict=True)
            ]
            both = [str(link.address) for link in links]
            world.client_routes = both
            world.start()
            for turn in range(rounds):
                for kind, routes in sorted({"both": both, "best": both[:1]}.items(), reverse=bool(turn % 2)):
                    world.client_routes = routes
                    process, port = world.start_forward("echo")
                    trips = keystrokes(port, seconds, pause=PAUSE, warm=5)
                    taken = records(process, "session established")[-1]["relay"]
                    process.stop()
                    runs.append(
                        {"kind": kind, "near": taken == both[0], "p50_ms": rounded(statistics.median(trips) * 1000)}
                    )
                    print(f"  {kind}: {runs[-1]}", file=sys.stderr)
        p50 = {
            kind: statistics.median(one["p50_ms"] for one in runs if one["kind"] == kind) for kind in ("both", "best")
        }
        near = [one["near"] for one in runs if one["kind"] == "both"]
        values = {
            "near_percent": 100 * sum(near) / len(near),
            "keystroke_p50_ms": p50["both"],
            "best_keystroke_p50_ms": p50["best"],
            "keystroke_ratio": p50["both"] / p50["best"],
        }
        return {"values": {name: rounded(value) for name, value in values.items()}, "runs": runs, "notes": []}


def serve_echo(server: socket.socket) -> None:
    """Answer each connection with what it sends, until the socket is closed."""
    while True:
        try:
            sock, _ = server.accept()
        except OSError:
            return  # the study is over
        threading.Thread(target=_answer, args=(sock,), daemon=True).start()


def _answer(sock: socket.socket) -> None:
    with sock, suppress(OSError):
        while data := sock.recv(4096):
            sock.sendall(data)


def keystrokes(port: int, seconds: float, *, pause: float, warm: int) -> list[float]:
    """Return the seconds of each echo of a byte, with a pause between two.

    The first `warm` ones open session and stream and do not count; as many more are made at least.
    """
    trips: list[float] = []
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(trips) < 2 * warm:
            began = time.perf_counter()
            sock.sendall(b"k")
            sock.recv(1)
            trips.append(time.perf_counter() - began)
            time.sleep(pause)
    return trips[warm:]


if __name__ == "__main__":
    run_alone(Nearest(), rounds=10, seconds=5.0)
