"""Chooses the proxy for an address by HTTPS_PROXY, ALL_PROXY and NO_PROXY, as curl and Go read them.

HTTP proxies are asked by CONNECT (RFC 9110 §9.3.6), SOCKS proxies by version 5 (RFC 1928) with a user name and password
where they want one (RFC 1929). A name is given to the proxy as it is, which often is the only one that knows names
outside.

Pure: environment in, decision out. The lower-case spelling counts first.
"""

from __future__ import annotations

import ipaddress
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from arcbridge.errors import ConfigError
from arcbridge.net.address import Address, parse_address


@dataclass(frozen=True, slots=True, repr=False)
class Proxy:
    """A proxy; its credentials are in no text of it."""

    address: Address
    authorization: str = ""
    """Of an HTTP proxy: the whole value of Proxy-Authorization, or empty."""
    socks: bool = False
    """Whether it speaks SOCKS 5, otherwise HTTP."""
    username: str = ""
    """Of a SOCKS proxy; empty: none."""
    password: str = ""

    def __repr__(self) -> str:
        kind = "socks5://" if self.socks else ""
        return f"Proxy({kind}{self.address}{', with credentials' if self.authorization or self.username else ''})"


def proxy_for(address: Address, environ: Mapping[str, str]) -> Proxy | None:
    """Return the proxy for `address`, None to connect directly. Raises `ConfigError`, which never quotes the URL."""
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        text = environ.get(name, "").strip()
        if text:
            break
    else:
        return None
    if _excluded(address, environ.get("no_proxy") or environ.get("NO_PROXY") or ""):
        return None
    return parse_proxy(text, name)


def parse_proxy(text: str, name: str = "the proxy") -> Proxy:
    """Return the proxy of `http://user:password@host:port`, or `socks5://…`, credentials percent-encoded.

    `socks5h` is the same as `socks5`: names are always the proxy's to look up. `name` is the setting, for the error.
    Raises `ConfigError`.
    """
    try:
        url = urlsplit(text if "://" in text else f"http://{text}")
        port = url.port
    except ValueError as error:
        raise ConfigError(f"{name} is not a proxy URL; write http://host:port") from error
    socks = url.scheme in ("socks5", "socks5h")
    if url.scheme != "http" and not socks:
        raise ConfigError(
            f"{name}: only http:// and socks5:// proxies are spoken (TLS to the relay runs inside them, end to end)"
        )
    if not url.hostname:
        raise ConfigError(f"{name} is not a proxy URL; write http://host:port")
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    try:
        address = parse_address(f"{host}:{port or (1080 if socks else 80)}")
    except ConfigError as error:
        raise ConfigError(f"{name} is not a proxy URL; write http://host:port") from error
    if socks:
        username, password = unquote(url.username or ""), unquote(url.password or "")
        if max(len(username.encode()), len(password.encode())) > 255:
            raise ConfigError(f"{name}: SOCKS takes a user name and a password of at most 255 bytes each")
        return Proxy(address, socks=True, username=username, password=password)
    authorization = ""
    if url.username is not None:
        pair = f"{unquote(url.username)}:{unquote(url.password or '')}"
        authorization = "Basic " + b64encode(pair.encode()).decode("ascii")
    return Proxy(address, authorization)


def _excluded(address: Address, patterns: str) -> bool:
    return any(_matches(address, pattern) for pattern in patterns.replace(",", " ").split())


def _matches(address: Address, pattern: str) -> bool:
    """`*`, an IP, a CIDR, `host`, `.domain` or `*.domain` (a bare host covers its sub-domains), each with `:port`."""
    if pattern == "*":
        return True
    pattern = pattern.lower()
    try:
        ip = ipaddress.ip_address(address.host)
    except ValueError:
        ip = None
    if "/" in pattern:
        try:
            return ip is not None and ip in ipaddress.ip_network(pattern, strict=False)
        except ValueError:
            return False
    host, port = pattern, ""
    if pattern.startswith("["):
        host, _, tail = pattern[1:].partition("]")
        port = tail.removeprefix(":")
    elif pattern.count(":") == 1:
        host, _, port = pattern.partition(":")
    if port and port != str(address.port):
        return False
    if ip is not None:
        try:
            return ip == ipaddress.ip_address(host)
        except ValueError:
            return False
    host = host.removeprefix("*").strip(".")
    return bool(host) and (address.host == host or address.host.endswith("." + host))
