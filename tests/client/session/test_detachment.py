"""How long a lost session is worth another try, by what the relays answer."""

from __future__ import annotations

import pytest

from arcbridge.client.session.detachment import (
    FORBIDDEN_TIMEOUT,
    MISSING_TIMEOUT,
    MISSING_TIMEOUT_AFTER_OUTAGE,
    Detachment,
)
from arcbridge.errors import ArcbridgeError, PermissionRefused, Unreachable, WrongAgent
from arcbridge.wire.frames import GoawayCode

FORBIDDEN = PermissionRefused("no")
LOST = Unreachable("no relay")
ELSEWHERE = WrongAgent("another agent")


def lost(*, outage: bool = False) -> Detachment:
    detachment = Detachment()
    detachment.begin(3, 100.0)
    detachment.outage = outage
    return detachment


def code(detachment: Detachment, error: ArcbridgeError, now: float) -> int | None:
    verdict = detachment.verdict(error, now)
    return None if verdict is None else verdict.code


@pytest.mark.parametrize(
    ("error", "outage", "timeout", "ends_with"),
    [
        (FORBIDDEN, False, FORBIDDEN_TIMEOUT, GoawayCode.REVOKED),
        (ELSEWHERE, False, MISSING_TIMEOUT, GoawayCode.GONE),
        (ELSEWHERE, True, MISSING_TIMEOUT_AFTER_OUTAGE, GoawayCode.GONE),
    ],
)
def test_an_answer_has_to_last(error: ArcbridgeError, outage: bool, timeout: float, ends_with: int) -> None:
    detachment = lost(outage=outage)
    assert [code(detachment, error, 100.0 + at) for at in (0.0, timeout - 0.1)] == [None, None]
    assert code(detachment, LOST, 100.0 + timeout) is None, "another answer begins the time anew"
    assert [code(detachment, error, 200.0 + at) for at in (0.0, timeout - 0.1)] == [None, None]
    assert code(detachment, error, 200.0 + timeout) == ends_with


def test_an_agent_that_stops_takes_no_connection_any_more() -> None:
    detachment = lost()
    detachment.agent_stops = True
    assert code(detachment, LOST, 100.0) is None
    assert code(detachment, ELSEWHERE, 100.0) == GoawayCode.GONE


def test_while_there_is_a_connection_no_answer_ends_the_session() -> None:
    detachment = Detachment()
    assert [code(detachment, FORBIDDEN, at) for at in (0.0, 100.0)] == [None, None]
    detachment.begin(1, 100.0)
    assert detachment.lasted(107.0) == 7.0
    detachment.end()
    assert detachment.lasted(200.0) == 0.0
