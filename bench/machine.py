"""What a result was measured on; no result without it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import ssl
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


def commit() -> str:
    """The commit that is checked out, with `+` when tracked files differ from it; `unknown` outside a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe() -> dict[str, Any]:
    """Cores, CPU, memory, kernel, versions and date."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _first("/proc/cpuinfo", "model name"),
        "memory_gb": round(int(_first("/proc/meminfo", "MemTotal").split()[0]) / 1e6, 1),
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", "Linux"),
        "python": platform.python_version(),
        "uvloop": _version("uvloop"),
        "cryptography": _version("cryptography"),
        "openssl": ssl.OPENSSL_VERSION,
        "load_average_before": load_average(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def load_average() -> float:
    """Return the load average of the last minute: before a run it shows what else the machine does."""
    return round(os.getloadavg()[0], 2)


class Steal:
    """The share of the cores' time that the hypervisor took since this object was made."""

    def __init__(self) -> None:
        self._before = self._read()

    def percent(self) -> float:
        """Return the stolen percentage of all cores' time; above a few percent, figures mean little."""
        stolen, total = (now - before for now, before in zip(self._read(), self._before, strict=True))
        return round(100 * stolen / total, 2) if total else 0.0

    @staticmethod
    def _read() -> tuple[int, int]:
        # user nice system idle iowait irq softirq steal; what follows is counted in user already.
        values = [int(value) for value in _first("/proc/stat", "cpu", " ").split()[:8]]
        return values[7], sum(values)


def neutral(text: str, scratch: Path) -> str:
    """A message without this machine's own paths: results are kept and published."""
    for path, name in ((scratch, "DIR"), (REPOSITORY, "."), (Path(sys.prefix), "PYTHON"), (Path.home(), "~")):
        if path != Path("/"):
            text = text.replace(str(path), name)
    return text


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _first(file: str, key: str, separator: str = ":") -> str:
    for line in Path(file).read_text().splitlines():
        name, _, value = line.partition(separator)
        if name.strip() == key:
            return value.strip()
    return "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
