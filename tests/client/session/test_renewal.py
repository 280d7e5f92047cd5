"""A newer token is sent in time, and a try that found none is followed by another one before the end."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from arcbridge.client.credentials.tokens import ClusterToken
from arcbridge.client.session.renewal import Schedule, TokenRenewal
from arcbridge.wire.records import Restrictions


@pytest.mark.parametrize(
    ("lifetime", "due"), [(0.0, 0.0), (100.0, 50.0), (500.0, 250.0), (1000.0, 700.0), (3600.0, 2880.0)]
)
def test_it_is_due_at_four_fifths_or_five_minutes_before_the_end_but_not_in_the_first_half(
    lifetime: float, due: float
) -> None:
    schedule = Schedule(ClusterToken("oidc", "token"), lifetime, 1000.0)
    assert schedule.at == (1000.0 + due if due else 0.0)
    assert schedule.ends_at == (1000.0 + lifetime if lifetime else 0.0)


@pytest.mark.parametrize(("lifetime", "wait"), [(16.0, 2.0), (60.0, 7.5), (300.0, 15.0), (3.0, 1.0), (0.0, 15.0)])
def test_another_try_to_renew_comes_before_the_end(lifetime: float, wait: float) -> None:
    schedule = Schedule(ClusterToken("oidc", "token"), lifetime, 1000.0)
    first = schedule.at
    schedule.again(first, 15.0)
    assert schedule.at - first == wait


@pytest.mark.parametrize(
    ("until", "expires_at", "stated", "due"),
    [
        (0, 5000.0, 4000.0, True),
        (2000, 5000.0, 1000.0, False),
        (2000, 2000.0, 1000.0, False),
        (2000, 1900.0, 900.0, True),  # the token ends before the session's time does
        (2000, 0.0, 999.0, False),
        (2000, 0.0, 900.0, True),
    ],
)
async def test_nothing_is_renewed_where_the_time_of_the_session_is_what_ends(
    until: int, expires_at: float, stated: float, due: bool
) -> None:
    """Nor is a login said to end then: it does not."""
    renewal = TokenRenewal("prod", cast(Any, None), "pin", lambda: 1000.0, Restrictions(until=until))
    renewal.begin(ClusterToken("oidc", "token", expires_at))
    renewal.accepted(stated)
    assert bool(renewal.schedule.at) is due
    assert renewal.schedule.ends_at == pytest.approx(asyncio.get_running_loop().time() + stated, abs=1)
