"""`make run` itself: with the demonstration API, which every machine can have, up to Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest

from tests.support.processes import ManagedProcess, run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scratch() -> Path:
    """Return a short path in which the demonstration makes its temporary directories, and removes them."""
    return Path(tempfile.mkdtemp(prefix="arcbridge-"))


_DISTRIBUTIONS = """
import importlib.metadata, sys
before = set(sys.modules)
import arcbridge.relay.service, arcbridge.agent.service, arcbridge.client.commands.proxy
import tests.demo.__main__, tests.demo.api
owners = importlib.metadata.packages_distributions()
names = {module.partition(".")[0] for module in set(sys.modules) - before}
print(*sorted({owner.lower() for name in names for owner in owners.get(name, ())}))
"""


def test_it_imports_nothing_beside_the_package_and_its_group() -> None:
    """`make run` installs no more than that."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    waiting = ["arcbridge", *document["dependency-groups"]["demo"]]
    installed: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")
        if name in installed or "extra ==" in requirement:
            continue
        installed.add(name)
        with contextlib.suppress(PackageNotFoundError):  # of another system
            waiting += requires(name) or ()
    loaded = run([sys.executable, "-c", _DISTRIBUTIONS], cwd=ROOT).stdout.decode().split()
    assert {name.replace("_", "-") for name in loaded} <= installed


def test_a_real_api_server_that_cannot_be_built_is_an_error(scratch: Path) -> None:
    environment = {**os.environ, "PATH": str(scratch), "XDG_CACHE_HOME": str(scratch), "TMPDIR": str(scratch)}
    for name in ("KUBECONFIG", "KUBEBUILDER_ASSETS"):
        environment.pop(name, None)
    done = run([sys.executable, "-m", "tests.demo", "--once", "--real"], env=environment, cwd=ROOT, check=False)
    assert done.returncode == 1
    error = done.stderr.decode().strip()
    assert error.startswith("error: ")
    assert "there is no Go to build them: install Go 1.26 or later" in error
    assert "\n" not in error
    assert list(scratch.iterdir()) == []


def test_it_shows_kubectl_and_leaves_nothing_behind(scratch: Path, tmp_path: Path) -> None:
    environment = {
        "PATH": str(scratch),  # no Go, so no real API server
        "XDG_CACHE_HOME": str(scratch),
        "TMPDIR": str(scratch),
        "KUBECONFIG": None,
        "KUBEBUILDER_ASSETS": None,
    }
    with ManagedProcess([sys.executable, "-m", "tests.demo"], log_dir=tmp_path, env=environment, cwd=ROOT) as demo:
        demo.wait_for_line("a small demonstration API", timeout=60)
        demo.wait_for_line("Ctrl-C ends it", timeout=60)
        output = demo.output("stdout")
        assert "alice@example.com" in output
        assert "not as it should be" not in output
        pids = [int(pid) for pid in re.findall(r"(?:relay|agent): pid (\d+)", output)]
        assert len(pids) == 2
        demo.signal(signal.SIGINT)
        assert demo.wait(30) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert [path.name for path in scratch.iterdir() if "demo" in path.name or "world" in path.name] == []
