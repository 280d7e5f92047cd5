from __future__ import annotations

from arcbridge.relay.flapping import Flapping


class Clock:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


def test_the_next_one_waits_until_it_has_settled() -> None:
    clock = Clock()
    flapping = Flapping(settle=10, clock=clock)
    assert flapping.wait("prod", "i1") == 0
    flapping.replaced("prod", "i1")
    assert flapping.wait("prod", "i1") == 11
    assert flapping.wait("prod", "i2") == flapping.wait("other", "i1") == 0
    clock.now += 9.5
    assert flapping.wait("prod", "i1") == 1
    clock.now += 0.5
    assert flapping.wait("prod", "i1") == 0


def test_the_table_does_not_grow() -> None:
    flapping = Flapping(size=3, clock=Clock())
    for n in range(100):
        flapping.replaced("prod", f"i{n}")
    assert len(flapping._replaced) == 3
    assert [flapping.wait("prod", f"i{n}") > 0 for n in (96, 97, 98, 99)] == [False, True, True, True]
