"""Collectors of audit records as processes of their own, which can be killed at any time: HTTP, syslog, and rsyslog."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import trustme

from tests.support import collector_program
from tests.support.processes import ManagedProcess, require_or_skip
from tests.support.reports import until

ROOT = Path(__file__).resolve().parents[2]


class Collector:
    """The process. `kind`: http, syslog, or rsyslog. The port stays the same over `kill` and `start`."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind, self.port = kind, _free_port()
        directory.mkdir(exist_ok=True)
        self.out = directory / "received"
        self.ca = directory / "ca.pem"
        self._directory = directory
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.ca)
        issued = authority.issue_cert("127.0.0.1", "localhost")
        issued.private_key_and_cert_chain_pem.write_to_path(directory / "server.pem")
        issued.cert_chain_pems[0].write_to_path(directory / "server.crt")
        issued.private_key_pem.write_to_path(directory / "server.key")
        self._process: ManagedProcess | None = None
        self._starts = 0

    def start(self) -> None:
        self._starts += 1
        self._process = ManagedProcess(
            self._command(), log_dir=self._directory, name=f"{self.kind}-{self._starts}", cwd=ROOT
        )
        if self.kind == "rsyslog":
            until(lambda: _listens(self.port), "rsyslog listens")
        else:
            self._process.wait_for_line("ready")

    def _command(self) -> list[str]:
        if self.kind != "rsyslog":
            pem = str(self._directory / "server.pem")
            return [sys.executable, collector_program.__file__, self.kind, str(self.port), pem, str(self.out)]
        program = shutil.which("rsyslogd", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None or not list(Path("/usr/lib").glob("**/rsyslog/lmnsd_ossl.so")):
            require_or_skip("rsyslog", "rsyslog is not on this machine (Debian: rsyslog, rsyslog-openssl)")
        settings = self._directory / "rsyslog.conf"
        settings.write_text(_RSYSLOG.format(directory=self._directory, port=self.port, out=self.out))
        return [program, "-n", "-f", str(settings), "-i", str(self._directory / "rsyslog.pid")]

    def kill(self) -> None:
        """SIGKILL, whatever it does."""
        assert self._process is not None
        self._process.kill()
        self._process = None

    def forget(self) -> None:
        """Begin anew for another test."""
        for suffix in ("", ".refuse", ".requests"):
            self.out.with_suffix(suffix).unlink(missing_ok=True)

    def refuse(self, status: int = 0, *headers: str) -> None:
        """Answer with this status from now on; 0: take records again."""
        file = self.out.with_suffix(".refuse")
        if status:
            file.write_text("\n".join([str(status), *headers]))
        else:
            file.unlink(missing_ok=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def lines(self) -> list[str]:
        """What has arrived: records, or with syslog what each message was, as JSON."""
        if not self.out.exists():
            return []
        text = self.out.read_text()
        return text.split("\n")[:-1]

    @property
    def texts(self) -> list[str]:
        """The records that have arrived, as the file of the log has them."""
        return [json.loads(line)["msg"] for line in self.lines] if self.kind == "syslog" else self.lines

    @property
    def requests(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.out.with_suffix(".requests").read_text().splitlines()]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self.kill()


_RSYSLOG = """
global(workDirectory="{directory}" maxMessageSize="64k" defaultNetstreamDriver="ossl"
    defaultNetstreamDriverCAFile="{directory}/ca.pem" defaultNetstreamDriverCertFile="{directory}/server.crt"
    defaultNetstreamDriverKeyFile="{directory}/server.key")
module(load="imtcp" streamDriver.mode="1" streamDriver.authMode="anon")
template(name="whole" type="list") {{
    property(name="structured-data") constant(value="\t") property(name="msg") constant(value="\n")
}}
ruleset(name="records") {{ action(type="omfile" file="{out}" template="whole") }}
input(type="imtcp" address="127.0.0.1" port="{port}" ruleset="records")
"""


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def once(texts: list[str]) -> list[str]:
    """What is left of records that arrived at least once, by chain and number, in the order of their first arrival."""
    first: dict[tuple[str, int], str] = {}
    for text in texts:
        fields = json.loads(text)
        first.setdefault((fields["chain"], fields["seq"]), text)
    return list(first.values())
