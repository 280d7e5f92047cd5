"""Upgrades (exec, attach, port-forward, cp): which are asked for, and which 101 answers one.

A failed upgrade that left a usable, authenticated connection behind was CVE-2018-1002105. Hence an upgrade gets a
connection of its own that is never used again; only a 101 that names the protocol asked for joins the two sides, and
any other answer ends both. Bytes that the caller sends before the 101 belong to no protocol that was agreed on: they
are an error (`proxy`). After the 101 nothing is parsed here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from arcbridge.agent.kube.request_facts import RawHeaders, RequestFacts, connection_options, listed, values_by_name
from arcbridge.agent.kube.status import RequestRefusal, bad_request
from arcbridge.http_fields import TOKEN_PROTOCOL

PROTOCOLS = {b"websocket": "websocket", b"spdy/3.1": "SPDY/3.1"}
CHANNELS = (b"v5.channel.k8s.io", b"v4.channel.k8s.io")
"""The WebSocket subprotocols of exec and attach in which each message names its channel."""
_CHOSEN = re.compile(rb"(?im)^sec-websocket-protocol:([^\r\n]*+)")


@dataclass(frozen=True, slots=True)
class UpgradeRequest:
    """What a caller asks to upgrade to."""

    protocol: str
    """As in the Upgrade header."""
    subprotocols: tuple[str, ...]
    """The WebSocket subprotocols that the caller offers."""
    stream_versions: tuple[str, ...]
    """The values of X-Stream-Protocol-Version that the caller offers."""


def requested_upgrade(facts: RequestFacts, subresource: str) -> UpgradeRequest | None:
    """Return what upgrade a head asks for, None when it asks for none; refuse those that are not carried."""
    upgrades = facts.values.get(b"upgrade")
    if upgrades is None:
        return None
    protocol = PROTOCOLS.get(upgrades[0].strip().lower()) if len(upgrades) == 1 else None
    if protocol is None or "upgrade" not in facts.options:
        raise bad_request("the only upgrades that are carried are 'websocket' and 'SPDY/3.1'")
    if facts.has_body or facts.method not in ("GET", "POST") or (protocol == "websocket" and facts.method != "GET"):
        raise bad_request("an upgrade is a GET, or with SPDY a POST, without a body")
    if not subresource:
        raise bad_request("upgrades exist for subresources such as exec, attach, portforward and proxy only")
    subprotocols = listed(facts.values, b"sec-websocket-protocol")
    if any([name.lower().startswith(TOKEN_PROTOCOL) for name in subprotocols]):
        raise bad_request("a token in Sec-WebSocket-Protocol is not carried")
    return UpgradeRequest(protocol, subprotocols, listed(facts.values, b"x-stream-protocol-version"))


def check_switch(headers: RawHeaders, wanted: UpgradeRequest) -> None:
    """Refuse (502) a 101 that does not switch to exactly what was asked for (RFC 9110 §7.8)."""
    values = values_by_name(headers)
    upgrades = [value.lower() for value in values.get(b"upgrade", ())]
    if upgrades != [wanted.protocol.lower().encode()] or "upgrade" not in connection_options(values):
        raise _wrong_switch("it switched to another protocol than asked for")
    for name, offered in (
        (b"sec-websocket-protocol", wanted.subprotocols),
        (b"x-stream-protocol-version", wanted.stream_versions),
    ):
        chosen = listed(values, name)
        if not set(chosen) <= set(offered) or len(chosen) > 1:
            raise _wrong_switch("it chose a subprotocol that was not offered")


def switch_lines(headers: RawHeaders, wanted: UpgradeRequest) -> bytes:
    """Return the header lines of the 101 for the caller: the API server's, with Connection and Upgrade written anew."""
    dropped = {b"connection", b"upgrade", b"transfer-encoding", b"content-length", b"keep-alive"}
    lines = [b"%b: %b\r\n" % (name, value) for name, value in headers if name.lower() not in dropped]
    return b"".join([*lines, b"Connection: Upgrade\r\nUpgrade: ", wanted.protocol.encode(), b"\r\n"])


def chosen_protocol(lines: bytes) -> bytes:
    """Return the WebSocket subprotocol that header lines of a 101 name; empty where they name none."""
    found = _CHOSEN.search(lines)
    return b"" if found is None else found[1].strip(b" \t")


def _wrong_switch(what: str) -> RequestRefusal:
    return RequestRefusal(502, f"the API server's answer to the upgrade cannot be passed on: {what}")
