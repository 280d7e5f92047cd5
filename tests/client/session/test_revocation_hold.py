"""How seldom a revoked client comes back, and with another token at once (docs/threats.md#V18)."""

from __future__ import annotations

from arcbridge.client.session.revocation_hold import FIRST, LONGEST, RevocationHold
from arcbridge.errors import PermissionRefused

ERROR = PermissionRefused("revoked")


def test_v18_the_wait_doubles_up_to_a_minute() -> None:
    hold = RevocationHold()
    assert hold.refusal("t", 0.0) is None
    now, waits = 100.0, []
    for _ in range(7):
        hold.begin(ERROR, "t", now)
        began = now
        assert hold.refusal("t", now) is ERROR
        while hold.refusal("t", now) is not None:
            now += 1.0
        waits.append(now - began)
    assert waits == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0]
    assert (waits[0], waits[-1]) == (FIRST, LONGEST)
    assert hold.error is ERROR, "until a session is established no attempt is made without a caller"


def test_v18_another_token_is_tried_at_once_and_an_unknown_one_waits() -> None:
    hold = RevocationHold()
    hold.begin(ERROR, "old", 0.0)
    assert hold.refusal("old", 1.0) is ERROR
    assert hold.refusal("new", 1.0) is None
    assert hold.refusal("", 1.0) is ERROR, "a login would be asked for one"
    hold.begin(ERROR, "new", 1.0)
    assert hold.refusal("new", 10.0) is ERROR, "the wait has doubled"
    hold.begin(ERROR, "", 100.0)
    assert hold.refusal("", 101.0) is ERROR


def test_a_session_ends_it() -> None:
    hold = RevocationHold()
    hold.begin(ERROR, "t", 0.0)
    hold.begin(ERROR, "t", 6.0)
    hold.end()
    assert hold.error is None
    assert hold.refusal("t", 7.0) is None
    hold.begin(ERROR, "t", 10.0)
    assert hold.refusal("t", 10.0 + FIRST) is None


def test_it_shows_no_token() -> None:
    hold = RevocationHold()
    hold.begin(ERROR, "canary-token", 0.0)
    assert "canary" not in repr(hold)
