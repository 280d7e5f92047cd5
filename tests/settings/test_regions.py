"""Regions: which relays are preferred, and each mistake by its setting and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from arcbridge.net.address import Address, parse_address
from arcbridge.settings.config import AgentConfig, RegionConfig
from arcbridge.settings.config_loader import load
from arcbridge.settings.problems import Problems
from arcbridge.settings.regions import check_regions

EU, US = Address("eu.test", 443), Address("us.test", 443)
REGIONS = {"eu": RegionConfig(("https://eu.test",)), "us": RegionConfig(("https://us.test:443",))}


def checked(region: str, regions: dict[str, RegionConfig], relays: object = (EU, US)) -> tuple[object, list[str]]:
    problems = Problems()
    found = check_regions(problems, region, regions, parse_address, relays)
    return found, [f"{one.setting}: {one}" for one in problems]


def test_the_relays_of_the_region() -> None:
    assert checked("eu", REGIONS) == (frozenset({EU}), [])
    assert checked("", REGIONS) == (frozenset(), [])
    assert checked("", {}) == (frozenset(), [])


@pytest.mark.parametrize(
    ("region", "regions", "setting", "words"),
    [
        ("eu", {}, "region", 'no [regions.eu] says which relays "eu" has'),
        ("asia", REGIONS, "region", "the regions are eu, us"),
        ("eu", {"eu": RegionConfig(("https://other.test",))}, "regions.eu.relays[0]", "is none of `relays`: add it"),
        ("", {"eu": RegionConfig(("https://eu.test", "http://eu.test"))}, "regions.eu.relays[1]", "https"),
    ],
)
def test_a_mistake_is_named(region: str, regions: dict[str, RegionConfig], setting: str, words: str) -> None:
    _, (problem,) = checked(region, regions)
    assert problem.startswith(f"{setting}: ")
    assert words in problem


def test_a_login_may_know_fewer_relays_than_the_file() -> None:
    assert checked("eu", REGIONS, None) == (frozenset({EU}), [])


def test_the_file(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text('relays = ["https://eu.test"]\nregion = "eu"\n[regions.eu]\nrelays = ["https://eu.test"]\n')
    assert load(AgentConfig, file).regions == {"eu": RegionConfig(("https://eu.test",))}
