"""Which requests are grants: each condition alone, and time."""

from __future__ import annotations

from typing import Any

import pytest

from arcbridge.agent.elevation.grants import (
    LAPSES,
    MOST_KEPT,
    MOST_KEPT_OF_USER,
    MOST_OF_USER,
    SLACK,
    GrantBook,
    by_user,
)
from arcbridge.agent.elevation.objects import AccessRequest, AccessRule
from arcbridge.identity.claims import Identity

from .documents import CREATED, request, rule

NOW = CREATED + 600


def book(
    *requests: AccessRequest, rules: tuple[AccessRule, ...] = (rule(),), lendable: str = "operators db"
) -> GrantBook:
    made = GrantBook(lendable.split())
    made.rules = {one.name: one for one in rules}
    made.replace_requests(requests, NOW)
    return made


def alice(*groups: str, name: str = "alice") -> Identity:
    return Identity(name, "", groups, f"i#{name}", "i", 4e9)


def granted(asked: AccessRequest, **fields: Any) -> bool:
    return bool(book(asked, **fields).grants(NOW))


def test_an_approved_request_begins_once_and_ends_in_time() -> None:
    made = book(request())
    assert made.grants(NOW) == {}
    assert [one.name for one in made.may_begin(NOW)] == ["alice-1"]
    made.keep(request(begins=NOW), NOW)
    assert made.may_begin(NOW) == []
    assert list(made.grants(NOW)) == ["uid-alice-1"]
    assert made.next_end(NOW) == NOW + 1800
    assert made.grants(NOW + 1799.9)
    assert made.grants(NOW + 1800) == {}
    assert made.grants(NOW - SLACK - 0.1) == {}, "nor before it begins"
    made.forget_past(NOW + 1800)
    assert made.requests == {}
    assert made.next_end(NOW) == float("inf")


@pytest.mark.parametrize(
    "fields",
    [
        {"approved": ()},
        {"approved": [("alice", "leads")]},
        {"approved": [("bob", "others")]},
        {"groups": ["operators", "system:masters"]},
        {"groups": []},
        {"groups": ["secret"]},
        {"rule": "none"},
        {"seconds": 3601},
        {"denied": {"user": "bob"}},
        {"withdrawn": {"user": "alice"}},
    ],
    ids=str,
)
def test_g1_what_no_rule_allows_is_no_grant(fields: dict[str, Any]) -> None:
    """Each is refused by the API server's policies too; the agent does not rely on them alone."""
    assert granted(request(begins=NOW))
    assert not granted(request(begins=NOW, **fields))
    assert book(request(**fields)).may_begin(NOW) == []


@pytest.mark.parametrize(
    "narrower", [{"groups": ["db"]}, {"seconds": 1799}, {"approvers": ["others"]}, {"count": 2}], ids=str
)
def test_a_rule_that_became_narrower_ends_what_it_gave(narrower: dict[str, Any]) -> None:
    assert not granted(request(begins=NOW), rules=(rule(**narrower),))
    assert not granted(request(begins=NOW), rules=())
    assert granted(request(begins=NOW), rules=(rule(groups=["operators", "more"], seconds=86400),))


def test_g1_a_request_that_is_older_than_its_rule_does_not_begin() -> None:
    """The API server asks about the form of a reason as a request is made, and no rule was there; a grant that runs
    when its rule is made again goes on."""
    for created, begins in ((CREATED, True), (CREATED + 1, False)):
        made = book(request(), rules=(rule(created=created),))
        assert bool(made.may_begin(NOW)) is begins
        assert granted(request(begins=NOW), rules=(rule(created=created),))


def test_g2_no_group_is_lent_that_the_settings_do_not_name() -> None:
    wide = rule(groups=["operators", "masters"])
    assert not granted(request(begins=NOW, groups=["masters"]), rules=(wide,))
    assert book(rules=(wide,)).unknown_groups() == {"incident": ["masters"]}
    assert book().unknown_groups() == {}


def test_two_approvals_are_of_two_users() -> None:
    two = (rule(count=2),)
    assert not granted(request(begins=NOW, approved=[("bob", "leads"), ("bob", "leads")]), rules=two)
    assert not granted(request(begins=NOW, approved=[("bob", "leads"), ("alice", "leads")]), rules=two)
    assert granted(request(begins=NOW, approved=[("bob", "leads"), ("carol", "leads")]), rules=two)
    assert granted(request(begins=NOW, approved=()), rules=(rule(approvers=()),))


def test_whom_a_rule_names() -> None:
    made, asked = book(), request(begins=NOW)
    assert made.rule_gives(asked, alice("x", "dev"))
    assert not made.rule_gives(asked, alice("x"))
    assert not made.rule_gives(asked, alice("dev", name="mallory")), "a grant is its user's"
    assert book(rules=(rule(asking=(), users=("alice",)),)).rule_gives(asked, alice())
    assert not book(rules=()).rule_gives(asked, alice("dev"))


def test_a_request_that_no_agent_began_for_a_day_lapses() -> None:
    made = book(request())
    made.forget_past(CREATED + LAPSES - 1)
    assert made.may_begin(NOW)
    made.forget_past(CREATED + LAPSES)
    assert made.requests == {}
    made.keep(request(), CREATED + LAPSES)
    assert made.requests == {}


def test_g4_a_flood_of_requests_is_bounded_and_ends_no_grant() -> None:
    flood = [request(f"flood-{n}", user=f"u{n % 500}", approved=()) for n in range(MOST_KEPT + 500)]
    made = book(*flood, request("alice-1", begins=NOW))
    assert len(made.requests) == MOST_KEPT
    assert made.left_out == 501
    assert list(made.grants(NOW)) == ["uid-alice-1"]
    made.keep(request("alice-1", begins=NOW, withdrawn={"user": "alice"}), NOW)
    assert made.grants(NOW) == {}


def test_g4_the_requests_of_one_user_keep_out_no_others() -> None:
    flood = [request(f"a-{n}", user="mallory", approved=()) for n in range(MOST_KEPT + 500)]
    asked = request("z-1")
    for made in (book(*flood, asked), book(*flood)):
        made.keep(asked, NOW)
        assert len(made.requests) == MOST_KEPT_OF_USER + 1
        assert [one.name for one in made.may_begin(NOW)] == ["z-1"]
        made.keep(request("a-0", user="mallory", begins=NOW), NOW)
        made.keep(request("b-0", user="mallory", approved=()), NOW)
        assert "b-0" not in made.requests


def test_of_many_grants_of_one_user_those_that_last_longest_count() -> None:
    many = {f"u{n}": request(f"alice-{n}", begins=NOW + n) for n in range(MOST_OF_USER + 4)}
    found = by_user({**many, "b": request("bob-1", user="bob", begins=NOW)})
    assert [one.name for one in found["alice"]] == [f"alice-{n}" for n in range(MOST_OF_USER + 3, 3, -1)]
    assert len(found["bob"]) == 1
