"""From `pip install` to a relay that serves, in three commands: a wheel, an empty environment, no clone."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from arcbridge import __version__
from tests.support.processes import ManagedProcess
from tests.support.world import fixed_port

# What comes from an index comes as fast as it comes.
pytestmark = pytest.mark.timeout(600)


def test_three_commands(dist: Path, index: None, tmp_path: Path) -> None:
    wheel = dist / f"arcbridge-{__version__}-py3-none-any.whl"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ARCBRIDGE"))}
    environment |= {"PATH": f"{tmp_path / 'venv' / 'bin'}:{environment['PATH']}", "HOME": str(tmp_path)}
    port, observe = fixed_port(), fixed_port()
    # 1
    install = ["pip", "install", "--quiet", "--disable-pip-version-check", str(wheel)]
    subprocess.run(install, env=environment, cwd=tmp_path, check=True)
    # 2
    done = subprocess.run(
        [
            *("arcbridge", "--role", "relay", "config", "init", "--directory", str(tmp_path / "etc")),
            *("--public-address", f"127.0.0.1:{port}", "--issuer", "https://login.test", "--group", "platform"),
            *("--data-dir", str(tmp_path / "data"), "--observe-listen", f"127.0.0.1:{observe}"),
        ],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert sorted(file.name for file in (tmp_path / "etc").iterdir()) == [
        "policy.toml", "relay-authentication.yaml", "relay.toml"
    ]  # fmt: skip
    # 3: as it was printed
    command = shlex.split(done.stdout.splitlines()[-1])
    assert command[0] == "arcbridge"
    command[0] = str(tmp_path / "venv" / "bin" / "arcbridge")
    with ManagedProcess(command, log_dir=tmp_path / "logs", name="relay", cwd=tmp_path, env=environment) as relay:
        relay.wait_for_url(f"http://127.0.0.1:{observe}/readyz", timeout=60)
        assert (tmp_path / "data" / "ca.crt").is_file()
