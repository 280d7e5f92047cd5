"""Start-up: what a cold process may import. How long it takes is what the benchmark's study `start` measures."""

from __future__ import annotations

import subprocess
import sys

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


def test_version_imports_nothing_at_all() -> None:
    bare = subprocess.run(
        [sys.executable, "-c", "import sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    more = modules_after("--version") - set(bare.stdout.split())
    assert {name for name in more if name.partition(".")[0] != "arcbridge"} <= {"__future__", "gc"}


def test_a_client_leaves_out_what_only_others_need() -> None:
    code = "import sys, arcbridge.cli.client, arcbridge.client.service; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    loaded = set(done.stdout.split())
    assert "arcbridge.client.session_manager" in loaded, "what is looked at is what a client runs"
    assert not loaded.intersection(("aiohttp", "jwt", "nats", "prometheus_client", "sqlite3", "http.client"))
    assert not [name for name in loaded if name.startswith(("arcbridge.relay", "arcbridge.agent"))]
