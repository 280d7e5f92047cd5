"""README.md, block by block as a reader types it, with the demonstration API in place of a cluster.

What the README tells its reader to have first is prepared here: the relay's files in /etc/arcbridge, client.toml, and
the agent, which no container engine starts in a test.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.demo.__main__ import demonstration_api
from tests.readme.blocks import blocks
from tests.readme.machines import ROOT, Machines
from tests.support.cluster import kubectl_versions
from tests.support.world import World


def test_every_block_of_the_readme(tmp_path: Path) -> None:
    kubectl = next(iter(kubectl_versions(build=False).values()))
    with (
        demonstration_api(tmp_path / "api") as demonstration,
        World(demonstration.api, directory=tmp_path / "world") as world,
    ):
        world.cluster_audience = "arcbridge"  # the client's id, which is what an id token is for
        world.start_issuer()
        world.start_relay()
        world.stop_relay()  # its files stay: the README starts it
        replaced = {"/etc/arcbridge/": f"{world.relay_config.parent}/"}
        with Machines(
            tmp_path,
            kubectl,
            dialled="vm",
            replaced=replaced,
            names=("vm", "workstation"),
            issuer_ca=world.issuer.ca_file,
        ) as machines:
            settings = machines.at("workstation") / "home" / ".config" / "arcbridge" / "client.toml"
            settings.parent.mkdir(parents=True)
            for block in blocks(ROOT / "README.md"):
                if block.text.startswith("arcbridge --role client login"):
                    world.start_agent()
                    settings.write_text(client_settings(world))
                machines.run(block)
            assert (machines.at("vm") / "token").read_text().count(".") == 1


def client_settings(world: World) -> str:
    """Return what an organisation gives its people as client.toml."""
    return (
        f"relays = [{json.dumps(world.relay_url)}]\n"
        f'relay_ca_file = "{world.relay_config.parent}/data/ca.crt"\n'
        "[login]\n"
        f'issuer = "{world.issuer.url}"\n'
        f'ca_file = "{world.issuer.ca_file}"\n'
        'client_id = "arcbridge"\n'
        'grant_type = "device-code"\n'
    )
