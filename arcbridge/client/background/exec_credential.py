"""Makes the credential that `arcbridge credential` prints for kubectl: an ExecCredential.

The form is that of client.authentication.k8s.io/v1. This module issues no certificate and asks no server: the
certificate is the cluster's local one, and a token is read from its file. Invariant: the credential ends `RENEW_BEFORE`
seconds before its certificate, and no later than its token, so that kubectl asks again before either is refused.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from arcbridge.client.credentials.jwt_unverified import read_unverified
from arcbridge.client.credentials.token_files import read_token
from arcbridge.client.serving.served_cluster import ServedCluster

RENEW_BEFORE = 3600.0
"""Seconds before the certificate's end at which kubectl is to ask again."""


def exec_credential(cluster: ServedCluster) -> dict[str, Any]:
    """Return the document, in token mode with the token of the file besides. Raises Unauthenticated, StateError."""
    from arcbridge.pki.authority import certificate_validity

    certificates = cluster.certificates
    assert certificates is not None
    status: dict[str, Any] = {
        "clientCertificateData": certificates.client_certificate_pem,
        "clientKeyData": certificates.client_key_pem,
    }
    ends_at = certificate_validity(certificates.client_certificate_pem)[1] - RENEW_BEFORE
    if (file := cluster.config.token_file) is not None:
        status["token"] = read_token(file)
        token_ends_at = read_unverified(status["token"]).expires_at
        ends_at = min(ends_at, token_ends_at or ends_at)
    status["expirationTimestamp"] = datetime.fromtimestamp(ends_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    # The kind comes first: the plugin looks for it, and hands the line on as it is.
    return {
        "kind": "ExecCredential",
        "apiVersion": "client.authentication.k8s.io/v1",
        "spec": {"interactive": False},
        "status": status,
    }
