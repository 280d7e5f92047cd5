"""What expressions give: the whole table of corpus.yaml, and the bounds of an evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest

from arcbridge.identity.cel.compiler import ExpressionError, compile_claims, compile_user
from arcbridge.identity.cel.evaluation import COST_LIMIT, TimeLimit
from arcbridge.identity.cel.values import Claims, EvaluationError, LimitExceeded, StringList, Value
from tests.identity.cel.corpus import AUDIENCE, Values, expressions

TABLE = expressions()
CLAIMS = {"iss": "https://issuer.example", "aud": AUDIENCE, "sub": "user-1", **TABLE.claims}


def evaluated(source: str, claims: Mapping[str, Any] = CLAIMS) -> Value:
    return compile_claims(source).evaluate(Claims.from_json(claims))[0]


def values(source: str) -> Values:
    """What an expression gives to an extra key."""
    try:
        result = evaluated(source)
    except ExpressionError:
        return "invalid"
    except (EvaluationError, LimitExceeded):
        return "refused"
    if result is None:
        return []
    found = [result] if isinstance(result, str) else result
    if isinstance(found, StringList) or not isinstance(found, list):
        return "refused"
    return [text for text in found if text] if all(isinstance(text, str) for text in found) else "refused"


def test_what_kube_apiserver_gives() -> None:
    found = [(source, values(source), expected) for source, expected in TABLE.rows]
    assert [one for one in found if one[1] != one[2]] == []


def test_the_table_is_large_enough() -> None:
    assert len({source for source, _ in TABLE.rows}) == len(TABLE.rows) >= 700
    assert sum(expected == "invalid" for _, expected in TABLE.rows) >= 80
    assert sum(expected == "refused" for _, expected in TABLE.rows) >= 100


# What is refused here and means something in Kubernetes; docs/authentication.md has the list.
MEANT = [
    ("google.protobuf.StringValue{value: 'a'}", "messages such as google.protobuf.StringValue"),
    ("'%.2000f'.format([1.0])", "a precision above 1000"),
]


@pytest.mark.parametrize(("source", "message"), MEANT, ids=[row[0] for row in MEANT])
def test_refused_on_purpose(source: str, message: str) -> None:
    with pytest.raises(ExpressionError, match=message):
        compile_claims(source)


def test_what_a_format_says_is_in_our_words() -> None:
    assert evaluated("format.dns1123Label().validate('B').value().join()") == "does not have the format DNS1123Label"


MANY = {
    "l": [f"a{n}" for n in range(300)],
    "big": "x" * 30_000,
    "d": [["a"] * 50] * 50,
    "n": 10**12,
    "p": "(.{1,1000})(.{1,1000})",
}
EXPENSIVE = [
    "dyn(claims.l).all(a, dyn(claims.l).all(b, dyn(claims.l).all(c, a + b + c != '')))",
    "dyn(claims.l).map(a, dyn(claims.l).map(b, a + b)).size() > 0",
    "lists.range(int(claims.n)).size() > 0",
    "lists.range(100000).map(i, {'a': i}).size() > 0",
    "lists.range(1000000).all(i, true)",
    "(dyn(claims.l) + dyn(claims.l) + dyn(claims.l)).distinct().size() > 0",
    "claims.big.replace('', claims.big).size() > 0",
    "claims.big.matches(claims.p)",
    "lists.range(1000).map(i, claims.big.split('')).flatten().size() > 0",
    "dyn(claims.l).map(a, claims.big + claims.big).map(a, a + a).map(a, a + a).size() > 0",
    "lists.range(100000).all(i, dyn(claims.d) == dyn(claims.d))",
    "lists.range(100000).all(i, '%s'.format([dyn(claims.d)]) != '')",
    "dyn(claims.l).all(a, dyn(claims.d).map(d, d).distinct().size() > 0)",
]


@pytest.mark.parametrize("source", EXPENSIVE)
def test_what_costs_too_much_is_not_computed(source: str) -> None:
    with pytest.raises(LimitExceeded):
        evaluated(source, MANY)


@pytest.mark.parametrize("source", ["true || {0}", "{0} && false", "optional.of({0}).hasValue()", "[1].exists(x, {0})"])
def test_nothing_absorbs_the_limit(source: str) -> None:
    # `||` short-circuits; where the costly side is evaluated, the limit goes through it.
    costly = "lists.range(1000000).all(i, true)"
    if source.startswith("true ||"):
        assert evaluated(source.replace("{0}", costly)) is True
        return
    with pytest.raises(LimitExceeded):
        evaluated(source.replace("{0}", costly))


def test_a_limit_of_cost() -> None:
    program = compile_claims("claims.sub + '!'")
    value, cost = program.evaluate(Claims.from_json(CLAIMS))
    assert (value, cost) == ("user-1!", 3)
    assert program.evaluate(Claims.from_json(CLAIMS), cost)[0] == "user-1!"
    with pytest.raises(LimitExceeded):
        program.evaluate(Claims.from_json(CLAIMS), cost - 1)


def test_a_limit_of_time() -> None:
    program = compile_claims("lists.range(100).all(i, true)")

    def run(seconds: float) -> object:
        ticks = itertools.count()
        now = lambda: next(ticks)  # noqa: E731
        return program.evaluate(Claims.from_json(CLAIMS), COST_LIMIT, TimeLimit(seconds, now, now))[0]

    assert run(1e9) is True
    with pytest.raises(LimitExceeded):
        run(50.0)


def test_the_time_of_others_does_not_count() -> None:
    wall, computed = 0.0, 0.0
    limit = TimeLimit(4.0, lambda: wall, lambda: computed)
    wall, computed = 3.0, 3.0
    assert not limit.passed()
    for _ in range(3):
        wall += 100.0
        assert not limit.passed(), "the thread had no turn"
    wall, computed = wall + 0.5, 4.5
    assert not limit.passed(), "no sooner than it could matter"
    wall += 1.0
    assert limit.passed()


# Costs of kube-apiserver 1.36 for the same expressions and claims, from its own tracker.
COSTS = [
    ("claims.sub", 2),
    ("has(claims.sub)", 1),
    ("claims.groups.size() == 3", 4),
    ("claims.nested.b.c", 4),
    ("'a' + 'b'", 1),
    ("[claims.sub, claims.email].size() == 2", 16),
    ("true && false", 0),
]


@pytest.mark.parametrize(("source", "cost"), COSTS, ids=[row[0] for row in COSTS])
def test_costs(source: str, cost: int) -> None:
    assert compile_claims(source).evaluate(Claims.from_json(CLAIMS))[1] == cost


def test_a_macro_leaves_no_variable_behind() -> None:
    assert evaluated("dyn(claims.groups).map(x, [x].map(x, x + '1')[0] + x)[0]") == "admins1admins"
    with pytest.raises(ExpressionError, match="undeclared reference to 'x'"):
        compile_claims("[1].all(x, true) && x == 1")


def test_claims_that_no_expression_reads_need_not_be_values() -> None:
    claims = {"sub": "a", "huge": 10**400}
    assert evaluated("claims.sub", claims) == "a"
    with pytest.raises(EvaluationError):
        evaluated("claims.huge", claims)


def test_deeply_nested_claims() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(LimitExceeded):
        evaluated("claims.deep == null", {"deep": deep})


USER = Claims(
    {
        "username": "alice",
        "uid": "",
        "groups": StringList(["admins", "dev"]),
        "extra": Claims.from_json({"e": {"a.b/c": ["d"]}}).find("e")[1],
    },
    "kubernetes.UserInfo",
)
USER_RULES = [
    ("user.username.startsWith('a')", True),
    ("user.uid == ''", True),
    ("user.groups.all(g, g != 'x') && user.groups.size() == 2", True),
    ("user.groups == ['admins', 'dev']", True),
    ("user.extra['a.b/c'] == ['d']", True),
    ("user.extra.a__dot__b__slash__c == ['d']", True),
    ("user.extra.exists(k, v, k == 'a.b/c' && v == ['d'])", True),
    ("has(user.extra.nope)", False),
    ("user.extra[?'nope'].hasValue()", False),
    ("user.groups.exists(user, user == 'dev')", True),
    ("'admins' in user.groups && !('x' in user.groups)", True),
]


@pytest.mark.parametrize(("source", "expected"), USER_RULES, ids=[row[0] for row in USER_RULES])
def test_rules_on_the_user(source: str, expected: bool) -> None:
    assert compile_user(source).evaluate(USER)[0] is expected
