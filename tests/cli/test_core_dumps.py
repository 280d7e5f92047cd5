"""docs/threats.md#W10: no core dump, and no other program reads the memory or the environment of a role."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.second_user import OWNER, as_user, require_users

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="LEFT OUT: reads /proc")

CODE = """
import os, resource, signal, sys
resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
from arcbridge.cli.core_dumps import forbid_core_dumps
forbid_core_dumps()
print(resource.getrlimit(resource.RLIMIT_CORE), open("/proc/self/status").read().count("\\n") > 10, flush=True)
sys.stdin.readline()
# What arcbridge itself asks of /proc goes on: descriptors by path, of its own process.
number = os.memfd_create("x")
assert os.path.exists(f"/proc/self/fd/{number}") and open(f"/proc/self/fd/{number}").read() == ""
assert len(os.listdir("/proc/self/fd")) > 3
os.kill(os.getpid(), signal.SIGABRT)
"""

NEIGHBOUR = """
import os, sys
for name in ("environ", "mem", "maps", "fd/0", "cwd", "auxv"):
    try:
        descriptor = os.open(f"/proc/{sys.argv[1]}/{name}", os.O_RDONLY)
        if name != "mem":
            os.read(descriptor, 10)
        print(name)
    except OSError:
        pass
"""


def role(tmp_path: Path, *prefix: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", CODE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
    )


def end(process: subprocess.Popen[bytes]) -> int:
    process.communicate(b"\n", timeout=30)
    return int(process.returncode)


def test_a_crash_leaves_no_core(tmp_path: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    process = role(tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == f"{(0, hard)} True\n".encode()
    assert end(process) == -signal.SIGABRT
    assert list(tmp_path.iterdir()) == []


def python(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def test_a_python_without_ctypes() -> None:
    code = (
        "import sys\nsys.modules['ctypes'] = None\n"
        "from arcbridge.cli.core_dumps import forbid_core_dumps\nforbid_core_dumps()\n"
        "import resource\nprint(resource.getrlimit(resource.RLIMIT_CORE)[0])\n"
    )
    assert python(code) == "0"


@pytest.mark.parametrize("debuggable", ["", "1"])
def test_no_keys_of_tls_sessions_are_written(tmp_path: Path, debuggable: str) -> None:
    code = (
        "from arcbridge.cli.core_dumps import forbid_core_dumps\nforbid_core_dumps()\n"
        "import ssl\nprint(ssl.create_default_context().keylog_filename)\n"
    )
    keys = str(tmp_path / "keys")
    named = python(code, SSLKEYLOGFILE=keys, ARCBRIDGE_DEBUGGABLE=debuggable)
    assert named == (keys if debuggable else "None")
    assert (tmp_path / "keys").exists() == bool(debuggable)


@pytest.mark.parametrize("debuggable", ["", "1"])
def test_a_program_of_the_same_user_reads_no_memory(tmp_path: Path, debuggable: str) -> None:
    """The second case is that of a debugger; it also shows that the first one would notice."""
    require_users()
    process = role(tmp_path, *as_user(OWNER), ARCBRIDGE_DEBUGGABLE=debuggable)
    assert process.stdout is not None
    limit = process.stdout.readline()
    command = [*as_user(OWNER), sys.executable, "-c", NEIGHBOUR, str(process.pid)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    assert end(process) == -signal.SIGABRT
    if debuggable:
        assert {"environ", "mem", "maps"} <= set(done.stdout.split())
    else:
        assert done.stdout == ""
        assert limit.startswith(b"(0, ")
