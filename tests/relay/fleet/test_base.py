from __future__ import annotations

from arcbridge.relay.fleet.base import Fleet
from tests.relay.fleet.conformance import FleetConformance, Link


class TestLocal(FleetConformance):
    async def make(self) -> Fleet:
        return Fleet()


async def test_nothing_is_kept_of_who_left() -> None:
    fleet = Fleet()
    for n in range(100):
        link = Link(f"c{n}", f"i{n}")
        await fleet.register(link)
        await fleet.unregister(link)
    assert fleet.links() == []
    assert not fleet._links
    assert not fleet._last_asked
