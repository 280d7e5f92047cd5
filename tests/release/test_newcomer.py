"""docs/transcript.md: a newcomer's path from an empty environment to two clusters and back, compared with what is seen
on a terminal of 80 columns; then, in that environment, a relay of which arcbridge writes the settings.

With ARCBRIDGE_TRANSCRIPT=write the page is written anew, and the recording of its first part with its pictures; look at
the difference before you commit it. tests/readme/test_recording.py compares page, recording and pictures.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.demo.__main__ import agent_service_account, demonstration_api
from tests.readme.machines import ROOT, Machines
from tests.readme.recording import ASCIICAST, PICTURES, SCHEMES, Recording, picture_of
from tests.readme.transcript import play
from tests.support.cluster import Cluster, Unavailable, helm
from tests.support.processes import ManagedProcess, require_or_skip
from tests.support.world import ApiServer, World, fixed_port

PAGE = ROOT / "docs" / "transcript.md"


@pytest.mark.timeout(600)  # what comes from an index comes as fast as it comes
def test_a_newcomers_path(dist: Path, tmp_path: Path) -> None:
    try:
        cluster = Cluster(directory=tmp_path / "cluster")
        program = helm()
    except Unavailable as error:
        require_or_skip("apiserver", str(error))
    here = tmp_path / "here"
    relay = f"127.0.0.1:{fixed_port()}"
    issuer_ca = tmp_path / "world" / "issuer" / "ca.pem"
    recording = Recording("arcbridge: the first ten minutes", {str(here): "~", relay: "relay.example.com"})
    with (
        cluster,
        demonstration_api(tmp_path / "api") as munich,
        World(munich.api, directory=tmp_path / "world") as world,
        Machines(
            tmp_path,
            cluster.binaries.kubectl,
            recording=recording,
            dialled="here",
            replaced={"relay.example.com": relay},
            names=("here",),
            path=str(here / "env" / "bin"),
            issuer_ca=issuer_ca,
            # A public issuer's certificate comes from a public CA, and a person has a browser.
            environment={"ARCBRIDGE_OIDC_CA_FILE": str(issuer_ca), "ARCBRIDGE_GRANT_TYPE": "device-code"},
        ) as machines,
    ):
        programs = tmp_path / "programs"
        (programs / "helm").symlink_to(program)
        # The interpreter below this environment: an environment is made of that one.
        below = Path(sys.base_prefix) / "bin" / "python3"
        (programs / "python3").write_text(f'#!/bin/sh\nexec {below} "$@"\n')
        (programs / "python3").chmod(0o755)
        for wheel in dist.glob("*.whl"):
            shutil.copy(wheel, here)
        world.start_issuer()
        recording.replaced[world.issuer.url.removeprefix("https://")] = "login.example.com"
        write_files(world, relay, {"berlin-factory": real(cluster, here), "munich": munich.api}, here)
        seen = play(PAGE, machines)
    if os.environ.get("ARCBRIDGE_TRANSCRIPT") == "write":
        PAGE.write_text(seen, encoding="utf-8")
        ASCIICAST.write_text(recording.asciicast(), encoding="utf-8")
        for scheme in SCHEMES:
            PICTURES[scheme].write_text(picture_of(recording.asciicast(), scheme), encoding="utf-8")
    assert seen.splitlines() == PAGE.read_text(encoding="utf-8").splitlines()
    three_commands(here / "env" / "bin", next(here.glob("*.whl")), tmp_path / "initial")


def three_commands(programs: Path, wheel: Path, directory: Path) -> None:
    """From `pip install` to a relay that serves; the page has uninstalled arcbridge, and no more."""
    directory.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ARCBRIDGE"))}
    environment |= {"PATH": f"{programs}:{environment['PATH']}", "HOME": str(directory)}
    port, observe = fixed_port(), fixed_port()
    # 1
    install = [str(programs / "pip"), "install", "--quiet", "--disable-pip-version-check", "--no-index", str(wheel)]
    subprocess.run(install, env=environment, cwd=directory, check=True)
    # 2
    done = subprocess.run(
        [
            *(str(programs / "arcbridge"), "--role", "relay", "config", "init", "--directory", str(directory / "etc")),
            *("--public-address", f"127.0.0.1:{port}", "--issuer", "https://login.test", "--group", "platform"),
            *("--data-dir", str(directory / "data"), "--observe-listen", f"127.0.0.1:{observe}"),
        ],
        env=environment,
        cwd=directory,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert sorted(file.name for file in (directory / "etc").iterdir()) == [
        "policy.toml", "relay-authentication.yaml", "relay.toml"
    ]  # fmt: skip
    # 3: as it was printed
    command = shlex.split(done.stdout.splitlines()[-1])
    assert command[0] == "arcbridge"
    command[0] = str(programs / "arcbridge")
    with ManagedProcess(command, log_dir=directory / "logs", name="relay", cwd=directory, env=environment) as relay:
        relay.wait_for_url(f"http://127.0.0.1:{observe}/readyz", timeout=60)
        assert (directory / "data" / "ca.crt").is_file()


def real(cluster: Cluster, directory: Path) -> ApiServer:
    """Give a real API server the agent's ServiceAccount, and alice's group a role."""
    cluster.grant("edit", group="platform")
    token = directory / "agent-token"
    token.write_text(agent_service_account(cluster))
    token.chmod(0o600)
    return ApiServer(cluster.api_url, Path(cluster.ca_file), token)


def write_files(world: World, relay: str, clusters: Mapping[str, ApiServer], directory: Path) -> None:
    """Write the files of docs/tutorial.md for a relay at an address, and for an agent of each cluster."""
    (directory / "relay-authentication.yaml").write_text(world.authentication("arcbridge-relay"))
    (directory / "agent-authentication.yaml").write_text(world.authentication("arcbridge"))
    (directory / "policy.toml").write_text(world.policy)
    (directory / "relay.toml").write_text(
        f'listen = "{relay}"\npublic_address = "{relay}"\ndata_dir = "relay-data"\n'
        'authentication = "relay-authentication.yaml"\npolicy = "policy.toml"\n'
        f'[login]\nissuer = "{world.issuer.url}"\nclient_id = "arcbridge"\n'
    )
    for name, api in clusters.items():
        (directory / f"{name}.toml").write_text(
            f'relays = ["https://{relay}"]\nrelay_ca_file = "relay-data/ca.crt"\njoin_token_file = "{name}.token"\n'
            f'authentication = "agent-authentication.yaml"\n[state]\ndirectory = "{name}-state"\n'
            f'[audit]\nfile = "{name}-audit.jsonl"\n[kubernetes]\nserver = "{api.url}"\n'
            f'ca_file = "{api.ca_file}"\ntoken_file = "{api.token_file}"\n'
        )
