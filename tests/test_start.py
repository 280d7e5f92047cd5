"""Start-up: what a cold process may import. How long it takes is what the benchmark's study `start` measures."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

import arcbridge
from arcbridge.build import build
from tests.client.far_side import CLUSTER, CLUSTER_CA, RELAY_CA, FarSide
from tests.client.session.test_session_manager import login

HEAVY = (
    "ssl",
    "asyncio",
    "aiohttp",
    "yaml",
    "cryptography",
    "structlog",
    "jwt",
    "uvloop",
    "dataclasses",
    "inspect",
    "lzma",
)


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


def test_whoami_imports_no_event_loop_and_no_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells ask it for their prompts: it reads files, and is to answer within 150 ms."""
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / "token"
    token.write_text("a.b.c")
    loaded = modules_after("whoami", "--access-token-file", str(token))
    assert "arcbridge.client.credentials.identity_summary" in loaded
    assert not loaded.intersection(HEAVY) - {"dataclasses", "inspect"}


def test_an_operators_command_imports_no_http() -> None:
    """They are typed on call, and aiohttp is a third of what they would import."""
    code = "import sys, arcbridge.relay.admin, arcbridge.relay.settings; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert "aiohttp" not in done.stdout.split()


def test_version() -> None:
    for arguments in (("--version",), ("version",), ("-V",), ("--role", "agent", "version")):
        done = arc(*arguments)
        version = build() if "version" in arguments else arcbridge.__version__
        assert (done.returncode, done.stdout) == (0, f"arcbridge {version}\n")


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


LIBRARIES = frozenset({"aiofastnet", "filelock", "structlog", "uvloop", "yaml", "_yaml"})
"""What a starting client may import besides the standard library: another one is paid for at every start."""
LEFT_OUT = frozenset({"email", "html", "http", "multiprocessing", "sqlite3", "unittest", "webbrowser", "xml"})
"""Parts of the standard library that cost milliseconds and that only other commands need."""
OTHERS = (
    *(
        "arcbridge.relay",
        "arcbridge.agent",
        "arcbridge.identity",
        "arcbridge.observe.server",
        "arcbridge.observe.health",
    ),
    *(
        "arcbridge.client.credentials.login",
        "arcbridge.client.credentials.issuer",
        "arcbridge.client.commands.directory",
        "arcbridge.client.serving.observation",
    ),
    *("arcbridge.pki.authority", "arcbridge.pki.enrolment", "arcbridge.pki.credentials"),
)
"""Our own modules for other roles, for a login, for metrics, and for making certificates."""


def imported_by_a_start(far: FarSide, directory: Path) -> set[str]:
    """Run `proxy` until its endpoint serves; the modules that it has imported then."""
    arguments = [
        *("--role", "client", "--relay", far.address, "--relay-ca-file", str(directory / "ca.pem")),
        *("--relay-ca-pin", RELAY_CA.pin, "-n", CLUSTER, "--cluster-ca-pin", CLUSTER_CA.pin, "--port", "0"),
        *("-f", str(directory / "kubeconfig"), "--state-dir", str(directory / "state")),
        *("--access-token-file", str(directory / "access"), "--id-token-file", str(directory / "id")),
    ]
    # The last line that `proxy` prints is that it serves.
    code = (
        "import os, sys\n"
        "bare = set(sys.modules)\n"
        "class Out:\n"
        "    def write(self, text):\n"
        "        if text.startswith('Press Ctrl+C'):\n"
        "            os.write(1, ' '.join(set(sys.modules) - bare).encode())\n"
        "            os._exit(0)\n"
        "    def flush(self): pass\n"
        "    def isatty(self): return False\n"
        "sys.stdout = Out()\n"
        "from arcbridge.__main__ import main\n"
        f"sys.exit(main({arguments!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


async def test_what_a_starting_client_imports(tmp_path: Path) -> None:
    """The second start of a user is judged: the first one makes keys and certificates."""
    (tmp_path / "ca.pem").write_text(RELAY_CA.certificate_pem)
    login(tmp_path)
    async with FarSide() as far:
        first = await asyncio.to_thread(imported_by_a_start, far, tmp_path)
        loaded = await asyncio.to_thread(imported_by_a_start, far, tmp_path)
    assert "cryptography" in first
    assert "arcbridge.client.session.session_manager" in loaded, "what is looked at is what a client runs"
    tops = {name.partition(".")[0] for name in loaded}
    # The libraries written in Cython share modules that Cython makes in memory; no file is imported.
    made = ("_sysconfigdata", "_cython_", "cython_runtime")
    installed = {name for name in tops if name not in sys.stdlib_module_names and not name.startswith(made)}
    assert installed - {"arcbridge", "__main__"} <= LIBRARIES
    assert tops & LEFT_OUT == set()
    assert {name for name in loaded if name.startswith(OTHERS)} == set()
