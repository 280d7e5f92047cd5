"""Where the time of each role goes, under bulk and under small echoes: by Linux's own sampling, which slows nothing.

What cProfile cannot show: the kernel's share, OpenSSL's, the copies. Shares are of the role's own CPU time.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from bench.load.generator import Generator
from bench.peers.arcbridge import Arcbridge
from bench.peers.base import Unavailable
from bench.process import NotReady
from bench.studies.base import Study
from bench.usage import cpu_seconds

ROLES = ("client", "relay", "agent")
LOADS: dict[str, tuple[tuple[str, dict[str, int]], ...]] = {
    "bulk": (("up", {}), ("down", {})),
    "echoes": (("many", {"connections": 32}),),
}
PARTS = (
    ("kernel", r"\[kernel|\[guest|vmlinux"),
    ("tls", r"libcrypto|libssl|_ssl\."),
    ("copies", r"libc\.so|libc-|ld-linux"),
    ("uvloop", r"^loop\.cpython"),
    ("python", r"libpython|python3|\.cpython-.*\.so"),
)
"""ClientContext of a process by the object that code lies in. The C library is almost only `memcpy` here."""
SYMBOLS = 12
_LINE = re.compile(r"^\s*([0-9.]+)%\s+(\S+)\s*$")
_SYMBOL = re.compile(r"^\s*([0-9.]+)%\s+\[(k|\.)\]\s+(\S+)")


class Profile(Study):
    """Samples of each role's processes while a load runs."""

    name = "profile"
    title = "where each role's CPU time goes: kernel, TLS, copies, Python, event loop"

    def run(self, directory: Path, *, rounds: int, seconds: float) -> dict[str, Any]:
        perf = shutil.which("perf")
        if perf is None:
            raise Unavailable("needs perf (Debian: apt-get install linux-perf)")
        seconds = max(seconds, 2.0)
        load = Generator()
        values: dict[str, float] = {}
        runs = []
        with load.target() as target:
            peer = Arcbridge()
            place = directory / "arcbridge"
            place.mkdir()
            try:
                peer.start(target.address, place)
                for name, commands in LOADS.items():
                    for command, options in commands:
                        found = _sample(perf, peer, load, command, options, seconds, directory)
                        runs.append({"load": name, "command": command, **found})
                    mine = [run for run in runs if run["load"] == name]
                    for role in ROLES:
                        for part, _ in (*PARTS, ("other", "")):
                            shares = [run["parts_percent"][role].get(part, 0.0) for run in mine]
                            values[f"{name}_{role}_{part}_percent"] = round(sum(shares) / len(shares), 1)
            finally:
                peer.stop()
        return {"values": values, "runs": runs, "notes": ["shares of each role's own CPU time, sampled by perf"]}


def _sample(
    perf: str, peer: Arcbridge, load: Generator, command: str, options: dict[str, int], seconds: float, directory: Path
) -> dict[str, Any]:
    recorders = {}
    for role in ROLES:
        pids = ",".join(map(str, peer.pids(role)))
        out = str(directory / f"{role}.data")
        argv = [perf, "record", "-q", "-F", "499", "-o", out, "-p", pids, "--", "sleep", str(seconds + 1)]
        recorders[role] = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(0.7)  # until they record; nothing moves meanwhile
    before = {role: cpu_seconds(peer.pids(role)) for role in ROLES}
    try:
        measured = load.run(command, peer.endpoint, seconds=seconds, warmup=0.3, **options)
    finally:
        for recorder in recorders.values():
            try:
                recorder.wait(seconds + 20)
            except subprocess.TimeoutExpired:
                recorder.kill()
                recorder.wait()
    cpu = {role: round(cpu_seconds(peer.pids(role)) - before[role], 2) for role in ROLES}
    if any(recorder.returncode for recorder in recorders.values()):
        raise NotReady("perf could not record (kernel.perf_event_paranoid must be 1 or less, or run it as root)")
    parts, symbols = {}, {}
    for role in ROLES:
        out = str(directory / f"{role}.data")
        parts[role] = parts_of(_report(perf, out, "dso"))
        symbols[role] = symbols_of(_report(perf, out, "symbol"))
    told: dict[str, Any] = {key: measured[key] for key in ("mb_per_s", "per_s") if key in measured}
    return {**told, "cpu_s": cpu, "parts_percent": parts, "symbols_percent": symbols}


def _report(perf: str, path: str, by: str) -> str:
    argv = [perf, "report", "-i", path, "--stdio", "--no-children", "-g", "none", "--sort", by]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout


def parts_of(report: str) -> dict[str, float]:
    """Return percent by part, read from `perf report --sort dso`."""
    found: dict[str, float] = {}
    for line in report.splitlines():
        read = _LINE.match(line)
        if read is not None:
            part = next((part for part, pattern in PARTS if re.search(pattern, read[2])), "other")
            found[part] = round(found.get(part, 0.0) + float(read[1]), 2)
    return found


def symbols_of(report: str) -> list[tuple[float, str]]:
    """The functions with the largest shares, of `perf report --sort symbol`; those of the kernel are marked."""
    found = []
    for line in report.splitlines():
        read = _SYMBOL.match(line)
        if read is not None and not read[3].startswith("0x"):
            found.append((float(read[1]), f"kernel: {read[3]}" if read[2] == "k" else read[3]))
    return found[:SYMBOLS]
