from __future__ import annotations

from arcbridge.wire.context import Owner, SessionContext
from arcbridge.wire.limits import DEFAULT
from arcbridge.wire.session import Session
from arcbridge.wire.state import Kind, Side
from tests.wire.parts import Notes


def test_each_session_has_a_context_of_its_own() -> None:
    notes = Notes()
    one, other = (SessionContext(notes, Side.INITIATOR, Kind.SESSION, DEFAULT, 5.0) for _ in range(2))
    assert (one.owner, one.side, one.kind, one.limits, one.now) == (notes, Side.INITIATOR, Kind.SESSION, DEFAULT, 5.0)
    assert one.stats is not other.stats
    assert one.events is not other.events
    assert one.streams is not other.streams


def test_a_session_does_all_that_its_parts_ask() -> None:
    asked = {name for name in vars(Owner) if not name.startswith("_")}
    assert asked == {name for name in vars(Notes) if not name.startswith("_")}
    assert asked <= set(dir(Session))
