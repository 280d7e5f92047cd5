"""README.md, block by block as a reader types it, with the demonstration API in place of a cluster.

What the README tells its reader to have first is prepared here: the relay's files in /etc/arcbridge, and the agent,
which no container engine starts in a test.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.demo.__main__ import demonstration_api
from tests.readme.blocks import blocks
from tests.readme.machines import ROOT, Machines
from tests.support.cluster import kubectl_versions
from tests.support.world import World


@pytest.mark.timeout(240)
def test_every_block_of_the_readme(tmp_path: Path) -> None:
    kubectl = next(iter(kubectl_versions(build=False).values()))
    with (
        demonstration_api(tmp_path / "api") as demonstration,
        World(demonstration.api, directory=tmp_path / "world") as world,
    ):
        world.cluster_audience = "arcbridge"  # the client's id, which is what an id token is for
        world.start_issuer()
        world.start_relay(extra=f'[login]\nissuer = "{world.issuer.url}"\nclient_id = "arcbridge"\n')
        world.stop_relay()  # its files stay: the README starts it
        replaced = {"/etc/arcbridge/": f"{world.relay_config.parent}/", "https://relay.example.com": world.relay_url}
        with Machines(
            tmp_path,
            kubectl,
            dialled="vm",
            replaced=replaced,
            names=("vm", "workstation"),
            issuer_ca=world.issuer.ca_file,
            # A public issuer's certificate comes from a public CA, and a person has a browser.
            environment={"ARCBRIDGE_OIDC_CA_FILE": str(world.issuer.ca_file), "ARCBRIDGE_GRANT_TYPE": "device-code"},
        ) as machines:
            for block in blocks(ROOT / "README.md"):
                if block.text.startswith("arcbridge login"):
                    world.start_agent()
                machines.run(block)
            assert (machines.at("vm") / "token").read_text().count(".") == 1
            assert (machines.at("vm") / "token").stat().st_mode & 0o777 == 0o600
