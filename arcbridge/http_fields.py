"""Names of HTTP that the agent and the client's gateway have to treat alike."""

from __future__ import annotations

HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "http2-settings"}
)
"""Fields of one connection alone (RFC 9110 §7.6.1); of the family `proxy-*` each end has what it knows."""
TOKEN_PROTOCOL = "base64url.bearer.authorization.k8s.io."
"""What the WebSocket subprotocol begins with in which a browser sends a token to the API server."""
