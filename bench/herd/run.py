"""The herd's run: a relay with all its agents, SIGKILL, a new relay on the same port, and how long until all are back.

It runs in a network namespace of its own where that can be had, so that the kernel's counters are this run's alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arcbridge.pki.authority import Authority
from arcbridge.pki.enrolment import make_csr, make_key
from arcbridge.relay.data_dir import open_authority
from bench.address import Address, free_ports, listens
from bench.herd.agents import MAX_AGENTS, Orders
from bench.machine import commit, describe
from bench.process import Role
from bench.usage import cpu_seconds, resident_bytes

MAX_SECONDS = 120.0
GOAL_99, GOAL_100 = 30.0, 60.0
_CLONE_NEWNET = 0x40000000
_COUNTERS = ("ListenOverflows", "ListenDrops", "TCPReqQFullDrop", "TCPReqQFullDoCookies")
_AUTHENTICATION = """apiVersion: apiserver.config.k8s.io/v1
kind: AuthenticationConfiguration
jwt:
- issuer:
    url: https://issuer.invalid
    audiences: [arcbridge]
  claimMappings:
    username: {claim: sub, prefix: ""}
"""


def own_namespace() -> bool:
    """Move this process, and what it will start, into a network namespace with loopback only; whether that worked."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        return False
    return subprocess.run(["ip", "link", "set", "lo", "up"], check=False).returncode == 0


class Relay:
    """Starts, kills and restarts the relay's process."""

    def __init__(self, directory: Path, agents_per_second: int | None) -> None:
        self.directory = directory
        self.address, self.observe = free_ports(2)
        (directory / "authentication.yaml").write_text(_AUTHENTICATION)
        (directory / "policy.toml").write_text('[[allow]]\nusers = ["unused"]\nclusters = ["herd"]\n')
        limits = f"[limits]\nagents_per_second = {agents_per_second}\n" if agents_per_second else ""
        (directory / "relay.toml").write_text(
            f'listen = "{self.address}"\npublic_address = "{self.address}"\ndata_dir = "data"\n'
            f'authentication = "authentication.yaml"\npolicy = "policy.toml"\n'
            f'{limits}[observe]\nlisten = "{self.observe}"\nlog_level = "info"\nlog_format = "json"\n'
        )
        self.authority = open_authority(directory / "data")
        self._starts = 0
        self.role: Role

    def start(self) -> None:
        """Wait until the relay listens."""
        self._starts += 1
        argv = [sys.executable, "-m", "arcbridge", "--role", "relay", "--config", "relay.toml"]
        self.role = Role(f"relay-{self._starts}", argv, self.directory)
        self.role.wait_until(lambda: listens(self.address), "listening")

    def kill(self) -> None:
        os.kill(self.role.pid, 9)
        self.role.stop()

    def metrics(self) -> dict[str, float]:
        """Return all samples by name (without the prefix) and reason; empty when the relay does not answer."""
        try:
            with urllib.request.urlopen(f"http://{self.observe}/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            return {}
        found = re.findall(r'^arcbridge_relay_(\w+)(?:{reason="(\w+)"})? (\S+)$', text, flags=re.MULTILINE)
        return {f"{name} {reason}".strip(): float(value) for name, reason, value in found}


class Agents:
    """The process that holds the light agents."""

    def __init__(self, orders: Orders) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.herd.agents"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(orders)) + "\n")
        self._process.stdin.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    def told(self) -> dict[str, Any]:
        """Return the next count. Raises RuntimeError when the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the herd ended with {self._process.wait()}")
        count: dict[str, Any] = json.loads(line)
        return count

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


def kernel_counters() -> dict[str, int]:
    """Return this namespace's TCP counters, such as the connections that a full accept queue cost."""
    lines = Path("/proc/net/netstat").read_text().splitlines()
    names = next(line for line in lines if line.startswith("TcpExt:")).split()
    values = [line for line in lines if line.startswith("TcpExt:")][1].split()
    known = dict(zip(names, values, strict=True))
    return {name: int(known.get(name, 0)) for name in _COUNTERS}


def measure(agents: int, seconds: float, agents_per_second: int | None, restart_after: float) -> dict[str, Any]:
    """Run once. Raises RuntimeError when the herd does not even come together before the relay dies."""
    agents, seconds = min(agents, MAX_AGENTS), min(seconds, MAX_SECONDS)
    alone = own_namespace()
    with tempfile.TemporaryDirectory(prefix="arcbridge-herd-") as name:
        relay = Relay(Path(name), agents_per_second)
        relay.start()
        herd = Agents(_orders(relay, agents))
        try:
            _gather(herd, relay, agents)
            idle = _idle(relay, herd)
            result = _fall_and_rise(relay, herd, agents, seconds, restart_after)
        finally:
            herd.stop()
            relay.role.stop()
    return {
        "commit": commit(),
        "machine": describe(),
        "agents": agents,
        "own_network_namespace": alone,
        "agents_per_second": agents_per_second or "default",
        "idle": idle,
        **result,
    }


def _orders(relay: Relay, agents: int) -> Orders:
    cluster_ca, key = Authority.create("herd"), make_key()
    certificate = relay.authority.sign_agent(make_csr(key), "herd", life=86400.0, cluster_ca_pin=cluster_ca.pin)
    address: Address = relay.address
    return Orders(
        host=address.host,
        port=address.port,
        relay_ca=relay.authority.certificate_pem,
        certificate=certificate,
        key=key,
        cluster_ca=cluster_ca.certificate_pem,
        agents=agents,
        sources=min(agents // 80 + 1, 200),
        ramp=agents / 200,
    )


def _gather(herd: Agents, relay: Relay, agents: int) -> None:
    deadline = time.monotonic() + MAX_SECONDS
    while relay.metrics().get("agents") != agents:
        count = herd.told()
        if time.monotonic() > deadline:
            raise RuntimeError(f"the herd did not come together: {count}")


def _idle(relay: Relay, herd: Agents, seconds: float = 5.0) -> dict[str, float]:
    """Measure what idle agents cost the relay: its share of a core, and memory."""
    before, begun = cpu_seconds([relay.role.pid]), time.monotonic()
    while time.monotonic() - begun < seconds:
        herd.told()
    share = (cpu_seconds([relay.role.pid]) - before) / (time.monotonic() - begun)
    memory = resident_bytes([relay.role.pid])
    return {"relay_cpu_share": round(share, 3), "relay_resident_mb": round(memory / 1e6, 1)}


def _fall_and_rise(relay: Relay, herd: Agents, agents: int, seconds: float, restart_after: float) -> dict[str, Any]:
    before, attempts_before = kernel_counters(), herd.told()
    killed_at = time.monotonic()
    relay.kill()
    time.sleep(restart_after)
    relay.start()
    listening_at = time.monotonic()
    timeline: list[dict[str, float]] = []
    started_cpu, herd_cpu = cpu_seconds([relay.role.pid]), herd.told()["cpu"]
    back: dict[str, float] = {}
    count: dict[str, Any] = {}
    seen: dict[str, float] = {}
    while time.monotonic() - killed_at < seconds:
        count = herd.told()
        seen = relay.metrics()
        now, cpu = time.monotonic(), cpu_seconds([relay.role.pid])
        up = seen.get("agents", 0.0)
        timeline.append(
            {
                "s": round(now - killed_at, 2),
                "agents": up,
                "waiting": seen.get("agents_waiting", 0.0),
                "let_in": seen.get("agent_connections_total", 0.0),
                "paced": seen.get("agents_paced_total", 0.0),
                "relay_cpu_s": cpu,
            }
        )
        for part in (50, 90, 99, 100):
            if up >= agents * part / 100 and f"{part}" not in back:
                back[f"{part}"] = round(now - killed_at, 2)
        if "100" in back:
            break
    after = kernel_counters()
    while timeline and timeline[-1]["relay_cpu_s"] == 0:
        timeline.pop()
    took = time.monotonic() - listening_at
    ended = {
        word: number - attempts_before["ended"].get(word, 0)
        for word, number in count["ended"].items()
        if number > attempts_before["ended"].get(word, 0)
    }
    rates = [
        (later["let_in"] - first["let_in"]) / (later["s"] - first["s"])
        for first, later in zip(timeline, timeline[4:], strict=False)
        if later["s"] > first["s"]
    ]
    busiest = max(
        (
            (later["relay_cpu_s"] - first["relay_cpu_s"]) / (later["s"] - first["s"])
            for first, later in zip(timeline, timeline[8:], strict=False)
        ),
        default=0.0,
    )
    relay_cpu = (timeline[-1]["relay_cpu_s"] if timeline else started_cpu) - started_cpu
    return {
        "killed_to_listening_s": round(listening_at - killed_at, 2),
        "back_after_kill_s": back,
        "back_after_listening_s": {part: round(s - (listening_at - killed_at), 2) for part, s in back.items()},
        "peak_let_in_per_s": round(max(rates, default=0.0)),
        "paced": timeline[-1]["paced"] if timeline else 0,
        "rejected": {
            name.removeprefix("connections_rejected_total "): number
            for name, number in seen.items()
            if name.startswith("connections_rejected_total ") and number
        },
        "attempts": count["attempts"] - attempts_before["attempts"],
        "attempts_ended": ended,
        "hints": count["hints"] - attempts_before["hints"],
        "came_before_the_hint": count["too_early"] - attempts_before["too_early"],
        "kernel": {name: after[name] - before[name] for name in _COUNTERS},
        "relay_cpu_s": round(relay_cpu, 2),
        "relay_cpu_busiest_share": round(busiest, 2),
        "relay_cpu_share": round(relay_cpu / took, 2),
        "relay_cpu_ms_per_agent": round(relay_cpu / agents * 1000, 2),
        "herd_cpu_share": round((count["cpu"] - herd_cpu) / took, 2),
        "goals": {
            "99_percent_within_30_s": back.get("99", seconds * 2) <= GOAL_99,
            "all_within_60_s": back.get("100", seconds * 2) <= GOAL_100,
            "no_listen_overflow": after["ListenOverflows"] == before["ListenOverflows"],
        },
        "timeline": timeline,
    }
