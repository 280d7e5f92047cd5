"""The self-check of elevation: each fault, and what to do."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from arcbridge.agent.elevation.check import look_at_elevation
from arcbridge.agent.elevation.elevation import Elevation
from arcbridge.agent.kube.apiserver import ApiServer
from arcbridge.agent.rights import ACCESS
from arcbridge.checks.diagnosis import FindingState
from arcbridge.settings.config import ElevationConfig
from tests.agent.kube.bench import Reachable, reachable
from tests.support.fake_apiserver import Exchange, reply

from .documents import rule


@pytest.fixture
async def found(tmp_path: Path) -> AsyncIterator[Reachable]:
    async with reachable(tmp_path) as made:
        yield made


def rights(pair: Reachable, *given: tuple[str, str, str]) -> None:
    """Let the agent have rights: verb, resource and name."""

    async def review(exchange: Exchange) -> None:
        asked: dict[str, Any] = json.loads(exchange.request.body)["spec"]["resourceAttributes"]
        name = asked.get("name") or asked.get("subresource", "")
        allowed = (asked["verb"], asked["resource"], name) in given
        await exchange.send(reply(201, json.dumps({"status": {"allowed": allowed}}).encode()))

    pair[0].routes[ACCESS] = review


def followed(api: ApiServer) -> Elevation:
    made = Elevation(ElevationConfig(groups=("operators",)), api)
    for one in (made.rules, made.requests):
        one.current, one.failure = True, ""
    made._requests_hold = made._decisions_hold = True
    made.book.rules["incident"] = rule()
    return made


@pytest.mark.parametrize("verb", ["impersonate", "impersonate:user-info"])
async def test_rights_by_either_way_are_enough(verb: str, found: Reachable) -> None:
    rights(found, (verb, "groups", "operators"), (verb, "userextras", "arcbridge.io/elevated"))
    finding = await look_at_elevation(found[1], followed(found[1]))
    assert (finding.state, finding.detail) == (FindingState.OK, "1 rules are followed")


async def test_each_fault_has_its_code(found: Reachable) -> None:
    api, elevation = found[1], followed(found[1])
    rights(found)
    finding = await look_at_elevation(api, elevation)
    assert (finding.code, "operators, userextras/arcbridge.io/elevated" in finding.detail) == ("elevation_rights", True)
    rights(found, ("impersonate", "groups", "operators"), ("impersonate", "userextras", "arcbridge.io/elevated"))
    elevation._not_begun.add("uid")
    finding = await look_at_elevation(api, elevation)
    assert (finding.code, "did not let the agent begin 1" in finding.detail) == ("elevation_rights", True)
    elevation._not_begun.clear()
    elevation.book.rules["wide"] = rule("wide", groups=["operators", "masters"])
    finding = await look_at_elevation(api, elevation)
    assert (finding.state, finding.code) == (FindingState.WARNING, "elevation_groups")
    assert "wide: masters" in finding.detail
    elevation._decisions_hold = None
    assert (await look_at_elevation(api, elevation)).code == "elevation_groups", "there is no request to ask by"
    elevation._decisions_hold = False
    assert (await look_at_elevation(api, elevation)).code == "elevation_policies"
    elevation._requests_hold, elevation._decisions_hold = False, True
    assert (await look_at_elevation(api, elevation)).code == "elevation_policies"
    elevation.requests.current = False
    assert (await look_at_elevation(api, elevation)).state is FindingState.SKIPPED
    elevation.requests.failure = "code 403"
    finding = await look_at_elevation(api, elevation)
    assert (finding.state, finding.code, "code 403" in finding.detail) == (FindingState.FAILED, "elevation_watch", True)
    assert finding.remedy


async def test_a_clock_that_is_wrong_is_named(found: Reachable) -> None:
    rights(found, ("impersonate", "groups", "operators"), ("impersonate", "userextras", "arcbridge.io/elevated"))
    elevation = followed(found[1])
    elevation.clock.take(b"\r\nDate: Thu, 01 Jan 1970 01:18:20 GMT\r\n")
    assert "s ahead" in (await look_at_elevation(found[1], elevation)).detail


async def test_an_api_server_that_is_away_gives_no_right(found: Reachable) -> None:
    found[0].stop()
    assert (await look_at_elevation(found[1], followed(found[1]))).code == "elevation_rights"
