"""Hands out the TLS contexts towards relays: one per purpose, made anew only when the credential has changed."""

from __future__ import annotations

import ssl

from arcbridge.agent.enrol import CredentialKeeper
from arcbridge.net.tls import RelayTrust, outer_client_context
from arcbridge.pki.credentials import AgentCredential


class OuterTls:
    """The contexts with the agent's certificate; making one takes some milliseconds, so they are cached."""

    __slots__ = ("_contexts", "_for", "_keeper")

    def __init__(self, keeper: CredentialKeeper) -> None:
        self._keeper = keeper
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._for: AgentCredential | None = None

    def context(self, alpn: str) -> ssl.SSLContext:
        """Return the context for one protocol. Raises StateError before the agent has enrolled."""
        credential = self._keeper.current
        if credential is not self._for:
            self._contexts.clear()
            self._for = credential
        context = self._contexts.get(alpn)
        if context is None:
            pair = (credential.certificate_pem, credential.key_pem)
            context = outer_client_context(RelayTrust(credential.relay_ca_pem), alpn, client_certificate=pair)
            self._contexts[alpn] = context
        return context
