"""Evaluates the expressions of one issuer for one token: user name, groups, uid, extra and rules.

What the results must be is Kubernetes' own: a text for user name and uid, a text or a list of texts for groups and
extra, where nothing (null, "", []) leaves the value out. Refusals name the field of the configuration, never a claim. A
token's expressions share a `CostBudget`, so that claims that are made to be expensive stall nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from arcbridge.identity.cel.compiler import Expression
from arcbridge.identity.cel.evaluation import COST_LIMIT, TimeLimit
from arcbridge.identity.cel.values import (
    Claims,
    EvaluationError,
    LimitExceeded,
    Map,
    Memory,
    StringList,
    Unabsorbed,
    Value,
    from_json,
)
from arcbridge.identity.refusal import TokenRefused
from arcbridge.refusals import RefusalRule

TOKEN_LIMIT = 4 * COST_LIMIT
"""What all expressions of an issuer may cost for one token. Kubernetes bounds each expression alone."""
TOKEN_MEMORY = 64 << 20
"""Bytes of all values that these expressions make, also of those that are dropped again. Kubernetes has no such bound:
`replace` and `getQuery` can make values there that are far larger than their cost."""
TOKEN_TIME = 4.0
"""Seconds that they may compute. A million units take 0.1 to 1.1 s here (docs/decisions/0016-cel.md)."""
_PYTHON_ERRORS = (ArithmeticError, ValueError, TypeError, AttributeError)
"""Errors of Python that no function of an expression should let through; the token is refused should one do so."""


class BudgetExceeded(Exception):
    """The expressions cost more than this budget, though not more than is allowed: evaluate again with a larger one."""


class CostBudget:
    """What the expressions of one token may still cost. The thread that makes it evaluates them."""

    __slots__ = ("_left", "_memory", "_time_limit", "_whole")

    def __init__(self, cost: int = TOKEN_LIMIT, time_limit: TimeLimit | None = None) -> None:
        self._left = cost
        self._whole = cost >= TOKEN_LIMIT
        self._memory = Memory(TOKEN_MEMORY)
        self._time_limit = time_limit or TimeLimit(TOKEN_TIME)

    def evaluate(self, path: str, expression: Expression, value: Claims) -> Value:
        """Return the result of an expression. Raises TokenRefused or BudgetExceeded."""
        limit = min(self._left, COST_LIMIT)
        try:
            result, cost = expression.evaluate(value, limit, self._time_limit, self._memory)
        except (EvaluationError, Unabsorbed, *_PYTHON_ERRORS) as error:
            raise TokenRefused(RefusalRule.CLAIMS_EXPRESSION, f"{path} has no result for this token") from error
        except LimitExceeded as error:
            if not self._whole and not error.permanent:
                raise BudgetExceeded from error
            raise TokenRefused(RefusalRule.CLAIMS_COST, f"{path} costs too much for this token") from error
        self._left -= cost
        return result


@dataclass(frozen=True, slots=True)
class ExpressionRule:
    """An expression that must be true, and what is said where it is not."""

    path: str
    expression: Expression
    message: str


@dataclass(frozen=True, slots=True)
class Mapped:
    """What the expressions made of the claims; None where there is no expression for it."""

    username: str | None = None
    groups: tuple[str, ...] | None = None
    uid: str | None = None
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Expressions:
    """All expressions of one issuer. `path`: where it stands in the file (`jwt[0]`)."""

    path: str
    mappings: Mapping[str, Expression]
    """Those of `username`, `groups` and `uid` that there are."""
    extra: tuple[tuple[str, Expression], ...]
    claim_rules: tuple[ExpressionRule, ...]
    user_rules: tuple[ExpressionRule, ...]

    def may_read(self, claim: str) -> bool:
        """Return whether any of them may read a claim."""
        return any(expression.may_read(claim) for _, expression in self._on_claims())

    def takes_for_absent(self, claim: str, pointers: Iterable[str]) -> str:
        """Return where the first expression stands that may read `claim` and looks at none of `pointers`, the claims
        that say of it that it is elsewhere; empty where there is none."""
        for path, expression in self._on_claims():
            if expression.may_read(claim) and not any(expression.names(pointer) for pointer in pointers):
                return path
        return ""

    def _on_claims(self) -> Iterator[tuple[str, Expression]]:
        """Yield the expressions that see claims, with their places, in the order in which they are evaluated."""
        for name, expression in self.mappings.items():
            yield self._place(name), expression
        for index, (_, expression) in enumerate(self.extra):
            yield self._place(index), expression
        for rule in self.claim_rules:
            yield rule.path, rule.expression

    def _place(self, of: str | int) -> str:
        """Return where the expression of a mapping, or of the extra key with an index, stands in the file."""
        name = f"{of}.expression" if isinstance(of, str) else f"extra[{of}].valueExpression"
        return f"{self.path}.claimMappings.{name}"

    def map(self, claims: Mapping[str, Any], budget: CostBudget) -> Mapped:
        """Map verified claims, and check the rules on them. Raises TokenRefused or BudgetExceeded."""
        value = Claims.from_json(claims)
        found = {
            name: budget.evaluate(self._place(name), expression, value) for name, expression in self.mappings.items()
        }
        username, uid = (
            _text(self._place(name), found[name]) if name in found else None for name in ("username", "uid")
        )
        if username == "":
            raise TokenRefused(
                RefusalRule.CLAIMS_USERNAME, f"{self._place('username')} gives no user name for this token"
            )
        groups = _texts(self._place("groups"), found["groups"]) if "groups" in found else None
        extra = {}
        for index, (key, expression) in enumerate(self.extra):
            path = self._place(index)
            if values := _texts(path, budget.evaluate(path, expression, value)):
                extra[key] = values
        _check(self.claim_rules, value, budget, RefusalRule.CLAIMS_RULE)
        return Mapped(username, groups, uid, extra)

    def check_user(
        self, username: str, uid: str, groups: Sequence[str], extra: Mapping[str, Sequence[str]], budget: CostBudget
    ) -> None:
        """Check the rules on the user. Raises TokenRefused or BudgetExceeded."""
        if not self.user_rules:
            return
        extra_map = Map.of({key: StringList(map(from_json, values)) for key, values in extra.items()}, escaped=True)
        user = Claims(
            {"username": username, "uid": uid, "groups": StringList(groups), "extra": extra_map}, "kubernetes.UserInfo"
        )
        _check(self.user_rules, user, budget, RefusalRule.USER_RULE)


def _check(rules: Sequence[ExpressionRule], value: Claims, budget: CostBudget, refusal: RefusalRule) -> None:
    for rule in rules:
        if budget.evaluate(rule.path, rule.expression, value) is not True:
            raise TokenRefused(refusal, rule.message or f"{rule.path} does not hold for this token")


def _text(path: str, value: Value) -> str:
    if not isinstance(value, str):
        raise TokenRefused(RefusalRule.CLAIMS_EXPRESSION, f"{path} does not give a string for this token")
    return value


def _texts(path: str, value: Value) -> tuple[str, ...]:
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else value
    # A list of bare strings, as `split` makes it, is refused by kube-apiserver too: `.map(x, x)` makes a list of it.
    if isinstance(values, StringList) or not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise TokenRefused(
            RefusalRule.CLAIMS_EXPRESSION, f"{path} gives neither a string nor a list of strings for this token"
        )
    return tuple(text for text in values if text)
