"""Addresses as people write them: `https://host:port`, `host:port`, `[2001:db8::1]:443`, `host`."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from urllib.parse import urlsplit

from arcbridge.errors import ConfigError

DEFAULT_PORT: Final = 443
# One label of a host name; underscores are not legal but exist in internal zones.
_LABEL: Final = re.compile(r"[a-z0-9_]([-a-z0-9_]{0,61}[a-z0-9_])?")


@dataclass(frozen=True, slots=True)
class Address:
    """A host (lower-case name, or an IP without brackets; empty: any, only to listen on) and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"https://{self}"

    @property
    def origin(self) -> str:
        """The same as browsers write it (RFC 6454 §6.1): without the port where it is 443."""
        return self.url.removesuffix(f":{DEFAULT_PORT}")


@lru_cache(maxsize=32)
def parse_address(text: str, *, default_port: int = DEFAULT_PORT) -> Address:
    """Return the address of a peer to connect to; raises `ConfigError` which quotes `text` without its credentials.

    A URL may be `https` only and may hold nothing but host and port: a path or credentials that would be
    silently dropped are refused instead. The last ones are kept: each DIAL names one of an agent's few relays.
    """
    rest = text.strip()
    scheme, separator, after = rest.partition("://")
    if separator:
        if scheme.lower() != "https":
            raise ConfigError(f"address {_shown(text)!r}: only https:// is spoken here; write https://host:port")
        rest = after.removesuffix("/")
    address = _split(text, rest, default_port)
    if not address.host:
        raise ConfigError(f"address {_shown(text)!r} has no host; write https://host:port")
    if not address.port:
        raise ConfigError(f"address {_shown(text)!r} has port 0; a peer has a port between 1 and 65535")
    return address


def origin_of(url: str) -> str:
    """Return the origin of an https URL (RFC 6454 §4) as `https://host`, with the port where it is not 443.

    Raises ConfigError for anything else, and for a URL that a browser could read otherwise than this program does: two
    such URLs have nothing that may be compared.
    """
    try:
        if url.startswith("https://") and url.isascii() and "\\" not in url:
            return parse_address(f"https://{urlsplit(url).netloc}").url.removesuffix(f":{DEFAULT_PORT}")
    except (ValueError, ConfigError):
        pass
    raise ConfigError(f"{_shown(url)!a} is not an https:// URL of a host, with a port only where one follows the colon")


def issuer_origin(issuer: str, setting: str) -> str:
    """Return the origin of an issuer's URL. Raises ConfigError, which names the setting."""
    try:
        parts = urlsplit(issuer)
    except ValueError:
        raise ConfigError(f"{setting}: it is not an https:// URL") from None
    # Before any error quotes it: such a part may be a secret (OpenID Connect Discovery §4 has no place for them).
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(f"{setting}: an issuer's URL has no user information, query or fragment")
    try:
        return origin_of(issuer)
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error.message}") from None


def check_origins(setting: str, origins: Collection[str]) -> None:
    """Raise `ConfigError`, which names the setting, unless each of these is an origin as `origin_of` writes it."""
    for one in origins:
        with contextlib.suppress(ConfigError):
            if one == origin_of(one):
                continue
        raise ConfigError(
            f"{setting}: each must be https:// and a host in lower case, with the port where it is not {DEFAULT_PORT}"
        )


def parse_listen(text: str, *, default_port: int = DEFAULT_PORT) -> Address:
    """Return an address to listen on: the host may be empty (every interface), the port 0 (any free one)."""
    return _split(text, text.strip(), default_port)


def _split(text: str, rest: str, default_port: int) -> Address:
    if any(character in rest for character in "/?#@\\ \t\r\n"):
        raise ConfigError(f"address {_shown(text)!r}: expected only host and port, such as relay.example.org:443")
    if rest.startswith("["):
        host, bracket, tail = rest[1:].partition("]")
        if not bracket or (tail and not tail.startswith(":")) or not isinstance(_ip(host), ipaddress.IPv6Address):
            raise ConfigError(f"address {_shown(text)!r}: expected [IPv6 address]:port")
        port = tail[1:] if tail else None
    elif rest.count(":") > 1:
        if not isinstance(_ip(rest), ipaddress.IPv6Address):
            raise ConfigError(f"address {_shown(text)!r}: an IPv6 address with a port is written [address]:port")
        host, port = rest, None
    else:
        host, colon, tail = rest.partition(":")
        port = tail if colon else None
    return Address(_host(text, host), default_port if port is None else _port(text, port))


def _host(text: str, host: str) -> str:
    host = host.lower().removesuffix(".")
    ip = _ip(host)
    if ip is not None:
        return str(ip)
    if not host:
        return ""
    try:
        ascii_host = host.encode("ascii").decode() if host.isascii() else host.encode("idna").decode("ascii")
    except UnicodeError as error:
        raise ConfigError(f"address {_shown(text)!r}: {host!r} is not a host name") from error
    if len(ascii_host) > 253 or not all(_LABEL.fullmatch(label) for label in ascii_host.split(".")):
        raise ConfigError(f"address {_shown(text)!r}: {host!r} is not a host name")
    return ascii_host


def _port(text: str, port: str) -> int:
    # Length first: int() of a very long digit string is slow and raises another error.
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise ConfigError(f"address {_shown(text)!r}: the port is a number between 1 and 65535")
    return int(port)


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def source_of(address: str) -> str:
    """Return the key under which limits count a peer: its IPv4 address, or the /64 of an IPv6 subscriber."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False).network_address) + "/64"


def _shown(text: str) -> str:
    """`text` as an error may quote it: without the credentials and the query that a URL can hold, and not all of it."""
    if "@" in text:
        text = "…@" + text.rpartition("@")[2]
    return re.split(r"[?#]", text, maxsplit=1)[0][:100]
