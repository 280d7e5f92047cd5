"""The server of many issuers."""

from __future__ import annotations

import json
import ssl
import urllib.request

import jwt

from tests.support.oidc_server import OidcServer


def test_discovery_keys_and_tokens_of_two_issuers() -> None:
    with OidcServer() as server:
        context = ssl.create_default_context(cadata=server.ca_pem)

        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )

        def fetched(url: str) -> dict[str, object]:
            with opener.open(url, timeout=10) as answer:
                found: dict[str, object] = json.load(answer)
                return found

        for name in ("a", "b"):
            document = fetched(server.url(name) + "/.well-known/openid-configuration")
            assert document["issuer"] == server.url(name)
            keys = jwt.PyJWKSet.from_dict(fetched(str(document["jwks_uri"])))
            token = server.mint(name, {"sub": "alice", "aud": "x"})
            claims = jwt.decode(token, keys["k1"], ["RS256"], audience="x", issuer=server.url(name))
            assert claims["sub"] == "alice"
