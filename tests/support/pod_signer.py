"""A signer of PodCertificateRequests for tests: Kubernetes runs none for the API server's own clients.

    with PodSigner(cluster) as signer:
        cluster.add_pod(...)  # with a volume of source podCertificate
        signer.rotate("default")

It reads requests from the API server and writes certificates into their status, in a thread. A certificate is for the
request's ServiceAccount, as the API server names it, and says nothing of the pod: no form is known for that.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import threading
from types import TracebackType
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.support.cluster import Cluster

API = "/apis/certificates.k8s.io/v1beta1"
UID = x509.ObjectIdentifier("1.3.6.1.4.1.57683.2")
"""Kubernetes reads a user's uid from this attribute of the subject (AllowParsingUserUIDFromCertAuth)."""


class PodSigner:
    """Signs for every pod that asks, with the CA of the API server's clients."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ca = x509.load_pem_x509_certificate(cluster.client_ca.cert_pem.bytes())
        self._key: Any = serialization.load_pem_private_key(cluster.client_ca.private_key_pem.bytes(), None)
        self.issued: list[str] = []
        """The credential ids by which the API server's audit knows the certificates, in their order."""
        self.requests: list[dict[str, Any]] = []
        """What was signed, as it was asked."""
        self.failure: Exception | None = None

    def rotate(self, namespace: str) -> None:
        """Have the node ask again for each pod of a namespace."""
        self._cluster.request("DELETE", f"{API}/namespaces/{namespace}/podcertificaterequests")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(30)
        if error is None and self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            while not self._over.wait(0.2):
                for request in self._cluster.request("GET", f"{API}/podcertificaterequests")["items"]:
                    if not request.get("status", {}).get("conditions"):
                        self._sign(request)
        except Exception as failure:
            self.failure = failure

    def _sign(self, request: dict[str, Any]) -> None:
        certificate = self.certificate(
            base64.b64decode(request["spec"]["stubPKCS10Request"]),
            request["metadata"]["namespace"],
            request["spec"]["serviceAccountName"],
            request["spec"]["serviceAccountUID"],
        )
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        issued = {"type": "Issued", "status": "True", "reason": "Test", "message": ""}
        issued["lastTransitionTime"] = _time(begin)
        request["status"] = {
            "conditions": [issued],
            "certificateChain": certificate.public_bytes(serialization.Encoding.PEM).decode(),
            "notBefore": _time(begin),
            "notAfter": _time(end),
            "beginRefreshAt": _time(begin + (end - begin) / 2),
        }
        path = f"{API}/namespaces/{request['metadata']['namespace']}/podcertificaterequests"
        self._cluster.request("PUT", f"{path}/{request['metadata']['name']}/status", request)
        self.requests.append(request)
        der = certificate.public_bytes(serialization.Encoding.DER)
        self.issued.append(f"X509SHA256={hashlib.sha256(der).hexdigest()}")

    def certificate(self, csr: bytes, namespace: str, account: str, uid: str) -> x509.Certificate:
        """Return a certificate of a ServiceAccount for the key of a certificate request (DER), valid for a day."""
        groups = ("system:serviceaccounts", f"system:serviceaccounts:{namespace}")
        subject = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
        subject.append(x509.NameAttribute(NameOID.COMMON_NAME, f"system:serviceaccount:{namespace}:{account}"))
        subject.append(x509.NameAttribute(UID, uid))
        begin = datetime.datetime.now(datetime.UTC).replace(microsecond=0) - datetime.timedelta(minutes=1)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name(subject))
            .issuer_name(self._ca.subject)
            .public_key(x509.load_der_x509_csr(csr).public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + datetime.timedelta(days=1))
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def _time(when: datetime.datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")
