from __future__ import annotations

from arcbridge.net.client_hello import Reason
from arcbridge.net.join import JoinCode
from arcbridge.relay.counters import Counters


def test_every_reason_and_every_code_has_its_counter_from_the_start() -> None:
    counters = Counters()
    assert {reason.value for reason in Reason} <= set(counters.rejected)
    assert len(counters.joins) == len(JoinCode)
    assert not any(counters.rejected.values())
