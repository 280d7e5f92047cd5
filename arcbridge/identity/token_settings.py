"""Checks the settings on tokens that relay and agent have alike: issuers, proofs, and the sources of groups.

It reads the authentication file and looks at the secrets of `[graph.NAME]`, adds every mistake to `Problems`, and keeps
what it read. Which of these settings a role requires, and what it warns of, is in the role's own `settings.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from arcbridge.identity import authentication, groups
from arcbridge.identity.authentication import AuthenticationConfig
from arcbridge.identity.proof import ProofPolicy, policy_of
from arcbridge.identity.verifier import Acceptance
from arcbridge.settings import named_files
from arcbridge.settings.config import GraphConfig
from arcbridge.settings.problems import Problems


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """What a check has read; complete where it found no error."""

    issuers: AuthenticationConfig | None
    """None: no authentication file is named."""
    acceptance: Acceptance
    proof: ProofPolicy


def check(
    problems: Problems,
    *,
    file: Path | None,
    acceptance: Acceptance,
    proof: str,
    directories: Mapping[str, GraphConfig],
    claim_sources: Iterable[str],
) -> TokenSettings:
    """Check the settings `authentication` (its `file`), `max_token_lifetime` and `forbidden_audiences` (`acceptance`),
    `proof`, `graph` (its `directories`) and `claim_sources`."""
    policy = ProofPolicy.IF_BOUND
    with problems.collect("proof"):
        policy = policy_of(proof)
    issuers = None if file is None else AuthenticationConfig(())
    if file is not None and named_files.read(problems, "authentication", file) is not None:
        with problems.collect("authentication"):
            issuers, found = authentication.inspect(file)
            problems.extend(found)
            named_files.check_issuers(problems, file, [(i.path, i.url) for i in issuers.issuers])
    with problems.collect("max_token_lifetime"):
        acceptance.check(issuers or AuthenticationConfig(()))
    with problems.collect("graph"):
        groups.check(directories, claim_sources, issuers)
    named_files.check_graph(problems, directories)
    return TokenSettings(issuers, acceptance, policy)
