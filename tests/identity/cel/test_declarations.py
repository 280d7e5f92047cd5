"""What Kubernetes has is declared to the checker, and nothing else is."""

from __future__ import annotations

import pytest

from arcbridge.identity.cel.compiler import ExpressionError, compile_claims
from arcbridge.identity.cel.declarations import functions


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
