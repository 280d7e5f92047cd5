"""The rotation of a cluster's CA, in the store that its agents share."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from arcbridge.agent.ca_rotation import WAITS, status, take_step
from arcbridge.agent.enrol import CredentialKeeper
from arcbridge.errors import StateError
from arcbridge.pki.authority import Authority
from arcbridge.pki.credentials import AgentCredential, DirectoryStore
from arcbridge.pki.enrolment import make_csr, make_key
from arcbridge.settings.config import AgentConfig, AgentStateConfig
from tests.support.clock import Clock

RELAY, CLUSTER, KEY = Authority.create("relay CA"), Authority.create("arcbridge cluster CA"), make_key()
MADE = AgentCredential(
    "prod",
    RELAY.sign_agent(make_csr(KEY), "prod", life=3600, cluster_ca_pin=CLUSTER.pin),
    KEY,
    RELAY.certificate_pem,
    CLUSTER.certificate_pem,
    CLUSTER.key_pem,
)


async def stored(directory: Path) -> AgentCredential:
    found = AgentCredential.from_entries(await DirectoryStore(directory).load() or {})
    assert found is not None
    return found


async def test_each_step_waits_for_those_that_are_not_known(tmp_path: Path) -> None:
    config, clock = AgentConfig(state=AgentStateConfig(directory=tmp_path)), Clock(time.time())
    with pytest.raises(StateError, match="has not enrolled yet"):
        await take_step(config, "next", force=False)
    await DirectoryStore(tmp_path).save(MADE.to_entries(), expect_version=None)
    for step in ("next", "activate", "retire"):
        clock.now += WAITS[step] / 2
        if WAITS[step]:
            assert (await status(config, clock)).missing
            with pytest.raises(StateError, match="too recently"):
                await take_step(config, step, force=False, clock=clock)
        clock.now += WAITS[step]
        await take_step(config, step, force=False, clock=clock)
    after = await stored(tmp_path)
    assert after.rotation.list.pins[0] == CLUSTER.pin
    assert after.cluster_ca_certificate_pem == after.rotation.certificate == after.rotation.oldest
    assert CLUSTER.key_pem not in str(await DirectoryStore(tmp_path).load())


async def test_an_agent_tells_its_relays_and_states_what_its_certificate_does(tmp_path: Path) -> None:
    config = AgentConfig(state=AgentStateConfig(directory=tmp_path))
    await DirectoryStore(tmp_path).save(MADE.to_entries(), expect_version=None)
    keeper = CredentialKeeper(DirectoryStore(tmp_path), (), clock=time.time)
    await keeper.start()
    assert keeper.announcement is None
    assert keeper.known_cluster_ca == CLUSTER.pin
    for step in ("next", "activate"):
        await take_step(config, step, force=True)
    again = CredentialKeeper(DirectoryStore(tmp_path), (), clock=time.time)
    await again.start()
    announced = again.announcement
    assert announced.oldest == CLUSTER.certificate_pem == again.stated_ca_pem
    assert announced.cas == again.current.rotation.succession
    assert again.known_cluster_ca == again.current.rotation.list.pins[1] != CLUSTER.pin
