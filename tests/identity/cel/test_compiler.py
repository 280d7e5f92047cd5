"""What is refused when an expression is loaded, and where it is said to be wrong."""

from __future__ import annotations

import pytest

from arcbridge.identity.cel.compiler import (
    MAX_LENGTH,
    Expression,
    ExpressionError,
    compile_claims,
    compile_user,
    functions,
)
from arcbridge.identity.cel.values import Claims

# The expression, line and column (0: of the whole), and what is wrong.
WRONG = [
    ("claims.sub +", (1, 13), "Syntax error"),
    ("claims.sub\n  + 1 + 'a'", (2, 7), "found no matching overload for '_+_'"),
    ("nothing", (1, 1), "undeclared reference to 'nothing'"),
    ("claims.groups.map(g, g)", (1, 7), "expression of type 'any' cannot be the range"),
    ("claims.sub.matches('(')", (1, 20), "invalid matches argument"),
    ("'a'.find('[') == ''", (1, 10), "invalid find argument"),
    ("timestamp('yesterday') > timestamp(0)", (1, 11), "invalid timestamp argument"),
    ("duration('1x') > duration('1s')", (1, 10), "invalid duration argument"),
    ("[1, 'a']", (1, 5), "expected type 'int' but found 'string'"),
    ("['a', claims.sub]", (1, 13), "expected type 'string' but found 'any'"),
    ("{'a': 1, 'b': 'c'}", (1, 15), "expected type 'int' but found 'string'"),
    ("'%s'.format([claims.sub])", (1, 20), "%s does not take the type any"),
    ("'%d'.format([1.5])", (1, 14), "%d does not take the type double"),
    ("'%s'.format([[claims.sub]])", (1, 21), "%s does not take the type any"),
    ("'%s %s'.format(['a'])", (1, 15), "index 1 out of range"),
    ("'%s'.format(['a', 'b'])", (1, 12), "too many arguments supplied to string.format (expected 1)"),
    ("'%z'.format(['a'])", (1, 12), "could not parse formatting clause"),
    ("1.0 == -1e400", (1, 8), "invalid double literal"),
    ("[1].flatten()", (1, 12), "flatten() takes no list of int"),
    ("int('x') == 1", (0, 0), "not an int"),
    ("claims.`a.b`", (0, 0), "unsupported syntax: '`'"),
    ("google.protobuf.Int32Value{value: 1} == 1", (1, 1), "messages such as google.protobuf.Int32Value"),
    ("authorizer.path('/').check('get').allowed()", (1, 1), "undeclared reference to 'authorizer'"),
    ("'" + "a" * MAX_LENGTH + "'", (0, 0), f"longer than {MAX_LENGTH} characters"),
    ("+".join(["claims.sub"] * 40), (0, 0), "nested deeper than the parser goes"),
    ("(" * 40 + "1" + ")" * 40, (0, 0), "nested deeper than the parser goes"),
    ("\ud800", (0, 0), "not valid Unicode"),
    ("", (1, 1), "Syntax error"),
]


@pytest.mark.parametrize(("source", "place", "message"), WRONG, ids=range(len(WRONG)))
def test_refused(source: str, place: tuple[int, int], message: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        compile_claims(source)
    assert message in caught.value.message
    assert (caught.value.line, caught.value.column) == place


@pytest.mark.parametrize("source", ["claims.sub", "dyn(true)", "1", "claims.?a"])
def test_a_rule_is_a_bool(source: str) -> None:
    assert isinstance(compile_claims(source), Expression)
    with pytest.raises(ExpressionError, match="must evaluate to bool"):
        compile_claims(source, rule=True)


@pytest.mark.parametrize("source", ["user.name == ''", "user['uid'] == ''", "user.?uid.hasValue()", "size(user) == 4"])
def test_fields_of_the_user(source: str) -> None:
    with pytest.raises(ExpressionError):
        compile_user(source)


@pytest.mark.parametrize("source", ["has(user.uid) == has(user.uid)", "has( user . uid ) + 'a' == 'a'"])
def test_a_presence_test_of_a_users_field_is_no_text(source: str) -> None:
    """The checker takes it for the field itself, which would compare texts."""
    with pytest.raises(ExpressionError, match=r"has\(user.uid\) is not carried out here"):
        compile_user(source)
    assert isinstance(compile_user("user . uid == user.uid"), Expression)


@pytest.mark.parametrize(
    ("source", "column"), [("user.unknown == 'a'", 5), ("user . unknown == 'a'", 6), ("user.?unknown.hasValue()", 5)]
)
def test_a_field_that_no_user_has_is_named(source: str, column: int) -> None:
    with pytest.raises(ExpressionError, match=r"^undefined field 'unknown': a user has username") as caught:
        compile_user(source)
    assert (caught.value.line, caught.value.column) == (1, column)


@pytest.mark.parametrize("source", ["has(user.username) && user.username != ''", "true\n  && has( user.groups )"])
def test_the_reason_why_a_presence_test_is_refused_is_its_own(source: str) -> None:
    with pytest.raises(ExpressionError, match=r"^has\(user\.\w+\) is not carried out here"):
        compile_user(source)
    with pytest.raises(ExpressionError, match="no matching overload"):
        compile_user("'has(user.uid)' && true")


@pytest.mark.parametrize("macro", ["exists_one", "existsOne"])
def test_one_entry_may_be_asked_for_under_both_names(macro: str) -> None:
    """Kubernetes has the macro of two variables under two names, and that of one variable under the first."""
    two = compile_claims(f"{{'a': 'b', 'c': 'c'}}.{macro} ( k , v, k == v) && [1, 2].exists_one(i, i == 1)")
    assert two.evaluate(Claims.from_json({}))[0] is True
    text = compile_claims("'x.exists_one(k, v, true)' + \".exists_one(k, v, true)\"")
    assert text.evaluate(Claims.from_json({}))[0] == "x.exists_one(k, v, true).exists_one(k, v, true)"
    with pytest.raises(ExpressionError) as caught:
        compile_claims(f"[1].{macro}(k, v, nothing)")
    assert (caught.value.line, caught.value.column) == (1, len(f"[1].{macro}(k, v, ") + 1)


@pytest.mark.parametrize("source", ["'`' == '`'", '"a`b" != "c"', "true // `", "'\\'`' == ''", '"""`""" == ""'])
def test_a_backtick_in_a_text_is_no_syntax(source: str) -> None:
    assert isinstance(compile_claims(source), Expression)


def test_a_long_chain_of_alternatives_is_not_nested() -> None:
    chain = " || ".join(f"claims.sub == 'user-{n}'" for n in range(500))
    assert isinstance(compile_claims(chain, rule=True), Expression)


SELECTS = [
    ("claims.email", True),
    ("claims.?email", True),
    ("has(claims.email)", True),
    ("[1].exists(x, claims.email == 'a')", True),
    ("{'a': claims.email.lowerAscii()}['a']", True),
    ("claims['email']", False),
    ("claims.nested.email", False),
    ("'claims.email'", False),
    ("dyn(claims).email", False),
]


READS = [
    ("claims.groups", True, True),
    ("claims.?groups.orValue([])", True, True),
    ("has(claims.groups) ? 'a' : 'b'", True, True),
    ("claims['groups']", True, True),
    ("claims[?'groups'].orValue([])", True, True),
    ("'groups' in claims", True, True),
    ("['x'].exists(x, x in dyn(claims.groups))", True, True),
    ("claims.groups.size() == claims.size()", True, True),
    ("claims[claims.sub]", True, False),
    ("claims.sub in claims", True, False),
    ("claims.exists(name, name == 'groups')", True, False),
    ("dyn(claims).groups", True, False),
    ("[claims][0].groups", True, False),
    ("claims == claims", True, False),
    ("claims.sub", False, False),
    ("claims.nested.groups", False, False),
    ("claims['sub'] == 'groups'", False, False),
    ("'a' in dyn(claims.roles)", False, False),
]


@pytest.mark.parametrize(("source", "may", "names"), READS, ids=[row[0] for row in READS])
def test_which_expressions_may_read_a_claim_in_any_form(source: str, may: bool, names: bool) -> None:
    found = compile_claims(source)
    assert (found.may_read("groups"), found.names("groups")) == (may, names)


@pytest.mark.parametrize(("source", "selects"), SELECTS, ids=[row[0] for row in SELECTS])
def test_which_expressions_read_a_claim(source: str, selects: bool) -> None:
    assert compile_claims(source).selects("email") is selects


WHOLE_USER = [
    "user == user",
    "[user].map(x, true).size() == 1",
    "{'a': user}.size() == 1",
    "optional.of(user).hasValue()",
    "has(dyn(user).uid)",
    "type(user) == string",
    "dyn(user).username == 'alice'",
    "user.uid == '' && dyn(user).all(k, k == 'x')",
]


@pytest.mark.parametrize("source", WHOLE_USER)
def test_the_user_is_read_by_its_fields_alone(source: str) -> None:
    with pytest.raises(ExpressionError, match="user is carried out here by its fields alone") as caught:
        compile_user(source)
    assert source[caught.value.column - 1 :].startswith("user")


def test_a_variable_of_a_macro_may_be_named_user() -> None:
    assert isinstance(compile_user("user.groups.all(user, dyn(user) != 'x' && [user].size() == 1)"), Expression)


def test_kubernetes_functions_are_declared() -> None:
    overloads = [overload for function in functions() for overload in function["overloads"]]
    assert len({overload["id"] for overload in overloads}) == len(overloads) > 130


# Functions of libraries that Kubernetes does not give to authenticators, or not in this version.
FOREIGN = [
    "math.greatest(1, 2) == 2", "base64.encode(b'a') == ''", "cel.bind(x, 1, x) == 1",
    "regex.replace('a', 'a', 'b') == 'b'", "'ab'.reverse() == 'ba'", "jsonpatch.escapeKey('a') == 'a'",
    "proto.hasExt(claims, claims)", "hash.sha256(b'a') == b''",
]  # fmt: skip


@pytest.mark.parametrize("source", FOREIGN)
def test_no_function_that_kubernetes_lacks(source: str) -> None:
    with pytest.raises(ExpressionError):
        compile_claims(source)
