"""Which connection makes room, decided without any connection (docs/threats.md#J30)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from arcbridge.relay.agent_slots import AgentSlots


@dataclass(frozen=True)
class Link:
    cluster: str
    number: int


def come(places: AgentSlots[Link], limit: int, *links: Link) -> int:
    """Let them come one after the other, as the relay does; return how many were sent away."""
    refused = 0
    for link in links:
        if len(places) >= limit:
            leaves = places.giving_way(link.cluster)
            if leaves is None:
                refused += 1
                continue
            places.discard(leaves)
        places.add(link)
    return refused


def counted(places: AgentSlots[Link]) -> Counter[str]:
    return Counter(link.cluster for link in places)


def test_j30_one_cluster_keeps_no_other_out() -> None:
    places: AgentSlots[Link] = AgentSlots()
    assert come(places, 100, *(Link("evil", number) for number in range(300))) == 200
    assert come(places, 100, *(Link(f"honest-{number}", 0) for number in range(50))) == 0
    assert counted(places)["evil"] == 50
    # Of the cluster that holds most the newest leave.
    assert {link.number for link in places if link.cluster == "evil"} == set(range(50))
    # Those that had to leave come again, and take no place back.
    assert come(places, 100, *(Link("evil", number) for number in range(50, 300))) == 250


def test_a_daemonset_on_a_thousand_nodes_is_left_alone_while_there_is_room() -> None:
    places: AgentSlots[Link] = AgentSlots()
    links = [Link("big", number) for number in range(1000)] + [Link(f"small-{number}", 0) for number in range(1000)]
    assert come(places, 2000, *links) == 0
    assert counted(places)["big"] == 1000
    # Without room it gives way down to an even share of what is there, and no further.
    assert come(places, 2000, *(Link(f"later-{number}", 0) for number in range(998))) == 0
    assert counted(places)["big"] == 2
    assert come(places, 2000, Link("last", 0)) == 0
    assert come(places, 2000, Link("one more", 0)) == 1


def test_agents_that_all_come_back_find_the_same_shares_and_do_not_take_turns() -> None:
    places: AgentSlots[Link] = AgentSlots()
    herd = [Link(cluster, number) for number in range(60) for cluster in ("a", "b")]
    assert come(places, 100, *herd) == 20
    assert counted(places) == {"a": 50, "b": 50}
    # A larger cluster that was faster after a restart makes room until both have the same.
    places = AgentSlots()
    assert come(places, 100, *(Link("a", number) for number in range(100))) == 0
    assert come(places, 100, *(Link("b", number) for number in range(60))) == 10
    assert counted(places) == {"a": 50, "b": 50}
    assert come(places, 100, *(Link("a", number) for number in range(50, 100))) == 50


def test_a_place_is_counted_and_given_back_once() -> None:
    places: AgentSlots[Link] = AgentSlots()
    link = Link("a", 1)
    for _ in range(2):
        places.add(link)
        assert len(places) == 1
    for _ in range(2):
        places.discard(link)
        assert len(places) == 0
    assert list(places) == []
    assert places.giving_way("a") is None
