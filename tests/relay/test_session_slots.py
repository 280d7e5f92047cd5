from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.identity.claims import Identity
from arcbridge.loop_shares import LoopShares, LoopTime
from arcbridge.net.join import JoinCode
from arcbridge.relay.session_slots import LIMITS, JoinLimited, SessionSlot, SessionSlots
from arcbridge.settings.config import RelayLimitsConfig, RelayUserLimitsConfig
from tests.support.clock import Clock


def person(name: str, *groups: str) -> Identity:
    return Identity(name, "", groups, f"https://issuer.test#{name}", "https://issuer.test", time.time() + 600)


def refused(places: SessionSlots, identity: Identity, *, resumes: bool = False, **counts: int) -> JoinLimited:
    """The refusal of a join that must be refused."""
    with pytest.raises(JoinLimited) as caught:
        entered(places, identity, resumes=resumes, **counts)
    assert "try again in" in caught.value.message
    assert caught.value.retry_after is not None
    assert caught.value.retry_after >= 1
    return caught.value


def entered(places: SessionSlots, identity: Identity, *, resumes: bool = False, **counts: int) -> SessionSlot:
    places.spend(identity, resumes=resumes)
    return places.enter(identity, resumes=resumes, **{"pending": 0, "sessions": 0, **counts})


ALICE, BOB = person("alice"), person("bob")


def test_joins_per_minute_of_one_user() -> None:
    """docs/threats.md#L3: thirty joins a second by one user; others, and what comes back, do not notice."""
    clock = Clock()
    places = SessionSlots(RelayLimitsConfig(joins_per_minute_per_user=60, sessions_per_user=10), clock=clock)
    admitted, errors = 0, []
    for _ in range(600):
        clock.now += 1 / 30
        try:
            entered(places, ALICE).leave()
            admitted += 1
        except JoinLimited as error:
            errors.append((error.limit, error.code))
    assert set(errors) == {("user_joins", JoinCode.LIMIT)}
    assert 60 + 19 <= admitted <= 60 + 21
    entered(places, BOB)
    entered(places, ALICE, resumes=True)
    assert places.refused["user_joins"] == 600 - admitted
    clock.now += 1
    entered(places, ALICE)


def test_resumptions_of_one_user_have_a_rate_of_their_own() -> None:
    clock = Clock()
    places = SessionSlots(RelayLimitsConfig(sessions_per_user=10), clock=clock)
    for _ in range(20):
        entered(places, ALICE, resumes=True).leave()
    assert refused(places, ALICE, resumes=True).limit == "user_resumptions"
    entered(places, ALICE)
    clock.now += 6
    entered(places, ALICE, resumes=True)


def test_joins_of_a_user_over_the_share_of_the_loop_wait_and_are_refused_at_last() -> None:
    """docs/threats.md#L45."""
    clock = Clock()
    places = SessionSlots(RelayLimitsConfig(), clock=clock)
    payer = LoopTime(LoopShares(), lambda seconds: None)
    assert places.wait_for(payer) == 0.0
    payer.held_until = clock.now + 2.0
    assert places.wait_for(payer) == pytest.approx(2.0)
    payer.refused_until = clock.now + 3.0
    with pytest.raises(JoinLimited, match="more of this relay's time than one user may") as caught:
        places.wait_for(payer)
    assert (caught.value.code, caught.value.retry_after) == (JoinCode.LIMIT, 3)
    assert places.refused["user_loop"] == 1
    clock.now += 3.0
    assert places.wait_for(payer) == 0.0


def test_sessions_of_one_user() -> None:
    places = SessionSlots(RelayLimitsConfig(sessions_per_user=3), clock=Clock())
    held = [entered(places, ALICE) for _ in range(3)]
    for place in held:
        place.joined()
    error = refused(places, ALICE)
    assert (error.limit, error.code) == ("user_sessions", JoinCode.LIMIT)
    assert "3 sessions" in error.message
    entered(places, BOB)
    # What comes back may be there twice for a while.
    back = [entered(places, ALICE, resumes=True) for _ in range(3)]
    assert refused(places, ALICE, resumes=True).limit == "user_sessions"
    for place in [*held, *back]:
        place.leave()
        place.leave()
    assert set(places.sessions_of) == {BOB.subject}
    entered(places, ALICE)


def test_joins_that_come_to_nothing_leave_places_for_what_comes_back() -> None:
    """docs/threats.md#L3: new sessions get three quarters of the joins that wait, and nine tenths of the sessions."""
    places = SessionSlots(RelayLimitsConfig(pending_joins=100, sessions=1000), clock=Clock())
    entered(places, ALICE, pending=74)
    error = refused(places, ALICE, pending=75)
    assert (error.limit, error.code) == ("pending", JoinCode.OVERLOADED)
    entered(places, ALICE, resumes=True, pending=99)
    assert refused(places, ALICE, resumes=True, pending=100).limit == "pending"
    entered(places, ALICE, sessions=899)
    assert refused(places, ALICE, sessions=900).limit == "sessions"
    entered(places, ALICE, resumes=True, sessions=999)
    assert refused(places, ALICE, resumes=True, sessions=1000).limit == "sessions"


def test_one_user_has_a_part_of_the_joins_that_wait() -> None:
    places = SessionSlots(RelayLimitsConfig(pending_joins=400), clock=Clock())
    held = [entered(places, ALICE, resumes=bool(number % 2)) for number in range(20)]
    assert refused(places, ALICE).limit == "user_pending"
    assert refused(places, ALICE, resumes=True).limit == "user_pending"
    entered(places, BOB)
    held[0].joined()
    held[0].joined()
    entered(places, ALICE)
    assert refused(places, ALICE).limit == "user_pending"


def test_other_numbers_for_a_group_and_a_user() -> None:
    limits = RelayLimitsConfig(
        sessions_per_user=1,
        joins_per_minute_per_user=5,
        groups={"ci": RelayUserLimitsConfig(sessions=3), "night": RelayUserLimitsConfig(2, 7)},
        users={"carol": RelayUserLimitsConfig(sessions=2)},
    )
    for identity, sessions, joins in (
        (ALICE, 1, 5),
        (person("dan", "ci"), 3, 5),
        (person("eve", "night", "ci", "others"), 3, 7),
        (person("carol", "ci", "night"), 2, 5),
    ):
        places = SessionSlots(limits, clock=Clock())
        for _ in range(sessions):
            entered(places, identity)
        assert refused(places, identity).limit == "user_sessions"
        places = SessionSlots(limits, clock=Clock())
        for _ in range(joins):
            entered(places, identity).leave()
        assert refused(places, identity).limit == "user_joins"


def test_l52_an_actor_is_bounded_over_all_its_users() -> None:
    tables = {"bot": RelayUserLimitsConfig(sessions=2), "*": RelayUserLimitsConfig(joins_per_minute=3)}
    bot, own, ci = ([replace(one, actor=actor) for one in (ALICE, BOB, person("carol"))] for actor in ("bot", "", "ci"))
    places = SessionSlots(RelayLimitsConfig(actors=tables), clock=Clock())
    slots = [entered(places, one) for one in bot[:2]]
    assert refused(places, bot[2]).limit == "actor_sessions"
    for one in own:
        entered(places, one)
    entered(places, bot[2], resumes=True).leave()
    slots[0].leave()
    entered(places, bot[2])
    for one in ci:
        entered(places, one)
    error = refused(places, ci[0])
    assert (error.limit, error.code) == ("actor_joins", JoinCode.LIMIT)
    assert places.sessions_of["actor ci"] == 3
    slots = [entered(SessionSlots(RelayLimitsConfig(), clock=Clock()), one) for one in bot]
    for slot in slots:
        slot.leave()
        slot.leave()
        assert slot.subject.startswith("https:")


def test_one_line_in_the_log_for_a_burst() -> None:
    clock = Clock()
    places = SessionSlots(RelayLimitsConfig(sessions_per_user=1), clock=clock)
    entered(places, ALICE)
    logged = [places.refused_since_logged(refused(places, ALICE)) for _ in range(50)]
    assert logged == [1] + [None] * 49
    clock.now += 20
    assert places.refused_since_logged(refused(places, ALICE)) == 50


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans(), st.integers(0, 3)), max_size=150))
def test_counts_are_those_of_the_places_that_are_held(steps: list[tuple[str, bool, int]]) -> None:
    clock = Clock()
    places = SessionSlots(RelayLimitsConfig(sessions_per_user=3, pending_joins=60), clock=clock)
    held: list[SessionSlot] = []
    limits: set[str] = set()
    for name, resumes, what in steps:
        clock.now += 1
        if what == 0 and held:
            held.pop().leave()
        elif what == 1 and held:
            held[0].joined()
        else:
            try:
                held.append(entered(places, person(name), resumes=resumes))
            except JoinLimited as error:
                limits.add(error.limit)
        assert sum(places.sessions_of.values()) == len(held)
        assert max(places.sessions_of.values(), default=0) <= 6
    assert limits <= set(LIMITS)
    for place in held:
        place.leave()
    assert places.sessions_of == places.pending_of == {}
