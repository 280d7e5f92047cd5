"""What relay and agent check alike: each mistake by its setting, and what was read for the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arcbridge.identity.proof import ProofPolicy
from arcbridge.identity.token_settings import TokenSettings, check
from arcbridge.identity.verifier import Acceptance
from arcbridge.settings.config import GraphConfig
from arcbridge.settings.problems import Problems

AUTHENTICATION = """\
apiVersion: apiserver.config.k8s.io/v1
kind: AuthenticationConfiguration
jwt:
- issuer:
    url: https://login.test
    audiences: [ours]
  claimMappings:
    username: {claim: email, prefix: "oidc:"}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "authentication.yaml"
    path.write_text(AUTHENTICATION)
    return path


def checked(file: Path | None, **other: Any) -> tuple[TokenSettings, list[str]]:
    settings: dict[str, Any] = {
        "acceptance": Acceptance(),
        "proof": "if-bound",
        "directories": {},
        "claim_sources": (),
        **other,
    }
    problems = Problems()
    found = check(problems, file=file, **settings)
    return found, [str(problem) for problem in problems]


def test_good_settings_are_read_once_for_the_start(file: Path) -> None:
    found, problems = checked(file, proof="required")
    assert problems == []
    assert found.issuers is not None
    assert [issuer.url for issuer in found.issuers.issuers] == ["https://login.test"]
    assert found.proof is ProofPolicy.REQUIRED


def test_without_a_file_there_are_no_issuers_and_nothing_may_be_about_them() -> None:
    found, problems = checked(None, claim_sources=("https://claims.test",))
    assert found.issuers is None
    assert [problem.partition(":")[0] for problem in problems] == ["claim_sources[0]"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"proof": "perhaps"}, "proof"),
        ({"acceptance": Acceptance(max_lifetime=1.0)}, "max_token_lifetime: must be from 60 s"),
        ({"acceptance": Acceptance(frozenset({"ours"}))}, "forbidden_audiences: 'ours' is an audience of jwt[0]"),
        ({"directories": {"a": GraphConfig()}}, "graph.a.issuers: missing"),
        ({"claim_sources": ("claims",)}, "claim_sources[0]: must be"),
    ],
)
def test_each_mistake_is_named_by_its_setting(file: Path, other: dict[str, Any], message: str) -> None:
    _, problems = checked(file, **other)
    assert len(problems) == 1, problems
    assert problems[0].startswith(message)


def test_all_mistakes_are_found_at_once(tmp_path: Path) -> None:
    _, problems = checked(tmp_path / "none", proof="perhaps", claim_sources=("claims",))
    assert len(problems) == 3, problems
