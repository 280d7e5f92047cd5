"""Relays as processes, and the processes that hold the other ends of their connections, all on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arcbridge.pki.authority import Authority
from arcbridge.pki.enrolment import make_csr, make_key
from arcbridge.relay.data_dir import open_authority
from bench.herd.agents import Orders as HerdOrders
from bench.herd.sessions import Orders
from bench.process import NotReady
from bench.usage import cpu_seconds, resident_bytes, with_descendants
from tests.support.processes import ProcessFailed
from tests.support.reports import metrics
from tests.support.world import ALICE, RELAY_AUDIENCE, ApiServer, World

AGENTS_PER_SECOND = 160
"""At which they come to each relay for the first time: half of what it lets in, so that none is sent away."""
LONGEST = 300.0
"""Seconds for all to come: half a minute on a quiet machine, several on one that others use."""


class Hall:
    """An issuer, some relays of one CA, each with a registry of its own, and processes. Use as a context manager."""

    def __init__(self, directory: Path, relays: int = 1, *, workers: int = 1) -> None:
        unused = directory / "agent-token"
        unused.write_text("never-asked-for")
        api = ApiServer("https://127.0.0.1:1", token_file=unused)
        self.world = World(api, directory=directory / "world", relays=relays)
        self.world.relay_settings = f"workers = {workers}\n" if workers > 1 else ""
        self.relays = range(relays)
        self.processes: list[Ends] = []

    def __enter__(self) -> Hall:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.stop()
        self.world.stop()

    def start(self, limits: str) -> None:
        """Start issuer and relays; `limits`: further lines of that table. One user and few addresses stand for many."""
        self.world.start_issuer()
        self._limits = (
            f"\n[limits]\n{limits}\njoins_per_minute_per_user = 1000000\nconnections_per_second_per_address = 100000\n"
        )
        for index in self.relays:
            self.start_relay(index)
        authority = open_authority(self.world.relay_config.parent / "data")
        self._ca = authority.certificate_pem
        self._credentials: dict[str, dict[str, Any]] = {}
        for cluster in ("herd", "ends"):
            ca, key = Authority.create(cluster), make_key()
            certificate = authority.sign_agent(make_csr(key), cluster, life=86400.0, cluster_ca_pin=ca.pin)
            self._credentials[cluster] = {"certificate": certificate, "key": key, "cluster_ca": ca.certificate_pem}

    def start_relay(self, index: int) -> None:
        """Start one relay, with the limits of all; it is ready then. Raises NotReady."""
        try:
            self.world.start_relay(index, extra=self._limits)
        except ProcessFailed as error:
            raise NotReady(str(error)) from error

    def agents(self, number: int, first: int = 0, wanted: int = 1) -> Ends:
        """A process with so many agents; each has `wanted` control connections."""
        orders = HerdOrders(
            relays=self.world.relay_listens,
            wanted=wanted,
            relay_ca=self._ca,
            agents=number,
            sources=min(number // 80 + 1, 200),
            ramp=number * wanted / AGENTS_PER_SECOND / len(self.relays),
            first=first,
            **self._credentials["herd"],
        )
        return self._begin("agents", asdict(orders))

    def sessions(self, number: int, net: int) -> Ends:
        """A process with both ends of so many sessions through the first relay."""
        return self._begin("sessions", self._orders(number, net))

    def joins(self, relays: list[int], out: Path) -> Ends:
        """A process that joins at these relays again and again; `out` has a line for each."""
        ports = [int(self.world.relay_listens[index].rpartition(":")[2]) for index in relays]
        return self._begin("joins", self._orders(0, 100), ports, out=out)

    def _orders(self, number: int, net: int) -> dict[str, Any]:
        orders = Orders(
            host="127.0.0.1",
            port=self.world.relay_port,
            token=self.world.token(ALICE, RELAY_AUDIENCE),
            relay_ca=self._ca,
            cluster="ends",
            sessions=number,
            sources=40,
            net=net,
            **self._credentials["ends"],
        )
        return asdict(orders)

    def _begin(self, module: str, *orders: object, out: Path | None = None) -> Ends:
        process = Ends(f"bench.herd.{module}", orders, out)
        self.processes.append(process)
        return process

    def pids(self, *relays: int) -> list[int]:
        """The processes of these relays, or of all."""
        return [pid for one in relays or self.relays for pid in with_descendants(self.world.relays[one].pid)]

    def resident(self) -> int:
        return resident_bytes(self.pids())

    def cpu(self) -> float:
        """Seconds of CPU that the relays' processes have taken."""
        return cpu_seconds(self.pids())

    def sample(self, index: int, name: str) -> dict[str, float]:
        """Return a metric of a relay by its labels, nothing while it does not answer."""
        try:
            found = metrics(self.world.relay_observes[index])
        except (OSError, urllib.error.URLError, ValueError):
            return {}
        return {key: value for key, value in found.items() if key.startswith(f"arcbridge_relay_{name}") and value}

    def idle(self, seconds: float) -> float:
        """Percent of a core that the relays take together while nothing but pings happens."""
        before, begun = self.cpu(), time.monotonic()
        while time.monotonic() - begun < seconds:
            self.told()
        return 100 * (self.cpu() - before) / (time.monotonic() - begun)

    def told(self) -> None:
        """Read the next count of each process: a quarter of a second."""
        for process in self.processes:
            process.told()

    def wait(self, what: str, done: Callable[[], bool]) -> float:
        """Until `done()` by what the processes last told; seconds it took. Raises NotReady."""
        begun = time.monotonic()
        while not done():
            self.told()
            if time.monotonic() - begun > LONGEST:
                raise NotReady(f"{what} did not come within {LONGEST:.0f} s: {[p.last for p in self.processes]}")
        return time.monotonic() - begun


class Ends:
    """A process that takes orders as lines and says where it is, four times a second, or into the file `out`."""

    def __init__(self, module: str, orders: tuple[object, ...], out: Path | None = None) -> None:
        argv = [sys.executable, "-m", module]
        if out is None:
            self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        else:
            with out.open("wb") as file:
                self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=file, text=True)
        assert self._process.stdin is not None
        self._process.stdin.writelines(json.dumps(one) + "\n" for one in orders)
        self._process.stdin.flush()
        self._module = module
        self.last: dict[str, Any] = {}
        """The newest count. A thread reads it: of two processes one may be late with its counts, and those of the other
        would wait in its pipe and be read as if they were new."""
        self._counted = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            if line.endswith("\n"):  # it is killed in the middle of one
                self.last = json.loads(line)
                self._counted.set()

    def told(self) -> dict[str, Any]:
        """Wait for the next count. Raises NotReady when the process has ended."""
        if self._process.stdout is None:
            if self._process.poll() is not None:
                raise NotReady(f"{self._module} ended with {self._process.returncode}")
            return self.last
        while not self._counted.wait(1.0):
            if not self._reader.is_alive():
                raise NotReady(f"{self._module} ended with {self._process.wait()} after {self.last}")
        self._counted.clear()
        return self.last

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
