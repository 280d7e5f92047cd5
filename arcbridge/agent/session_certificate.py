"""Issues the certificate that clients see: by the cluster's own CA, in this process, for this process.

It is issued again at two thirds of its life, where the clock was set back behind its beginning, and whenever the
credential changes; clients need not be told, because they pin the CA. Invariant: its key is kept in memory alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from arcbridge.identity.proof import Peer
from arcbridge.net.tls import ServerContext, inner_server_context
from arcbridge.pki.authority import certificate_validity
from arcbridge.pki.credentials import AgentCredential, renew_at
from arcbridge.pki.names import cluster_server_name

LIFE = 7 * 86400.0
"""Seconds that a certificate is valid. It may be short, because it is renewed without an operator."""


class SessionTls(NamedTuple):
    """How the agent meets a client."""

    context: ServerContext
    peer: Peer
    """What a client has to name in the proof that a token is its own."""
    oldest_ca_pem: str = ""
    """The oldest CA of the cluster that counts; empty while its CA was never rotated."""


class SessionCertificate:
    """Hands out the TLS context for sessions."""

    __slots__ = ("_clock", "_for", "_renew_at", "_tls", "_valid_from")

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._tls: SessionTls | None = None
        self._for: tuple[str, str] = ("", "")
        self._renew_at = self._valid_from = 0.0

    def tls(self, credential: AgentCredential) -> SessionTls:
        """Return the context for `credential`, and its key; a few milliseconds when they are made anew. Raises
        StateError."""
        wanted = (credential.cluster, credential.cluster_ca_certificate_pem + credential.cluster_rotation)
        if self._tls is None or self._for != wanted or not self._valid_from <= self._clock() < self._renew_at:
            rotation = credential.rotation
            authority = rotation.authority()
            leaf = authority.issue_server([cluster_server_name(credential.cluster)], life=LIFE)
            context = inner_server_context(leaf.certificate_pem + authority.links_pem, leaf.key_pem)
            known, oldest = (rotation.list.pins, rotation.oldest) if rotation.succession else ((), "")
            self._tls = SessionTls(context, Peer(context.spki, authority.pin, known), oldest)
            validity = certificate_validity(leaf.certificate_pem)
            self._valid_from, self._renew_at = validity[0], renew_at(*validity)
            self._for = wanted
        return self._tls
