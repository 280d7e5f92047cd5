"""A sleep is a jump between two clocks; an address is gone when nothing can be bound to it."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from arcbridge.client.session.sleep_detector import SLEEP_THRESHOLD, SleepDetector, is_gone, seconds_asleep


class Transport(asyncio.BaseTransport):
    def __init__(self, name: Any) -> None:
        super().__init__({"sockname": name})


def test_a_jump_is_told_once() -> None:
    asleep = [100.0]
    sleep_detector = SleepDetector(lambda: asleep[0], lambda address: False)
    assert sleep_detector.slept() == 0.0
    asleep[0] += SLEEP_THRESHOLD - 1
    assert sleep_detector.slept() == 0.0
    asleep[0] += 60
    assert sleep_detector.slept() == 60
    assert sleep_detector.slept() == 0.0


def test_this_machine_has_not_slept_meanwhile() -> None:
    # Each reads two clocks: less than a pause of this process between them is no jump.
    assert abs(seconds_asleep() - seconds_asleep()) < SLEEP_THRESHOLD


def test_addresses() -> None:
    sleep_detector = SleepDetector(lambda: 0.0, lambda address: address[0] == "10.0.0.9")
    assert sleep_detector.lost_address(Transport(("10.0.0.9", 4711))) == "10.0.0.9"
    assert sleep_detector.lost_address(Transport(("10.0.0.8", 4711))) == ""
    for unknown in (None, "", "/run/socket", ()):
        assert sleep_detector.lost_address(Transport(unknown)) == ""
    assert sleep_detector.lost_address(None) == ""


def test_is_gone() -> None:
    assert not is_gone(("127.0.0.1", 5))
    assert is_gone(("192.0.2.1", 5))  # RFC 5737: no machine has it
    if socket.has_ipv6:
        assert is_gone(("2001:db8::1", 5, 0, 0))  # RFC 3849
