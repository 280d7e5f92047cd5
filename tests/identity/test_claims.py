"""docs/threats.md#H4 and claim mapping: who a verified token is, and which names are never accepted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from arcbridge.identity.authentication import parse
from arcbridge.identity.claims import MAX_GROUPS, Identity, is_reserved, map_claims
from arcbridge.identity.names import MAX_NAME
from arcbridge.identity.refusal import TokenRefused
from arcbridge.refusals import Refusal, RefusalRule

from .issuer import CONFIG, URL, claims

PLAIN = CONFIG.replace('prefix: "oidc:"', 'prefix: ""')
EMAIL = PLAIN.replace("claim: sub", "claim: email")


def mapped(config: str = PLAIN, **changes: Any) -> Any:
    return map_claims(parse(config).issuers[0], claims(**changes))


def refusal(config: str = PLAIN, **changes: Any) -> str:
    with pytest.raises(TokenRefused) as caught:
        mapped(config, **changes)
    return caught.value.rule


RESERVED = [
    "system:admin",
    "system:masters",
    "system:serviceaccount:kube-system:default",
    "System:Masters",
    "SYSTEM:x",
    "ｓｙｓｔｅｍ:masters",
    "system：masters",
    "ѕystem:masters",
    "systеm:masters",
    "syѕtem:masters",
    "ſystem:masters",
    "system∶masters",
]


@pytest.mark.parametrize("name", RESERVED)
def test_reserved_names_are_refused_as_user_and_as_group(name: str) -> None:
    assert is_reserved(name)
    assert refusal(sub=name) == "claims.username.system"
    assert refusal(groups=["dev", name]) == "claims.groups.system"


@pytest.mark.parametrize("name", ["systems", "my-system:x", "ecosystem:masters", "sys:tem", "müller", "山田"])
def test_ordinary_names_pass(name: str) -> None:
    assert mapped(sub=name).username == name


ODD = [" lead", "trail ", "a\nb", "a\rb", "a\x00b", "a\x7fb", "a\tb", "a​b", "a‮b", "\ud800", "x" * (MAX_NAME + 1)]


@pytest.mark.parametrize("name", ODD, ids=range(len(ODD)))
def test_names_that_parsers_read_differently_are_refused(name: str) -> None:
    assert refusal(EMAIL, email=name, email_verified=True) == "claims.username.characters"
    assert refusal(groups=[name]) == "claims.groups.characters"


@pytest.mark.parametrize("value", ["", None, 7, True, ["alice"], {"a": 1}])
def test_a_user_name_is_a_string_that_is_not_empty(value: Any) -> None:
    assert refusal(EMAIL, email=value, email_verified=True) == "claims.username"


@pytest.mark.parametrize("verified", [None, False, "true", 1])
def test_an_email_must_be_verified_literally(verified: Any) -> None:
    assert refusal(EMAIL, email="a@example.com", email_verified=verified) == "claims.email_verified"


def test_a_verified_email() -> None:
    assert mapped(EMAIL, email="a@example.com", email_verified=True).username == "a@example.com"


def test_prefixes_go_before_user_and_groups() -> None:
    identity = mapped(CONFIG, groups=["a", "b", "a", ""])
    assert identity.username == "oidc:alice"
    assert identity.groups == ("oidc:a", "oidc:b")
    assert identity.subject == URL + "#alice"


@pytest.mark.parametrize(("value", "groups"), [("one", ("one",)), (None, ()), ([], ())])
def test_shapes_of_the_groups_claim(value: Any, groups: tuple[str, ...]) -> None:
    assert mapped(groups=value).groups == groups


@pytest.mark.parametrize("value", [7, {"a": 1}, ["a", 7], [["a"]], True])
def test_groups_of_another_shape_are_refused(value: Any) -> None:
    assert refusal(groups=value) == "claims.groups"


def test_too_many_groups() -> None:
    assert refusal(groups=[f"g{n}" for n in range(MAX_GROUPS + 1)]) == "claims.groups.many"


def test_a_pointer_in_place_of_groups_is_an_error_and_not_no_groups() -> None:
    assert refusal(groups=None, _claim_names={"groups": "src1"}, _claim_sources={}) == "claims.groups.overage"


BY_EXPRESSION = PLAIN.replace('groups: {claim: groups, prefix: ""}', "groups: {expression: 'claims.?%s.orValue([])'}")


@pytest.mark.parametrize("pointer", [{"_claim_names": {"groups": "src1"}}, {"hasgroups": True}], ids=["names", "has"])
def test_t54_what_an_expression_reads_is_not_missing_where_it_is_elsewhere(pointer: dict[str, Any]) -> None:
    with pytest.raises(TokenRefused) as caught:
        mapped(BY_EXPRESSION % "groups", groups=None, **pointer)
    assert caught.value.rule == "claims.groups.overage"
    assert "the token has too many groups" in caught.value.message
    assert "jwt[0].claimMappings.groups.expression reads claim 'groups'" in caught.value.detail
    assert mapped(BY_EXPRESSION % "groups", groups=None).groups == ()
    assert mapped(BY_EXPRESSION % "roles", groups=None, **pointer).groups == ()


def test_t54_a_rule_that_keeps_a_group_out_does_not_pass_for_want_of_the_claim() -> None:
    rule = "  claimValidationRules:\n  - {expression: \"!('blocked' in claims.?groups.orValue([]))\"}\n"
    config = PLAIN.replace('    groups: {claim: groups, prefix: ""}\n', "") + rule
    assert refusal(config, groups=["blocked"]) == "claims.rule"
    assert refusal(config, groups=None, _claim_names={"groups": "src1"}) == "claims.groups.overage"
    assert mapped(config, groups=None).groups == ()


def test_t54_another_claim_that_is_elsewhere_is_named() -> None:
    with pytest.raises(TokenRefused) as caught:
        mapped(BY_EXPRESSION % "roles", groups=None, _claim_names={"roles": "src1"})
    assert caught.value.refusal == Refusal(RefusalRule.CLAIMS_ELSEWHERE, "roles")


RULES = (
    CONFIG
    + """  claimValidationRules:
  - {claim: tenant, requiredValue: "7"}
  - {claim: hd}
"""
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tenant": 7, "hd": ""},
        {"tenant": "8", "hd": ""},
        {"tenant": ["7"], "hd": ""},
        {"tenant": "7"},
        # Without `requiredValue` a claim must be the empty string, in kube-apiserver too.
        {"tenant": "7", "hd": "x"},
        {"tenant": "7", "hd": False},
    ],
)
def test_required_claims(changes: dict[str, Any]) -> None:
    assert refusal(RULES, **changes) == "claims.rule"


def test_required_claims_that_are_there() -> None:
    assert mapped(RULES, tenant="7", hd="").username == "oidc:alice"


def test_v21_which_renewals_keep_every_right() -> None:
    first = Identity("alice", "7", ("a", "b"), "i#s", "i", 100.0, extra={"k": ("1",)}, issued_at=5.0)
    for same in (
        replace(first, expires_at=900.0, issued_at=800.0, extra={"k": ("2",)}),
        replace(first, groups=("b", "a")),
        replace(first, groups=("b", "c", "a")),
    ):
        assert same.keeps(first)
    for less in (
        replace(first, groups=("a",)),
        replace(first, groups=("a", "c", "d")),
        replace(first, username="alicia"),
        replace(first, uid="8"),
    ):
        assert not less.keeps(first)


def test_which_of_two_identities_of_a_subject_counts() -> None:
    """docs/threats.md#V17; tests/agent/test_sessions.py has the renewals."""

    def one(issued: float, expires: float, *groups: str) -> Identity:
        return Identity("alice", "", groups, "i#alice", "i", expires, issued_at=issued)

    assert one(2, 5, "a", "b").supersedes(one(1, 9, "a"))
    assert not one(1, 9, "a").supersedes(one(2, 5, "a", "b"))
    assert one(1, 5, "a").supersedes(one(1, 9, "b", "c"))
    assert not one(1, 9, "b", "c").supersedes(one(1, 5, "a"))
    assert not one(1, 9, "b").supersedes(one(1, 5, "a")), "neither is a part of the other: nothing changes"
    assert one(1, 9, "b", "a").supersedes(one(1, 5, "a", "b"))
    assert not one(1, 5, "a").supersedes(one(1, 9, "a"))
    assert one(0, 9, "a").supersedes(one(0, 5, "a")), "a token that does not say renews itself"


def test_the_names_by_which_a_user_is_revoked() -> None:
    assert mapped(CONFIG).names == ("oidc:alice", URL + "#alice")


def test_the_time_of_issue_is_kept() -> None:
    assert mapped(iat=1000).issued_at == 1000.0
    assert mapped(iat=None).issued_at == 0.0  # counts as old


def test_uid() -> None:
    config = CONFIG + "    uid: {claim: oid}\n"
    assert mapped(config, oid="u-1").uid == "u-1"
    assert refusal(config) == "claims.uid"
    assert refusal(config, oid=7) == "claims.uid"


@pytest.mark.parametrize("value", [None, "", 7, "a\nb"])
def test_a_subject_is_needed_to_recognise_renewals(value: Any) -> None:
    assert refusal(sub=value) == "claims.sub"


def test_an_empty_group_of_a_reserved_prefix_is_refused() -> None:
    config = PLAIN.replace('groups, prefix: ""', 'groups, prefix: "system:"')
    assert config != PLAIN
    assert refusal(config, groups=[""]) == "claims.groups.system"
