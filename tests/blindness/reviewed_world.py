"""An organisation of which a reviewer has all that its relay has: the bytes at its port and the keys to them, its
memory, and what it keeps.

A search of ciphertext finds nothing in any case. Therefore one of the ends gives its keys away too: what is looked for
in vain at the relay has to be there, in the same recording.
"""

from __future__ import annotations

import errno
import shutil
import signal
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.blindness.capture import connections
from tests.blindness.sight import Seen, find, look, memory
from tests.blindness.tls import read_key_log
from tests.support.processes import ManagedProcess, ProcessFailed, require_or_skip
from tests.support.reports import page, until
from tests.support.world import ApiServer, World


class ReviewedWorld(World):
    """Relay and `end` give their TLS keys away; tcpdump records the relay's port from the relay's start on."""

    def __init__(self, api: ApiServer, *, end: str = "client", **options: Any) -> None:
        super().__init__(api, **options)
        self.end = end
        self.recording = self.directory / "relay.pcap"
        self.unrecorded = ""
        """Why there is no recording."""
        self._tcpdump: ManagedProcess | None = None

    def keys_of(self, role: str) -> Path:
        """The key log of a role."""
        return self.directory / f"{role}.keys"

    def _start(self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> ManagedProcess:
        role = name.partition("-")[0]
        if role in ("relay", self.end):
            at = argv.index("arcbridge")
            argv = [*argv[:at], "tests.blindness.keylog", str(self.keys_of(role)), *argv[at + 1 :]]
        return super()._start(name, argv, env)

    def start_relay(self, index: int = 0, *, extra: str = "") -> ManagedProcess:
        """Start recording with the first relay, then the relay."""
        if self._tcpdump is None and not self.unrecorded:
            self._record()
        return super().start_relay(index, extra=extra)

    def _record(self) -> None:
        tcpdump = shutil.which("tcpdump") or shutil.which("tcpdump", path="/usr/sbin:/sbin")
        if tcpdump is None:
            self.unrecorded = "tcpdump is missing; install it"
            return
        process = ManagedProcess(
            [
                *(tcpdump, "-i", "lo", "-s", "0", "-B", "65536", "--immediate-mode", "-U", "-w", self.recording),
                *("tcp", "port", str(self.relay_port)),
            ],
            log_dir=self.logs,
            name="tcpdump",
        )
        self.processes.append(process)
        try:
            process.wait_for_line("listening on", timeout=15)
        except ProcessFailed:
            self.unrecorded = f"tcpdump may not record: {process.tail()}"
        else:
            self._tcpdump = process

    def stop_recording(self) -> None:
        """End tcpdump as Ctrl-C does, once it has written the last packet of a relay that has ended: it leaves what the
        kernel still holds for it."""
        if self._tcpdump is None:
            require_or_skip("tcpdump", self.unrecorded)
        with socket.socket() as last:
            last.bind(("127.0.0.1", 0))
            assert last.connect_ex(("127.0.0.1", self.relay_port)) == errno.ECONNREFUSED
            near = last.getsockname()
        recorded = self.recording, self.relay_port
        until(lambda: near in [each.client for each in connections(*recorded)], "the last SYN is recorded")
        self._tcpdump.signal(signal.SIGINT)
        self._tcpdump.wait(15)
        self._tcpdump.wait_for_line("^0 packets dropped by kernel", timeout=5)

    def look(self, *, end: bool = False) -> list[Seen]:
        """Open the recording with the relay's keys, and with those of `end` if asked to."""
        keys = read_key_log(self.keys_of(self.end)) if end else None
        return look(self.recording, self.relay_port, read_key_log(self.keys_of("relay")), keys)

    def relay_memory(self) -> dict[str, bytes]:
        """The memory of the running relay."""
        try:
            return memory(self.relay.pid)
        except PermissionError:
            require_or_skip("tcpdump", "only root may read the memory of a role")

    def relay_kept(self) -> dict[str, bytes]:
        """What the relay has written: its logs, and its data directory with registry and audit log."""
        files = (*self.logs.glob("relay*"), *(self.relay_config.parent / "data").rglob("*"))
        return {file.name: file.read_bytes() for file in files if file.is_file()}

    def relay_pages(self) -> dict[str, bytes]:
        """What the running relay's listener for monitoring answers."""
        return {path: page(self.relay_observe, path).encode() for path in ("/metrics", "/statusz")}

    def end_and_search(self, hidden: Iterable[str]) -> None:
        """End everyone, and look for each text: at the relay it is nowhere, and `end` has it."""
        has = self.relay_memory() | self.relay_pages()
        for process in reversed(self.processes):
            if process is not self._tcpdump:
                process.stop()
        self.stop_recording()
        has |= self.relay_kept()
        carried = b""
        for number, seen in enumerate(self.look(end=True)):
            has |= {f"connection {number}: {name}": data for name, data in seen.of_relay.items()}
            if seen.carried is not None:
                carried += seen.carried.from_client + seen.carried.from_server
        assert find([self.cluster], has), "the search finds what a relay knows"
        for text in hidden:
            assert find([text], has) == []
            assert find([text], {"carried": carried}), f"{text} was under way"
