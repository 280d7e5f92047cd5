"""An issuer in memory for the verifier's tests: keys, a signed token, its documents as a fetch function serves them."""

from __future__ import annotations

import base64
import json
from typing import Any

import jwt
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from arcbridge.errors import Unreachable
from arcbridge.identity.fetch import Reply
from arcbridge.settings.config import GraphConfig
from tests.support.entra import READER, TENANT, Entra

URL = "https://issuer.example/realm"
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
RSA_OTHER = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()

CONFIG = f"""
apiVersion: apiserver.config.k8s.io/v1
kind: AuthenticationConfiguration
jwt:
- issuer:
    url: {URL}
    audiences: [cluster]
  claimMappings:
    username: {{claim: sub, prefix: "oidc:"}}
    groups: {{claim: groups, prefix: "oidc:"}}
"""


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def jwk(key: Any, kid: str | None = "k1", **extra: Any) -> dict[str, Any]:
    """The public JWK of a private key."""
    public = key.public_key()
    name = {rsa.RSAPublicKey: "RSAAlgorithm", ec.EllipticCurvePublicKey: "ECAlgorithm"}
    for kind, algorithm in name.items():
        if isinstance(public, kind):
            entry = json.loads(getattr(jwt.algorithms, algorithm).to_jwk(public))
            break
    else:
        entry = json.loads(jwt.algorithms.OKPAlgorithm.to_jwk(public))
    entry.pop("key_ops", None)
    if kid is not None:
        entry["kid"] = kid
    return {**entry, **extra}


def claims(now: float = 1000.0, **changes: Any) -> dict[str, Any]:
    """Good claims at time `now`; a change to None removes the claim."""
    base: dict[str, Any] = {
        "iss": URL,
        "aud": "cluster",
        "sub": "alice",
        "iat": now,
        "exp": now + 600,
        "groups": ["dev"],
    }
    base.update(changes)
    return {name: value for name, value in base.items() if value is not None}


def token(payload: dict[str, Any], *, key: Any = RSA, alg: str = "RS256", kid: str | None = "k1", **header: Any) -> str:
    """A token by PyJWT."""
    headers = {**header, **({"kid": kid} if kid is not None else {})}
    return jwt.encode(payload, key, algorithm=alg, headers=headers)


def raw_token(header: bytes, payload: bytes, *, key: Any = RSA) -> str:
    """A token over these exact bytes, with a valid RS256 (or ES256) signature: for what a library would not write."""
    signed = f"{b64(header)}.{b64(payload)}".encode()
    if isinstance(key, rsa.RSAPrivateKey):
        signature = key.sign(signed, padding.PKCS1v15(), hashes.SHA256())
    else:
        r, s = decode_dss_signature(key.sign(signed, ec.ECDSA(hashes.SHA256())))
        signature = r.to_bytes(32, "big") + s.to_bytes(32, "big")
    return f"{signed.decode()}.{b64(signature)}"


class Issuer:
    """Serves discovery and JWKS through `fetch`; `down`, `keys`, `issuer` and `max_age` can be changed at any time."""

    def __init__(self, keys: list[dict[str, Any]] | None = None) -> None:
        self.keys = keys if keys is not None else [jwk(RSA)]
        self.issuer = URL
        self.down = False
        self.max_age: float | None = None
        self.urls: list[str] = []
        self.jwks_uri = "https://issuer.example/keys"

    async def fetch(self, url: str, ca_pem: str | None) -> Reply:
        self.urls.append(url)
        if self.down:
            raise Unreachable("issuer.example: down")
        if url.endswith("/.well-known/openid-configuration"):
            return Reply(200, json.dumps({"issuer": self.issuer, "jwks_uri": self.jwks_uri}).encode())
        return Reply(200, json.dumps({"keys": self.keys}).encode(), max_age=self.max_age)

    @property
    def key_fetches(self) -> int:
        return self.urls.count(self.jwks_uri)


def graph_settings(entra: Entra, **changes: Any) -> GraphConfig:
    """The settings of an application that reads groups in a tenant, by its secret."""
    secret = entra.directory / "secret"
    secret.write_text(entra.applications[READER].secret)
    given: dict[str, Any] = {
        "issuers": (entra.issuer,),
        "tenant": TENANT,
        "client_id": READER,
        "client_secret_file": secret,
        "url": entra.graph_url,
        "token_endpoint": entra.token_url,
        "ca_file": entra.ca_file,
    }
    return GraphConfig(**{**given, **changes})
