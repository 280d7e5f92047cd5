"""Events carry no secret in their text."""

from __future__ import annotations

from arcbridge.wire import events as ev
from arcbridge.wire.records import Auth, AuthOk, Dial, Status


def test_events_do_not_show_secrets() -> None:
    for event in (
        ev.AuthReceived(Auth("oidc", "canary")),
        ev.AuthAccepted(AuthOk(b"id", b"canary", "jane", 1)),
        ev.DialReceived(Dial(token="canary")),
        ev.StatusReceived(Status(token="canary")),
    ):
        assert "canary" not in repr(event)
        assert b"canary".hex() not in repr(event)
