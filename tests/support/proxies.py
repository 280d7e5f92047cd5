"""Real outbound proxies on loopback: tinyproxy (HTTP CONNECT) and microsocks (SOCKS 5), each with credentials."""

from __future__ import annotations

import re
import shutil
import socket
import time
from pathlib import Path
from typing import Self
from urllib.parse import quote

from tests.support.processes import ManagedProcess, require_or_skip
from tests.support.world import fixed_port

USER, PASSWORD = "alice", "pr0xyS3crEt"
"""tinyproxy takes letters and digits alone; what is percent-encoded is for tests/net/test_proxy.py."""


class OutboundProxy:
    """A running proxy; use as a context manager."""

    scheme = ""
    mark = ""
    """What the line of its log says in which it names a target."""

    def __init__(self, directory: Path) -> None:
        self.port = fixed_port()
        self.process = ManagedProcess(self._command(directory), name=f"{self.scheme}-proxy", log_dir=directory)
        self._wait()

    def _command(self, directory: Path) -> list[str]:
        raise NotImplementedError

    def _wait(self) -> None:
        deadline = time.monotonic() + 15
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                if time.monotonic() > deadline or not self.process.running:
                    raise
                time.sleep(0.02)  # until it listens

    def url(self, *, user: str = USER, password: str = PASSWORD) -> str:
        """The proxy as HTTPS_PROXY and ALL_PROXY name it."""
        return f"{self.scheme}://{quote(user, safe='')}:{quote(password, safe='')}@127.0.0.1:{self.port}"

    def carried(self, port: int) -> int:
        """Say how many connections to a port of loopback the proxy was asked for."""
        named = re.compile(rf"127\.0\.0\.1:{port}\b")
        return len([line for line in self.process.lines() if self.mark in line and named.search(line)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stop()


class Tinyproxy(OutboundProxy):
    """Debian's tinyproxy: takes CONNECT to every port."""

    scheme = "http"
    mark = "CONNECT "

    def _command(self, directory: Path) -> list[str]:
        program = shutil.which("tinyproxy")
        if program is None:
            require_or_skip("proxies", "tinyproxy is not installed (apt-get install tinyproxy)")
        directory.mkdir(parents=True, exist_ok=True)
        settings = directory / "tinyproxy.conf"
        settings.write_text(
            f"Port {self.port}\nListen 127.0.0.1\nTimeout 600\nMaxClients 100\nLogLevel Connect\n"
            f"BasicAuth {USER} {PASSWORD}\n"
        )
        return [program, "-d", "-c", str(settings)]


class Microsocks(OutboundProxy):
    """Debian's microsocks."""

    scheme = "socks5"
    mark = "connected to"

    def _command(self, directory: Path) -> list[str]:
        program = shutil.which("microsocks")
        if program is None:
            require_or_skip("proxies", "microsocks is not installed (apt-get install microsocks)")
        return [program, "-i", "127.0.0.1", "-p", str(self.port), "-u", USER, "-P", PASSWORD]


PROXIES = {"http": Tinyproxy, "socks5": Microsocks}
