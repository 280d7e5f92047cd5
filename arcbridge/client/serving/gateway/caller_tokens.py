"""Reads the tokens that come with a request, and hands them on to the relay and to the cluster.

The gateway verifies no token; the relay and the agent do, before a session is established. So a caller is known by the
very texts of its tokens. Invariant: no claim of a token chooses a session, because every sender can write any claim.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from arcbridge.client.credentials.jwt_unverified import read_unverified
from arcbridge.client.credentials.token_files import check_token
from arcbridge.client.credentials.tokens import ClusterToken, Tokens
from arcbridge.errors import Unauthenticated
from arcbridge.http_fields import TOKEN_PROTOCOL
from arcbridge.settings.config import LoginConfig

if TYPE_CHECKING:
    from multidict import CIMultiDictProxy

RELAY_HEADER: Final = "Arcbridge-Relay-Authorization"
"""The header of the token for the relay; Authorization has the token for the cluster."""
SUBPROTOCOLS: Final = "Sec-WebSocket-Protocol"
"""The header of WebSocket subprotocols."""


@dataclass(frozen=True, slots=True)
class CallerTokens:
    """The tokens of one caller: equal where both texts are equal, and only there."""

    relay: str = field(repr=False)
    cluster: str = field(repr=False)


class GivenTokens(Tokens):
    """The tokens of one caller as a session asks for them; there are no others, and none is renewed."""

    def __init__(self, given: CallerTokens, login: LoginConfig) -> None:
        """`login`: whether one token may serve both, and what audience says that one is for a cluster."""
        super().__init__(login, None)
        self._given = given

    async def access(self) -> str:
        """Return the token for the relay. Raises OneToken for one that has a cluster's audience."""
        if self._audience() and not self._login.one_token:
            self._refuse_for_both(self._given.relay)
        return self._given.relay

    async def cluster(self) -> ClusterToken:
        """Return the token for the cluster."""
        return ClusterToken("oidc", self._given.cluster, read_unverified(self._given.cluster).expires_at)

    def cluster_at_hand(self) -> str:
        """Return the token for the cluster."""
        return self._given.cluster


def caller_tokens(headers: CIMultiDictProxy[str], *, one_token: bool) -> CallerTokens:
    """Return the tokens of a request. `one_token`: one token may serve the relay and the cluster.

    Raises Unauthenticated, which names the header and quotes no token.
    """
    found = _bearer(headers, "Authorization")
    if headers.get("Upgrade", "").lower() == "websocket":
        found += _of_subprotocols(headers)
    if not found:
        raise Unauthenticated("send your token for the cluster with each request: Authorization: Bearer TOKEN")
    if len(found) > 1:
        raise Unauthenticated("the request has more than one token for the cluster; send one")
    cluster = check_token(found[0].encode(), "the header Authorization")
    of_relay = _bearer(headers, RELAY_HEADER)
    if len(of_relay) > 1:
        raise Unauthenticated(f"the request has {RELAY_HEADER} more than once; send it once")
    relay = check_token(of_relay[0].encode(), f"the header {RELAY_HEADER}") if of_relay else cluster
    if relay == cluster and not one_token:
        raise Unauthenticated(
            "relay and cluster would get the same token, with which the relay could act as you in the cluster; send a "
            f"token for the relay as well ({RELAY_HEADER}: Bearer TOKEN), or have the gateway's operator set "
            "one_token = true under [login] and accept that"
        )
    return CallerTokens(relay, cluster)


def other_subprotocols(headers: CIMultiDictProxy[str]) -> list[str]:
    """Return the WebSocket subprotocols of a request without the one that is a token."""
    return [name for name in _subprotocols(headers) if not name.lower().startswith(TOKEN_PROTOCOL)]


def _bearer(headers: CIMultiDictProxy[str], name: str) -> list[str]:
    """Return the tokens of a header, which may be there more than once. Raises Unauthenticated for another scheme."""
    found = []
    for value in headers.getall(name, ()):
        scheme, _, token = value.strip().partition(" ")
        if scheme.lower() != "bearer" or not token.isascii():
            raise Unauthenticated(f"the header {name} does not have the form `Bearer TOKEN`")
        found.append(token)
    return found


def _of_subprotocols(headers: CIMultiDictProxy[str]) -> list[str]:
    found = []
    for name in _subprotocols(headers):
        if name.lower().startswith(TOKEN_PROTOCOL):
            text = name[len(TOKEN_PROTOCOL) :]
            try:
                found.append(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode("ascii"))
            except (binascii.Error, ValueError) as error:
                raise Unauthenticated(f"the token in {SUBPROTOCOLS} is not base64url") from error
    return found


def _subprotocols(headers: CIMultiDictProxy[str]) -> list[str]:
    listed = ",".join(headers.getall(SUBPROTOCOLS, ()))
    return [name.strip() for name in listed.split(",") if name.strip()]
