"""What a client asks its sessions to give up: in each AUTH, of no older agent, and until its time."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from arcbridge.client.session.restrictions import endpoint_name, restrictions_of
from arcbridge.errors import ConfigError, PermissionRefused, Unauthenticated
from arcbridge.refusals import RefusalRule
from arcbridge.settings.config import RestrictConfig
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.records import MOST_NAMESPACES, RESTRICTIONS_FEATURE, UNRESTRICTED, Restrictions
from tests.client.echo_stream import Stream
from tests.client.far_side import FarSide
from tests.client.session.test_session_manager import make
from tests.support.clock import Clock
from tests.support.eventually import until

SHOP = Restrictions(read_only=True, namespaces="shop")


def test_settings_become_a_record() -> None:
    config = RestrictConfig(True, False, ("web", "shop", "web"), ("watch", "get", "get"))
    assert restrictions_of(config, 7) == Restrictions(True, True, "shop web", "get watch", 7)
    assert restrictions_of(RestrictConfig()) == UNRESTRICTED
    assert endpoint_name("prod", UNRESTRICTED) == "prod"
    assert endpoint_name("prod", replace(SHOP, until=7)) == "prod read-only namespaces=shop"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (RestrictConfig(verbs=("gett",)), "restrict.verbs: 'gett'"),
        (RestrictConfig(namespaces=("Shop",)), "restrict.namespaces: 'Shop'"),
        (RestrictConfig(namespaces=("a b",)), "no name of a namespace"),
        (RestrictConfig(namespaces=tuple(f"n{n}" for n in range(MOST_NAMESPACES + 1))), "at most 32"),
    ],
)
def test_what_no_agent_would_understand_is_refused_here(config: RestrictConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        restrictions_of(config)


async def test_each_auth_has_them_and_the_relay_learns_the_kinds_alone(far: FarSide, tmp_path: Path) -> None:
    session = make(far, tmp_path, restrictions=SHOP)
    running = asyncio.create_task(session.run())
    stream = await Stream.open(session)
    far.cut()
    await stream.check(b"resumed")
    await until(lambda: session.counters.resumed == 1)
    assert [auth.kind for auth in far.auths] == ["restricted-oidc"] * 2
    assert {Restrictions.decode(auth.restrictions) for auth in far.auths} == {SHOP}
    assert {request.restricted for request in far.requests} == {"read-only namespaces"}
    running.cancel()
    await asyncio.wait([running])


async def test_an_unrestricted_session_says_nothing_of_it(far: FarSide, tmp_path: Path) -> None:
    session = make(far, tmp_path)
    await session.connect_once()
    session.close()
    assert [(auth.kind, auth.restrictions) for auth in far.auths] == [("oidc", b"")]
    assert far.requests[0].restricted == ""


async def test_u6_an_older_agent_is_named_and_the_login_is_not_blamed(far: FarSide, tmp_path: Path) -> None:
    far.auth_answer = (GoawayCode.UNAUTHENTICATED, "this kind of token is not known here: the client may be newer")
    session = make(far, tmp_path, restrictions=SHOP)
    with pytest.raises(PermissionRefused, match="older and cannot restrict") as caught:
        await session.connect_once()
    assert caught.value.refusal.rule is RefusalRule.RESTRICTED_UNKNOWN
    assert len(far.auths) == 1, "nor is it asked again without them"
    far.features = RESTRICTIONS_FEATURE
    with pytest.raises(Unauthenticated):  # the agent knows them: it is the token
        await make(far, tmp_path, restrictions=SHOP).connect_once()


async def test_none_begins_behind_its_time(far: FarSide, tmp_path: Path) -> None:
    clock = Clock(1000.0)
    session = make(far, tmp_path, restrictions=replace(SHOP, until=1060), clock=clock)
    await session.connect_once()
    clock.now = 1060.0
    with pytest.raises(PermissionRefused, match="--for"):
        await session.connector.connect(session)
    assert len(far.requests) == 1
    session.close()
