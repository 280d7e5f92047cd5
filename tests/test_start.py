"""Start-up: what a cold process may import and how long it may take."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import arcbridge

HEAVY = ("ssl", "asyncio", "aiohttp", "yaml", "cryptography", "structlog", "jwt", "uvloop", "dataclasses", "inspect")


def arc(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "arcbridge", *arguments], capture_output=True, text=True, check=False, timeout=30
    )


def modules_after(*arguments: str) -> set[str]:
    code = (
        "import sys\n"
        "from arcbridge.__main__ import main\n"
        f"code = main({list(arguments)!r})\n"
        "sys.stderr.write(' '.join(sys.modules))\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("--version",),
        ("version",),
        ("--help",),
        ("--role", "client", "--help"),
        ("--role", "relay", "token", "create", "--help"),
        ("--role", "agent", "--help"),
        ("completion", "bash"),
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(arguments: tuple[str, ...]) -> None:
    loaded = modules_after(*arguments)
    assert not loaded.intersection(HEAVY)
    if arguments in (("--version",), ("version",)):
        assert "argparse" not in loaded


def test_version() -> None:
    for arguments in (("--version",), ("version",), ("-V",), ("--role", "agent", "version")):
        done = arc(*arguments)
        assert (done.returncode, done.stdout) == (0, f"arcbridge {arcbridge.__version__}\n")


@pytest.mark.parametrize(("arguments", "bound"), [(("--version",), 0.060), (("--role", "client", "--help"), 0.120)])
def test_it_is_quick(arguments: tuple[str, ...], bound: float) -> None:
    # The best of some tries is what the program costs; the rest is what else the machine does.
    best = 10.0
    for _ in range(8):
        before = time.perf_counter()
        arc(*arguments)
        best = min(best, time.perf_counter() - before)
    assert best < bound
