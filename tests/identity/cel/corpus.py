"""The two tables of this folder, read: expressions, and whole configurations with tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
AUDIENCE = "cluster"
MANY_GROUPS = [f"group-{n}" for n in range(400)]

Values = list[str] | str
"""What an expression gives to an extra key; or `refused`, or `invalid`."""


@dataclass(frozen=True, slots=True)
class Expressions:
    """The table of expressions, and the claims that they all see."""

    claims: dict[str, Any]
    rows: list[tuple[str, Values]]


@dataclass(frozen=True, slots=True)
class Token:
    """`claims` of a token, the `user` that kube-apiserver makes of it (None: refused), and `here`, ours."""

    claims: dict[str, Any]
    user: dict[str, Any] | None
    here: dict[str, Any] | None
    why: str


@dataclass(frozen=True, slots=True)
class Configuration:
    """An entry of `jwt` without its issuer; without tokens it is not accepted."""

    name: str
    jwt: dict[str, Any]
    tokens: list[Token]


def expressions() -> Expressions:
    """Read corpus.yaml."""
    table = yaml.safe_load((HERE / "corpus.yaml").read_text(encoding="utf-8"))
    return Expressions({**table["claims"], "manygroups": MANY_GROUPS}, [tuple(row) for row in table["expressions"]])


def configurations() -> list[Configuration]:
    """Read configurations.yaml."""
    table = yaml.safe_load((HERE / "configurations.yaml").read_text(encoding="utf-8"))
    return [Configuration(row["name"], row["jwt"], [_token(t) for t in row.get("tokens", [])]) for row in table]


def token_claims(changes: dict[str, Any], issuer: str, now: int) -> dict[str, Any]:
    """The claims of a token of a table: the usual ones, with changes."""
    issued = now + changes.get("issued", 0)
    base = {"iss": issuer, "aud": AUDIENCE, "sub": "user-1", "iat": issued, "exp": now + 3600}
    found = {**base, **{name: value for name, value in changes.items() if name != "issued"}}
    if found["sub"] is None:
        del found["sub"]
    return found


def _token(row: dict[str, Any]) -> Token:
    user, here = (None if row.get(name) == "refused" else _filled(row.get(name)) for name in ("user", "here"))
    return Token(_filled(row["claims"]), user, here if "here" in row else user, row.get("why", ""))


def _filled(value: Any) -> Any:
    fill = {"$groups": MANY_GROUPS[:300], "$numbers": list(range(200)), "$long": "a" * 2000, "$audience": AUDIENCE}
    if isinstance(value, str):
        return fill.get(value, value)
    if isinstance(value, list):
        return [_filled(item) for item in value]
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items()}
    return value
