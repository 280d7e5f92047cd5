"""A glance at a token never fails."""

from __future__ import annotations

import base64
import json

import pytest

from arcbridge.client.credentials.jwt_unverified import UnverifiedClaims, claims_unverified, read_unverified


def token(claims: object) -> str:
    return "h." + base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=") + ".s"


def test_claims() -> None:
    assert read_unverified(token({"exp": 1700000000, "nonce": "n", "sub": "s", "iss": "i"})) == UnverifiedClaims(
        1700000000.0, "n", "s", "i"
    )


@pytest.mark.parametrize(
    ("audience", "found"), [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, "b", None], ("b",)), (None, ()), ({}, ())]
)
def test_audiences(audience: object, found: tuple[str, ...]) -> None:
    assert read_unverified(token({"aud": audience})).audiences == found
    assert claims_unverified(token({"aud": audience})) == {"aud": audience}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "opaque",
        "a.b",
        "a.b.c",
        "a.%%%.c",
        token([]),
        token({"exp": "soon", "sub": 3}),
        token({"exp": True}),
        token({"exp": -1}),
        token({"exp": 1e300}),
        "a." + base64.urlsafe_b64encode(b"[" * 40000).decode() + ".c",
        "a." + "x" * 100_000 + ".c",
    ],
)
def test_anything_else_is_nothing(text: str) -> None:
    assert read_unverified(text) == UnverifiedClaims()
