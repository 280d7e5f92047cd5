"""The PROXY protocol, version 2: where a connection comes from, as a TCP load balancer says before the first byte.

`peek` is a pure function of the bytes that have arrived so far, to be called again with *more of the same bytes*; it
keeps nothing and takes nothing. What a header says is believed only of balancers that the settings name; the listener
asks for a header from these and from no other peer.

Invariant: a header is read in one way or refused. Its size is bounded by `MAX_HEADER`; version 1, other versions,
commands and families, lengths that do not hold the addresses, and TLVs that do not fill their space are refused. The
layout is that of section 2.2 of the specification ("The PROXY protocol, versions 1 & 2", HAProxy).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from arcbridge.errors import ConfigError

SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"
FIXED: Final = 16
"""Bytes before the addresses: signature, version and command, family, length."""
MAX_HEADER: Final = 2048
"""Bytes of a header. The addresses take 36, and balancers add TLVs of some hundred: a cloud's endpoint id, a name."""

_LOCAL: Final = 0x20
_PROXY: Final = 0x21
_UNSPEC: Final = 0x00
_TCP4: Final = 0x11
_TCP6: Final = 0x21
_V1: Final = b"PROXY "

Networks = Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]


class ProxyRefusal(Enum):
    """Why bytes are not the header that is expected; also the name under which they are counted."""

    MISSING = "proxy_missing"
    """The connection begins with something else."""
    VERSION_1 = "proxy_v1"
    MALFORMED = "proxy_malformed"
    TOO_LARGE = "proxy_too_large"


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """A complete header."""

    size: int
    """Bytes from the first of the connection to the last of the header."""
    source: str
    """IP of the connection's origin; empty: the balancer speaks for itself or does not know."""


@dataclass(frozen=True, slots=True)
class ProxyIncomplete:
    """No answer before `need` bytes, counted from the first of the connection, have arrived."""

    need: int


def peek(data: bytes) -> ProxyHeader | ProxyIncomplete | ProxyRefusal:
    """Read a header from the first bytes of a connection.

    After `ProxyIncomplete(need)` call again once at least `need` bytes are there; `need` is more than was given and at
    most `MAX_HEADER`. What was refused stays refused, whatever follows.
    """
    start = data[: len(SIGNATURE)]
    if not SIGNATURE.startswith(start):
        return ProxyRefusal.VERSION_1 if data[: len(_V1)] == _V1[: len(data)] else ProxyRefusal.MISSING
    if len(data) < FIXED:
        return ProxyIncomplete(FIXED)
    command, family, length = data[12], data[13], int.from_bytes(data[14:16], "big")
    size = FIXED + length
    if command not in (_LOCAL, _PROXY):
        return ProxyRefusal.MALFORMED
    if size > MAX_HEADER:
        return ProxyRefusal.TOO_LARGE
    if len(data) < size:
        return ProxyIncomplete(size)
    if command == _LOCAL:
        # The balancer's own connection, a health check: family and addresses say nothing.
        return ProxyHeader(size, "")
    return _proxied(family, data[FIXED:size], size)


def _proxied(family: int, block: bytes, size: int) -> ProxyHeader | ProxyRefusal:
    if family == _UNSPEC:
        # Without addresses; where they would end, and TLVs begin, is not known.
        return ProxyHeader(size, "")
    if family == _TCP4 and len(block) >= 12 and _filled(block[12:]):
        return ProxyHeader(size, str(ipaddress.IPv4Address(block[:4])))
    if family == _TCP6 and len(block) >= 36 and _filled(block[36:]):
        return ProxyHeader(size, str(ipaddress.IPv6Address(block[:16])))
    return ProxyRefusal.MALFORMED


def _filled(tlvs: bytes) -> bool:
    """Return whether `tlvs` is a sequence of whole TLVs: one byte of type, two of length, the value."""
    at = 0
    while at < len(tlvs):
        if len(tlvs) < at + 3:
            return False
        at += 3 + int.from_bytes(tlvs[at + 1 : at + 3], "big")
    return at == len(tlvs)


def parse_networks(texts: Sequence[str]) -> Networks:
    """Return the networks of `proxy_protocol_from`; raises `ConfigError` that quotes what is none."""
    found = []
    for text in texts:
        try:
            found.append(ipaddress.ip_network(text.strip()))
        except ValueError as error:
            raise ConfigError(
                f"proxy_protocol_from: {text[:60]!r} is no address or network; write it like 10.0.0.5 or 10.1.0.0/24"
            ) from error
    return tuple(found)


def is_among(address: str, networks: Networks) -> bool:
    """Return whether `address` is in one of the networks."""
    if not networks:
        return False
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return any(parsed.version == network.version and parsed in network for network in networks)
