"""Holds what judges a caller of this relay: the token, the proof of its key, and what its user may use.

It only holds the judges together, for joins and for the HTTP API; `verifier`, `proofs` and `access` decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from arcbridge.identity.claims import Identity
from arcbridge.identity.proof import ProofChecker
from arcbridge.relay.access import Access


class Verifier(Protocol):
    """`identity.verifier.TokenVerifier`."""

    async def verify(self, token: str) -> Identity: ...


@dataclass(slots=True)
class CallerChecks:
    """The judges of one process, which a reload changes in place."""

    verifier: Verifier
    proofs: ProofChecker
    access: Access
