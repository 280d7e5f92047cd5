"""Whole configurations and tokens: the table of configurations.yaml, budgets, and what a refusal says."""

from __future__ import annotations

import itertools
import json
import math
import tracemalloc
from typing import Any

import pytest

from arcbridge.errors import ConfigError
from arcbridge.identity.authentication import IssuerConfig, parse
from arcbridge.identity.cel.compiler import Expression
from arcbridge.identity.cel.evaluation import TimeLimit
from arcbridge.identity.cel.mapping import TOKEN_LIMIT, TOKEN_MEMORY, BudgetExceeded, CostBudget
from arcbridge.identity.claims import MAX_EXTRA, map_claims
from arcbridge.identity.refusal import TokenRefused
from tests.identity.cel.corpus import AUDIENCE, Configuration, configurations, token_claims

ISSUER = "https://issuer.example"
NOW = 1_700_000_000
TABLE = configurations()


def issuer(**jwt: Any) -> IssuerConfig:
    document = {
        "apiVersion": "apiserver.config.k8s.io/v1",
        "kind": "AuthenticationConfiguration",
        "jwt": [{"issuer": {"url": ISSUER, "audiences": [AUDIENCE]}, **jwt}],
    }
    return parse(json.dumps(document)).issuers[0]


def user(config: IssuerConfig, claims: dict[str, Any], budget: CostBudget | None = None) -> dict[str, Any]:
    """The user as SelfSubjectReview says it; without a `budget` by all that a token may cost, however long it takes."""
    identity = map_claims(
        config, token_claims(claims, ISSUER, NOW), budget or CostBudget(time_limit=TimeLimit(math.inf))
    )
    found = {
        "username": identity.username,
        "uid": identity.uid,
        "groups": list(identity.groups),
        "extra": {key: list(values) for key, values in identity.extra.items()},
    }
    return {key: value for key, value in found.items() if value}


ACCEPTED = [config for config in TABLE if config.tokens]


@pytest.mark.parametrize("config", ACCEPTED, ids=[config.name for config in ACCEPTED])
def test_the_user_that_kube_apiserver_makes(config: Configuration) -> None:
    for token in config.tokens:
        if token.here is None:
            with pytest.raises(TokenRefused):
                user(issuer(**config.jwt), token.claims)
        else:
            assert user(issuer(**config.jwt), token.claims) == token.here
        # Every difference has its reason in the table.
        assert (token.here == token.user) == (not token.why)


NOT_ACCEPTED = [config for config in TABLE if not config.tokens]


@pytest.mark.parametrize("config", NOT_ACCEPTED, ids=[config.name for config in NOT_ACCEPTED])
def test_files_that_kube_apiserver_does_not_accept(config: Configuration) -> None:
    with pytest.raises(ConfigError, match=r"jwt\[0\]\."):
        issuer(**config.jwt)


def test_the_table_is_large_enough() -> None:
    tokens = [token for config in ACCEPTED for token in config.tokens]
    assert len(tokens) >= 170
    assert sum(token.user is None for token in tokens) >= 50
    assert len(NOT_ACCEPTED) >= 25


USERNAME = {"username": {"claim": "sub", "prefix": ""}}
REFUSALS = [
    (
        {"claimMappings": {"username": {"expression": "claims.nope"}}},
        ("claims.expression", "jwt[0].claimMappings.username.expression has no result for this token"),
    ),
    (
        {"claimMappings": {"username": {"expression": "1"}}},
        ("claims.expression", "jwt[0].claimMappings.username.expression does not give a string for this token"),
    ),
    (
        {"claimMappings": {**USERNAME, "groups": {"expression": "[1]"}}},
        (
            "claims.expression",
            "jwt[0].claimMappings.groups.expression gives neither a string nor a list of strings for this token",
        ),
    ),
    (
        {"claimMappings": {"username": {"expression": "''"}}},
        ("claims.username", "jwt[0].claimMappings.username.expression gives no user name for this token"),
    ),
    (
        {"claimMappings": USERNAME, "claimValidationRules": [{"expression": "false", "message": "come back later"}]},
        ("claims.rule", "come back later"),
    ),
    (
        {"claimMappings": USERNAME, "userValidationRules": [{"expression": "false"}]},
        ("user.rule", "jwt[0].userValidationRules[0].expression does not hold for this token"),
    ),
    (
        {"claimMappings": USERNAME, "claimValidationRules": [{"expression": "lists.range(2000000).all(i, true)"}]},
        ("claims.cost", "jwt[0].claimValidationRules[0].expression costs too much for this token"),
    ),
]


@pytest.mark.parametrize(("jwt", "said"), REFUSALS, ids=[row[1][1] for row in REFUSALS])
def test_what_a_refusal_says(jwt: dict[str, Any], said: tuple[str, str]) -> None:
    with pytest.raises(TokenRefused) as caught:
        user(issuer(**jwt), {"sub": "secret-of-the-token"})
    assert (caught.value.rule, str(caught.value)) == said


def test_too_many_extra_values() -> None:
    values = f"lists.range({MAX_EXTRA + 1}).map(i, 'v' + string(i))"
    config = issuer(claimMappings={**USERNAME, "extra": [{"key": "a.b/c", "valueExpression": values}]})
    with pytest.raises(TokenRefused) as caught:
        user(config, {})
    assert caught.value.rule == "claims.extra.many"


RULE = "lists.range(60000).all(i, true)"


def test_a_small_budget_is_no_refusal() -> None:
    config = issuer(claimMappings=USERNAME, claimValidationRules=[{"expression": RULE}])
    with pytest.raises(BudgetExceeded):
        user(config, {}, CostBudget(5_000))
    assert user(config, {}, CostBudget()) == {"username": "user-1"}


def test_the_expressions_of_a_token_share_a_budget() -> None:
    rules = [{"expression": f"{RULE} && {n} >= 0"} for n in range(40)]
    with pytest.raises(TokenRefused) as caught:
        user(issuer(claimMappings=USERNAME, claimValidationRules=rules), {})
    assert caught.value.rule == "claims.cost"
    assert user(issuer(claimMappings=USERNAME, claimValidationRules=rules[:5]), {}) == {"username": "user-1"}


def test_a_budget_has_an_end_in_time() -> None:
    config = issuer(claimMappings=USERNAME, claimValidationRules=[{"expression": "lists.range(50).all(i, true)"}])
    seconds = itertools.count()

    def limit() -> TimeLimit:
        return TimeLimit(20.0, lambda: next(seconds), lambda: next(seconds))

    with pytest.raises(BudgetExceeded):
        user(config, {}, CostBudget(5_000, limit()))
    with pytest.raises(TokenRefused):
        user(config, {}, CostBudget(TOKEN_LIMIT, limit()))


@pytest.mark.parametrize("error", [ValueError, TypeError, AttributeError, OverflowError, ZeroDivisionError])
def test_an_error_of_python_in_a_function_refuses_the_token(monkeypatch: pytest.MonkeyPatch, error: type) -> None:
    def broken(self: Expression, *_: Any) -> Any:
        raise error

    config = issuer(claimMappings=USERNAME, claimValidationRules=[{"expression": "claims.sub != ''"}])
    monkeypatch.setattr(Expression, "evaluate", broken)
    with pytest.raises(TokenRefused) as caught:
        user(config, {})
    assert caught.value.rule == "claims.expression"


DEEP: Any = [[]]
for _ in range(3000):
    DEEP = [DEEP]
PERMANENT = [
    # An error that nothing absorbs, as in kube-apiserver, is one of the expression and not of the budget.
    ("[claims.nope].distinct() == []", "claims.expression"),
    ("claims.long.replace('', claims.long) == ''", "claims.cost"),
    ("claims.deep == null", "claims.cost"),
    ("claims.long.matches(claims.pattern)", "claims.cost"),
]


@pytest.mark.parametrize(("rule", "said"), PERMANENT, ids=[row[0] for row in PERMANENT])
def test_what_a_larger_budget_does_not_change_is_refused_at_once(rule: str, said: str) -> None:
    config = issuer(claimMappings=USERNAME, claimValidationRules=[{"expression": rule}])
    claims = {"deep": DEEP, "long": "a" * 20_000, "pattern": "(.{1,1000}){1,1000}"}
    with pytest.raises(TokenRefused) as caught:
        user(config, claims, CostBudget(50_000))
    assert caught.value.rule == said


LARGE = {
    "roles": ["-" * 10] * 300,
    "tenant": "x" * 40_000,
    "list": list(range(20_000)),
    "url": "https://a.example/?" + "".join(f"&a{n}=b" for n in range(5_000)),
    "version": "1.0.0-" + ".".join(["ab"] * 10_000),
}
ALLOCATING = [
    "dyn(claims.roles).map(r, r.replace('-', claims.tenant)).size() > 0",
    "dyn(claims.roles).map(r, r.replace('-', claims.tenant, 10)).size() > 0",
    "dyn(claims.roles).all(r, r.replace('-', claims.tenant) != '')",
    "dyn(claims.roles).map(r, dyn(claims.list) + dyn(claims.list)).size() > 0",
    "dyn(claims.roles).map(r, url(claims.url).getQuery()).size() > 0",
    "dyn(claims.roles).map(r, semver(claims.version)).size() > 0",
    "dyn(claims.roles).map(r, claims.tenant.split('')).size() > 0",
]


@pytest.mark.parametrize("rule", ALLOCATING)
def test_t41_expressions_that_make_large_values_are_refused(rule: str) -> None:
    config = issuer(claimMappings=USERNAME, claimValidationRules=[{"expression": rule}])
    assert user(config, {name: value[:20] for name, value in LARGE.items()} | {"version": "1.0.0-a", "url": "/a?b"})
    tracemalloc.start()
    try:
        with pytest.raises(TokenRefused) as caught:
            user(config, LARGE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.rule == "claims.cost"
    assert peak < 1.5 * TOKEN_MEMORY


def test_t41_the_expressions_of_a_token_share_a_bound_of_memory() -> None:
    rules = [{"expression": f"dyn(claims.roles).all(r, url(claims.url).getQuery().size() > {n})"} for n in range(8)]
    claims = {**LARGE, "roles": ["r"] * 12}
    assert user(issuer(claimMappings=USERNAME, claimValidationRules=rules[:2]), claims)
    with pytest.raises(TokenRefused) as caught:
        user(issuer(claimMappings=USERNAME, claimValidationRules=rules), claims)
    assert caught.value.rule == "claims.cost"
