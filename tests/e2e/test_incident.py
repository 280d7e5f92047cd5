"""docs/how-to/incident.md, before a real API server: one incident from a refusal to the recording, of which the relay
has nothing."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from tests.blindness.reviewed_world import ReviewedWorld
from tests.e2e.test_elevation import name_request
from tests.e2e.test_recordings import EXAMPLE, recorded
from tests.readme.blocks import blocks
from tests.readme.machines import ROOT, Machines
from tests.sealing.keys import X25519_IDENTITY, X25519_RECIPIENT
from tests.support import mcp_server
from tests.support.cluster import AGENT_MANIFESTS, Cluster, Unavailable, kubectl_binary
from tests.support.processes import require_or_skip, run
from tests.support.reports import until
from tests.support.world import ALICE, ApiServer, User, arcbridge

PAGE = ROOT / "docs" / "how-to" / "incident.md"
ANNA = User("anna", ("developers",))
MARKS = {word: f"{word}{secrets.token_hex(6)}" for word in ("operators", "shop", "checkout", "checking", "gloves")}
MARKS["INC-42"] = f"INC-{secrets.randbelow(10**12)}"
"""Words of the page, and what the test types for them: each is nowhere else."""


@pytest.fixture(scope="module")
def lending(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The manifests of the agent with their component for elevation."""
    directory = tmp_path_factory.mktemp("manifests").resolve()
    component = ROOT / "config/kubernetes/components/elevation"
    variant = {"resources": [os.path.relpath(AGENT_MANIFESTS, directory)],
               "components": [os.path.relpath(component, directory)]}  # fmt: skip
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(variant))
    cluster.kubectl("apply", "-k", str(directory))
    forged = {"apiVersion": "access.arcbridge.io/v1alpha1", "kind": "AccessRequest", "metadata": {"name": "forged"},
              "spec": {"user": "other", "rule": "none", "groups": ["any"], "seconds": 1, "reason": "none"}}  # fmt: skip
    dry_run = ("create", "--dry-run=server", "-f", "-")
    until(
        lambda: "its writer's own" in cluster.kubectl(*dry_run, input=json.dumps(forged), check=False).stderr,
        "the policies are in force",
        timeout=30,
    )
    yield
    cluster.kubectl("delete", "-k", str(ROOT / "config/helm/arcbridge-agent/elevation"))
    bindings = ("developers-may-ask", "developers-read", "platform-may-approve")
    cluster.kubectl("delete", "clusterrolebinding", *bindings, "--ignore-not-found")
    cluster.kubectl("apply", "-k", str(AGENT_MANIFESTS))


@pytest.fixture(scope="module")
def world(api: ApiServer, lending: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReviewedWorld]:
    """An agent with the settings of the page; its keys open what the relay's do not."""
    (settings,) = (block.text for block in blocks(PAGE) if "[recording]" in block.text)
    settings = EXAMPLE.sub(f'"{X25519_RECIPIENT}"', settings).replace("operators", MARKS["operators"])
    with ReviewedWorld(api, end="agent", cluster="berlin", directory=tmp_path_factory.mktemp("incident")) as world:
        world.agent_audit = settings.replace("/var/lib/arcbridge-recordings", "recordings")
        yield world.start()


@pytest.mark.timeout(300)  # the grant of the page is over after 45 s
def test_each_block_of_the_page_and_what_the_relay_has_of_it(
    world: ReviewedWorld, cluster: Cluster, tmp_path: Path
) -> None:
    try:
        tool_server = mcp_server.program()
    except Unavailable as error:
        require_or_skip("npm", str(error))
    cluster.add_pod(MARKS["checkout"], MARKS["shop"], env={"PRICES": f"{MARKS['gloves']}=12"})
    people = {"anna": ANNA, "lead": ALICE, "auditor": None, "relay": None}
    replaced = {
        **MARKS,
        "30m": "45s",
        "AGENT": shlex.join([sys.executable, "-m", mcp_server.__name__, str(tool_server)]),
        "/var/lib/arcbridge": str(world.relay_config.parent / "data"),
    }
    with ExitStack() as stack:
        stack.callback(cluster.kubectl, "delete", "namespace", MARKS["shop"], "--wait=false")
        machines = {}
        for name, user in people.items():
            home = tmp_path / name
            home.mkdir()
            machines[name] = stack.enter_context(Machines(
                home, kubectl_binary("1.36"), dialled=name, names=(name,), replaced=replaced,
                environment=world.client_environment(user, home / "login") if user else {},
            ))  # fmt: skip
            if user:
                stop = {**os.environ, "HOME": str(machines[name].at(name) / "home"), "XDG_RUNTIME_DIR": ""}
                stack.callback(run, arcbridge("stop"), env=stop, check=False)
        desk = machines["auditor"].at("auditor")
        (desk / "auditor.key").write_text(X25519_IDENTITY)
        (desk / "audit.jsonl").symlink_to(world.audit_log)
        (desk / "recordings").symlink_to(world.agent_config.parent / "recordings")
        machine = machines["lead"]
        for block in blocks(PAGE):
            machine = machines.get(block.machine, machine)
            machine.run(block)
            name_request(machine, block)
            if "kubectl exec" in block.text:
                recorded(world, 1)
    world.end_and_search(MARKS.values())
