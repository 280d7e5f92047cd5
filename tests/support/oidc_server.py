"""OpenID Connect discovery and keys for any number of issuers at one HTTPS server, and tokens of all of them.

    with OidcServer() as server:
        server.url("a")                      # https://127.0.0.1:PORT/a
        server.mint("a", {"sub": "alice"})   # claims as they are, but `iss`

It is for tables of configurations, each of which needs an issuer of its own; `tests.support.issuer` is the one that
logs people in. It answers in a thread, ends with the `with` block, and holds one RSA key. Further paths are answered by
what a test puts into `routes`.
"""

from __future__ import annotations

import http.server
import json
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import jwt
import trustme
from cryptography.hazmat.primitives.asymmetric import rsa

Route = Callable[[str, Mapping[str, str], bytes], tuple[int, dict[str, Any]]]
"""Gets the path with its query, the headers and the body; gives a status and a JSON object."""
ACCESS_TOKEN = "f005ba11"
"""What a request for a distributed claim has to bring."""
_WELL_KNOWN = "/.well-known/openid-configuration"
_CLAIMS = "/claims/"


class OidcServer:
    """The server. `ca_pem`: the certificate that it is to be trusted by."""

    def __init__(self) -> None:
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        ca = trustme.CA()
        self.ca_pem = ca.cert_pem.bytes().decode()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        leaf = ca.issue_cert("127.0.0.1")
        with tempfile.NamedTemporaryFile(suffix=".pem") as file:
            file.write(leaf.private_key_and_cert_chain_pem.bytes())
            file.flush()
            context.load_cert_chain(file.name)
        self.routes: dict[str, Route] = {}
        """What answers to `METHOD /path`, instead of the documents of the issuers."""
        self.sources: dict[str, str] = {}
        """Distributed claims (OpenID Connect Core 1.0 §5.6.2): a JWT for each path below `/claims/`."""
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer()

            def do_POST(self) -> None:
                self.answer()

            def answer(self) -> None:
                received = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                route = outer.routes.get(f"{self.command} {self.path.partition('?')[0]}")
                status = 200
                if route is not None:
                    status, document = route(self.path, {key: value for key, value in self.headers.items()}, received)
                    body = json.dumps(document).encode()
                elif self.path.startswith(_CLAIMS):
                    # Without its token, or for a path that has none, an empty answer.
                    allowed = self.headers.get("Authorization", "") == f"Bearer {ACCESS_TOKEN}"
                    body = outer.sources.get(self.path, "").encode() if allowed else b""
                    status = 200 if body else 404
                else:
                    body = json.dumps(outer.document(self.path)).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Write nothing."""

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def get_request(self) -> tuple[ssl.SSLSocket, Any]:
                connection, address = super().get_request()
                # The handshake happens at the first read, in the connection's own thread.
                return context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address

            def handle_error(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:
                """Ignore a client that goes away."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def url(self, name: str) -> str:
        """The issuer of this name."""
        return f"https://127.0.0.1:{self._server.server_address[1]}/{name}"

    def source(self, path: str, text: str) -> dict[str, str]:
        """Serve a JWT with a distributed claim at `/claims/PATH`, and return what `_claim_sources` says of it."""
        self.sources[_CLAIMS + path] = text
        return {"endpoint": self.url(f"claims/{path}"), "access_token": ACCESS_TOKEN}

    def document(self, path: str) -> dict[str, Any]:
        """What is answered to a path: the discovery document of an issuer, or the keys of all."""
        if path.endswith(_WELL_KNOWN):
            issuer = self.url(path.removesuffix(_WELL_KNOWN).strip("/"))
            return {
                "issuer": issuer,
                "jwks_uri": f"{issuer}/keys",
                "authorization_endpoint": f"{issuer}/authorize",
                "token_endpoint": f"{issuer}/token",
                "response_types_supported": ["id_token"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["RS256"],
            }
        key = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(self._key.public_key()))
        key.pop("key_ops", None)
        return {"keys": [{**key, "kid": "k1", "use": "sig", "alg": "RS256"}]}

    def read(self, token: str, audience: str) -> dict[str, Any]:
        """The claims of a token of this server for an audience. Raises jwt.PyJWTError."""
        claims: dict[str, Any] = jwt.decode(token, self._key.public_key(), ["RS256"], audience=audience)
        return claims

    def mint(self, name: str, claims: Mapping[str, Any], issuer: str = "") -> str:
        """A signed token of an issuer, or of `issuer` instead."""
        return jwt.encode({**claims, "iss": issuer or self.url(name)}, self._key, "RS256", headers={"kid": "k1"})

    def stop(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
