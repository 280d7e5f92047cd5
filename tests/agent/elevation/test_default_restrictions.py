"""Reading as the normal state: what is left to a user to whom nothing is lent."""

from __future__ import annotations

import pytest

from arcbridge.agent.elevation.default_restrictions import DefaultRestrictions
from arcbridge.agent.kube.request_facts import RequestFacts
from arcbridge.agent.kube.request_info import request_info
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.restrictions.session_restrictions import SessionRestrictions
from arcbridge.refusals import RefusalRule
from arcbridge.wire.records import Restrictions

API = "/apis/access.arcbridge.io/v1alpha1"
READ_ONLY, NONE = RefusalRule.RESTRICTED_READ_ONLY, RefusalRule.NONE


def refused(held: SessionRestrictions, method: str, target: str) -> RefusalRule:
    try:
        held.check(RequestFacts(method, target, b""), request_info(method, target))
    except RequestRefusal as refusal:
        return refusal.refusal.rule
    return NONE


@pytest.mark.parametrize(
    ("method", "target", "rule"),
    [
        ("GET", "/api/v1/pods", NONE),
        ("DELETE", "/api/v1/namespaces/a/pods/b", READ_ONLY),
        ("POST", f"{API}/accessrequests", NONE),
        ("PATCH", f"{API}/accessrequests/a/status", NONE),
        ("PUT", f"{API}/accessrequests/a/status", NONE),
        ("GET", f"{API}/accessrules", NONE),
        ("DELETE", f"{API}/accessrequests/a", READ_ONLY),
        ("PATCH", f"{API}/accessrequests/a", READ_ONLY),
        ("POST", f"{API}/accessrules", READ_ONLY),
        ("PATCH", f"{API}/accessrules/a/status", READ_ONLY),
        ("POST", "/apis/other.io/v1/accessrequests", READ_ONLY),
        ("POST", f"{API}/accessrequests/a/exec", READ_ONLY),
        ("POST", f"{API}//accessrequests", RefusalRule.RESTRICTED_PATH),
    ],
)
def test_g5_reading_and_asking_is_what_is_left(method: str, target: str, rule: RefusalRule) -> None:
    assert refused(DefaultRestrictions.over(None), method, target) is rule


def test_what_a_session_gave_up_itself_holds_besides() -> None:
    own = SessionRestrictions(Restrictions(read_only=True, no_secrets=True))
    held = DefaultRestrictions.over(own)
    assert held.words == ("read-only", "no-secrets")
    assert refused(held, "POST", f"{API}/accessrequests") is READ_ONLY, "it asked for a session that only reads"
    assert refused(held, "GET", "/api/v1/secrets") is RefusalRule.RESTRICTED_NO_SECRETS
    named = DefaultRestrictions.over(SessionRestrictions(Restrictions(namespaces="shop")))
    assert refused(named, "GET", "/api/v1/nodes") is RefusalRule.RESTRICTED_NAMESPACES
    assert refused(named, "POST", f"{API}/accessrequests") is RefusalRule.RESTRICTED_NAMESPACES


def test_the_sentence_says_how_to_ask() -> None:
    assert "arcbridge elevate" in DefaultRestrictions.over(None).sentence(READ_ONLY)
    own = DefaultRestrictions.over(SessionRestrictions(Restrictions(read_only=True)))
    assert "without --read-only" in own.sentence(READ_ONLY)
    named = DefaultRestrictions.over(SessionRestrictions(Restrictions(namespaces="shop"))).sentence(READ_ONLY)
    assert "use a session without restrictions" in named
    assert "arcbridge elevate" not in named, "a grant would change nothing for it"
    program = DefaultRestrictions.over(None, may_ask=False).sentence(READ_ONLY)
    assert "nothing is lent" in program
    assert "arcbridge elevate" not in program, "the policies would refuse it"
