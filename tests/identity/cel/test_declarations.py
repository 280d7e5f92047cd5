"""Everything that the checker lets an expression call is carried out, and nothing else is."""

from __future__ import annotations

import pytest

from arcbridge.identity.cel.compiler import ExpressionError, compile_claims
from arcbridge.identity.cel.declarations import functions, signatures
from arcbridge.identity.cel.functions import FUNCTIONS


def test_every_declared_function_is_carried_out() -> None:
    declared = {
        (function["name"], len(overload["args"]) + ("target" in overload))
        for function in functions()
        for overload in function["overloads"]
    }
    assert len(list(signatures())) > 130
    assert declared - set(FUNCTIONS) == {("sum", 1)}, "`evaluation` sums lists itself: it knows their types"


# Functions of libraries that Kubernetes does not give to authenticators, or not in this version.
FOREIGN = [
    "math.greatest(1, 2) == 2",
    "base64.encode(b'a') == ''",
    "cel.bind(x, 1, x) == 1",
    "regex.replace('a', 'a', 'b') == 'b'",
    "'ab'.reverse() == 'ba'",
    "jsonpatch.escapeKey('a') == 'a'",
    "proto.hasExt(claims, claims)",
    "hash.sha256(b'a') == b''",
]


@pytest.mark.parametrize("source", FOREIGN)
def test_no_function_that_kubernetes_lacks(source: str) -> None:
    with pytest.raises(ExpressionError):
        compile_claims(source)
