"""Issues the certificate that clients see: by the cluster's own CA, in this process, for this process.

It is issued again at two thirds of its life, and whenever the credential changes; clients need not be told, because
they pin the CA. Invariant: its key is kept in memory alone.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable

from arcbridge.net.tls import inner_server_context
from arcbridge.pki.authority import Authority, certificate_validity
from arcbridge.pki.credentials import AgentCredential, renew_at
from arcbridge.pki.names import cluster_server_name

LIFE = 7 * 86400.0
"""Seconds that a certificate is valid. It may be short, because it is renewed without an operator."""


class SessionCertificate:
    """Hands out the TLS context for sessions."""

    __slots__ = ("_clock", "_context", "_for", "_renew_at")

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._context: ssl.SSLContext | None = None
        self._for: tuple[str, str] = ("", "")
        self._renew_at = 0.0

    def context(self, credential: AgentCredential) -> ssl.SSLContext:
        """The context for `credential`; a few milliseconds when it must be issued anew. Raises StateError."""
        wanted = (credential.cluster, credential.cluster_ca_certificate_pem)
        if self._context is None or self._for != wanted or self._clock() >= self._renew_at:
            authority = Authority.load(credential.cluster_ca_certificate_pem, credential.cluster_ca_key_pem)
            leaf = authority.issue_server([cluster_server_name(credential.cluster)], life=LIFE)
            self._context = inner_server_context(leaf.certificate_pem, leaf.key_pem)
            self._renew_at = renew_at(*certificate_validity(leaf.certificate_pem))
            self._for = wanted
        return self._context
