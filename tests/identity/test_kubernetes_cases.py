"""Kubernetes' own cases for our loader and verifier: the same verdict and user, or a row of the documentation.

`kubernetes/recording.py` runs the tests of `k8s.io/apiserver` and records what its code makes of each file and token.
Each difference belongs to a row of docs/authentication.md#differences-that-are-meant, and each row has a case.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from arcbridge.errors import ArcbridgeError, ConfigError, Unreachable
from arcbridge.identity.authentication import AuthenticationConfig, parse
from arcbridge.identity.claims import CREDENTIAL_ID
from arcbridge.identity.fetch import Reply
from arcbridge.identity.groups import GroupSources
from arcbridge.identity.refusal import TokenRefused
from arcbridge.identity.verifier import TokenVerifier
from tests.support import pages
from tests.support.kube_programs import Unavailable
from tests.support.processes import require_or_skip

from .kubernetes.recording import RecordedCase, RecordedToken, own_cases, recording

# Compiling Kubernetes takes minutes where Go's cache is cold; once recorded, everything here takes seconds.
pytestmark = pytest.mark.timeout(2400)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "authentication.md"
SAME = "same"
"""The key of cases.yaml whose cases show no difference."""


@dataclass(frozen=True)
class Difference:
    """A file or a token of which the two make something else. `ours`: a refusal's rule, an error, or a user."""

    case: RecordedCase
    token: RecordedToken | None
    ours: Any

    @property
    def accepted_here_alone(self) -> bool:
        return isinstance(self.ours, dict) and (self.token is None or self.token.user is None)

    @property
    def another_user(self) -> bool:
        return isinstance(self.ours, dict) and not self.accepted_here_alone

    @property
    def claims(self) -> dict[str, Any]:
        """The token's claims; empty where there is no token."""
        if self.token is None:
            return {}
        payload = self.token.token.split(".")[1]
        return dict(json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))))

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The issuers of the file."""
        return list(json.loads(self.case.config)["jwt"] or [])

    @property
    def username(self) -> str:
        """The user name that Kubernetes gives; empty where it refuses."""
        return str(self.token.user["username"]) if self.token is not None and self.token.user is not None else ""


@pytest.fixture(scope="module")
def cases() -> list[RecordedCase]:
    try:
        return recording()
    except Unavailable as error:
        require_or_skip("go", str(error))


@pytest.fixture(scope="module")
def compared(cases: list[RecordedCase]) -> list[tuple[RecordedCase, list[Difference]]]:
    """Each case, and where the two differ in it."""
    return [(case, differences(case)) for case in cases]


def user_of(identity: Any) -> dict[str, Any]:
    extra = {key: list(values) for key, values in identity.extra.items()}
    return {"username": identity.username, "uid": identity.uid, "groups": list(identity.groups), "extra": extra}


async def judged(case: RecordedCase, issuers: AuthenticationConfig, token: str) -> Any:
    """Answer the user of a token here, or the rule that refuses it."""

    async def fetch(url: str, ca_pem: str | None) -> Reply:
        if url not in case.documents:
            raise Unreachable(f"{url}: not found")
        return Reply(200, case.documents[url].encode())

    async def ask(method: str, url: str, ca_pem: str | None, *, headers: Mapping[str, str], body: bytes = b"") -> Reply:
        found = case.documents.get(url)
        return Reply(404, b"") if found is None else Reply(200, found.encode())

    def clock() -> float:
        return float(case.now)

    groups = GroupSources(ask, clock=clock, monotonic=clock)
    # Kubernetes' cases say which algorithms they allow. Ours are judged as an API server with a file does, with all.
    limits: dict[str, Any] = {"algorithms": case.algorithms} if case.suite == "TestToken" else {}
    verifier = TokenVerifier(issuers, fetch, clock, monotonic=clock, groups=groups, **limits)
    try:
        return user_of(await verifier.verify(token))
    except TokenRefused as error:
        return error.rule
    except ArcbridgeError as error:
        return type(error).__name__
    finally:
        await verifier.close()


def differences(case: RecordedCase) -> list[Difference]:
    """Judge a case's file and tokens here, and return where the two differ."""
    try:
        issuers = parse(case.config)
    except ConfigError as error:
        return [] if case.file_error else [Difference(case, None, error.message)]
    if case.file_error:
        return [Difference(case, None, {})]
    found = []
    for token in case.tokens:
        ours = asyncio.run(judged(case, issuers, token.token))
        theirs = token.user and {**token.user, "groups": token.user["groups"] or [], "extra": token.user["extra"] or {}}
        if (theirs or isinstance(ours, dict)) and ours != theirs:
            found.append(Difference(case, token, ours))
    return found


# Which row a difference of Kubernetes' own cases belongs to: by what is in the file or token, and by our own reason.
ROWS: dict[str, Callable[[Difference], bool]] = {
    "needed-claims": lambda d: d.ours in ("token.iat", "claims.sub") and not d.claims.keys() >= {"iat", "sub"},
    "file-fields": lambda d: "egressSelectorType: " in d.ours and "egressSelectorType" in d.entries[0]["issuer"],
    "file-head": lambda d: "jwt: at least one" in d.ours and not d.entries,
    "email-verified": lambda d: d.ours == "claims.email_verified" and "email_verified" not in d.claims,
    "aggregated": lambda d: d.ours == "claims.groups.overage" and "JWT" in str(d.claims["_claim_sources"]),
    "google-issuer": lambda d: d.ours == "token.iss" and d.claims["iss"] == "accounts.google.com",
    "iat-ahead": lambda d: d.ours == "token.nbf" and d.claims["iat"] > d.case.now + 10,
    "odd-names": lambda d: d.ours == "claims.username.characters" and d.username.strip() != d.username,
    "empty-username": lambda d: d.ours == "claims.username" and d.username == "",
    "token-id": lambda d: d.another_user and without_token_id(d.token) == d.ours,
}


def without_token_id(token: RecordedToken | None) -> dict[str, Any]:
    """Return the user of a token without what Kubernetes makes of `jti`."""
    assert token is not None
    assert token.user is not None
    extra = {key: values for key, values in (token.user["extra"] or {}).items() if key != CREDENTIAL_ID}
    return {**token.user, "groups": token.user["groups"] or [], "extra": extra}


def test_kubernetes_cases_are_all_there(cases: list[RecordedCase]) -> None:
    """A recorder that finds fewer cases than it did would find no difference either."""
    tokens = [case for case in cases if case.suite == "TestToken"]
    assert len(tokens) >= 93
    assert sum(token.user is not None for case in tokens for token in case.tokens) >= 80
    assert sum(token.user is None for case in tokens for token in case.tokens) >= 40
    files = [case for case in cases if case.suite.startswith("TestValidate")]
    assert len(files) >= 117
    assert min(sum(not case.file_error for case in files), sum(bool(case.file_error) for case in files)) >= 40


def test_each_difference_from_kubernetes_has_its_row(compared: list[tuple[RecordedCase, list[Difference]]]) -> None:
    unexplained = []
    for case, differing in compared:
        for found in differing if case.suite != "own" else ():
            rows = [
                row
                for row, holds in ROWS.items()
                if (row == "token-id" or isinstance(found.ours, str)) and holds(found)
            ]
            if len(rows) != 1:
                unexplained.append((case.suite, case.name, found.token, found.ours, case.file_error, rows))
    assert unexplained == []


def page_rows() -> tuple[list[str], list[str]]:
    """Return the codes of the documentation's two tables: what is accepted here alone, and what is stricter here."""
    section = pages.read(PAGE).partition("## Differences that are meant\n")[2].partition("\n## ")[0]
    accepted, _, stricter = section.partition("\nEverything else is stricter here")
    row = re.compile(r"^\| `([a-z-]+)` \|", re.M)
    return row.findall(accepted), row.findall(stricter)


def test_each_row_of_the_documentation_is_shown_by_its_cases(
    compared: list[tuple[RecordedCase, list[Difference]]],
) -> None:
    """Its cases differ, and in its direction; what stands in no row is the same."""
    accepted, stricter = page_rows()
    assert {*ROWS} <= {*stricter}
    by_name = {case.name: (case, found) for case, found in compared if case.suite == "own"}
    wrong, shown = [], set()
    for own in own_cases():
        case, found = by_name[own.given["name"]]
        shown.add(own.row)
        if own.row == SAME:
            good = not found
        else:
            good = len(found) == 1 and found[0].accepted_here_alone == (own.row in accepted)
        if not good:
            wrong.append((case.name, found, case.file_error, case.tokens))
    assert wrong == []
    assert sorted(shown) == sorted([*accepted, *stricter, SAME])


def test_no_token_makes_another_user(compared: list[tuple[RecordedCase, list[Difference]]]) -> None:
    """Where both accept, they differ in what the documentation says, and never in the user's name."""
    rows = {own.given["name"]: own.row for own in own_cases()}
    for case, differing in compared:
        for found in differing:
            if found.another_user:
                assert found.token is not None
                assert found.token.user is not None
                assert found.ours["username"] == found.token.user["username"]
                assert rows.get(case.name, "token-id") in ("token-id", "group-names", "cel-words"), case.name
