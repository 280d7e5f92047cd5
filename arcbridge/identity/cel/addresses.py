"""Kubernetes' libraries for URLs, IP addresses and CIDR blocks, read as Go's `net/url` and `net/netip` read them.

Nothing is resolved or connected to: these are functions on text.
"""

from __future__ import annotations

import ipaddress
import re
import sys
from dataclasses import dataclass
from functools import partial
from urllib.parse import unquote_to_bytes

from arcbridge.identity.cel.values import EvaluationError, Map, Opaque, StringList, succeeds

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Url(Opaque):
    """`url(…)`: its parts, each as the function of that name gives it."""

    scheme: str
    host: str
    path: str
    query: str
    whole: str

    type_name = "kubernetes.URL"

    def __str__(self) -> str:
        return self.whole

    @property
    def memory(self) -> int:
        return 200 + sum(map(sys.getsizeof, (self.host, self.path, self.query, self.whole)))

    @property
    def hostname(self) -> str:
        """The host without its port and without the brackets of an IPv6 address."""
        name = self.host
        colon = name.rfind(":")
        if colon >= 0 and re.fullmatch(r":[0-9]*", name[colon:]):
            name = name[:colon]
        return name[1:-1] if name.startswith("[") and name.endswith("]") else name

    @property
    def port(self) -> str:
        """The port as it was written, or empty."""
        match = re.search(r":([0-9]*)$", self.host)
        return match[1] if match else ""


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PORT = re.compile(r"(:[0-9]*)?")
_HOST = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:\[\]<>\"%\x80-\U0010ffff-]*")
_USER = re.compile(r"[A-Za-z0-9._:~!$&'()*+,;=%@-]*")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_HOST_ESCAPE = re.compile(r"%(?!25|[89A-Fa-f][0-9A-Fa-f])")
_PATH_SAFE = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.~$&+,/:;=@")
_PATH_VALID = _PATH_SAFE | frozenset("!'()*[]%")


def read_url(whole: str, *, fragment: bool = True) -> Url:
    """Read an absolute URL or an absolute path; `fragment` cuts off what follows `#`. Raises EvaluationError."""
    if fragment:
        read_url(whole, fragment=False)
        whole, _, after = whole.partition("#")
        _unescape(after)
    if _CONTROL.search(whole) or not whole:
        raise EvaluationError("URL parse error")
    if whole == "*":
        return Url("", "", "*", "", whole)
    if whole.startswith(":"):
        raise EvaluationError("URL parse error: missing protocol scheme")
    match = _SCHEME.match(whole)
    scheme = match[1].lower() if match else ""
    rest, _, query = whole[match.end() if match else 0 :].partition("?")
    if not rest.startswith("/"):
        if scheme:
            return Url(scheme, "", "", query, whole)
        raise EvaluationError("URL parse error: invalid URI for request")
    host = ""
    if rest.startswith("//") and (scheme or (fragment and not rest.startswith("///"))):
        authority, slash, path = rest[2:].partition("/")
        rest = slash + path
        user, at, host = authority.rpartition("@")
        if at and (not _USER.fullmatch(user) or _BAD_ESCAPE.search(user)):
            raise EvaluationError("URL parse error: invalid userinfo")
        host = _host(scheme, host)
    path = _unescape(rest)
    escaped = rest if set(rest) <= _PATH_VALID else _escape(path)
    return Url(scheme, host, escaped, query, whole)


is_url = succeeds(partial(read_url, fragment=False))
"""`isURL`."""


def query_of(url: Url) -> Map:
    """`getQuery`: the values of each name, in their order; a pair that cannot be read is left out."""
    out: dict[str, list[str]] = {}
    for pair in url.query.split("&"):
        if not pair or ";" in pair:
            continue
        name, _, content = pair.partition("=")
        try:
            key, item = _unescape(name.replace("+", " ")), _unescape(content.replace("+", " "))
        except EvaluationError:
            continue
        out.setdefault(key, []).append(item)
    return Map.of({key: StringList(items) for key, items in out.items()})


def _host(scheme: str, host: str) -> str:
    bracket = host.rfind("[")
    if bracket > 0:
        raise EvaluationError("URL parse error: invalid IP-literal")
    if bracket == 0:
        close = host.rfind("]")
        if close < 0 or not _PORT.fullmatch(host[close + 1 :]):
            raise EvaluationError("URL parse error: invalid host")
        literal, percent, zone = host[1:close].partition("%25")
        if not isinstance(_address(literal), ipaddress.IPv6Address) or (percent and not zone):
            raise EvaluationError("URL parse error: invalid host")
        return f"[{literal}{'%' + _unescape(zone) if percent else ''}]{host[close + 1 :]}"
    colon = host.find(":")
    if colon >= 0:
        if scheme not in ("http", "https"):
            colon = host.rfind(":")
        if not _PORT.fullmatch(host[colon:]):
            raise EvaluationError("URL parse error: invalid port")
    if not _HOST.fullmatch(host) or _HOST_ESCAPE.search(host):
        raise EvaluationError("URL parse error: invalid host")
    return _unescape(host)


def _unescape(escaped: str) -> str:
    if "%" not in escaped:
        return escaped
    if _BAD_ESCAPE.search(escaped):
        raise EvaluationError("URL parse error: invalid URL escape")
    return unquote_to_bytes(escaped).decode("utf-8", "replace")


def _escape(path: str) -> str:
    out = []
    for char in path:
        if char in _PATH_SAFE:
            out.append(char)
        else:
            out.extend(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogatepass"))
    return "".join(out)


@dataclass(frozen=True, slots=True)
class Ip(Opaque):
    """`ip(…)`: an address without a zone, and no IPv4 address inside an IPv6 one."""

    address: Address

    type_name = "net.IP"

    def __str__(self) -> str:
        return str(self.address)

    @property
    def size(self) -> int:
        return self.address.max_prefixlen // 8


@dataclass(frozen=True, slots=True)
class Cidr(Opaque):
    """`cidr(…)`: an address, which may have bits after the prefix, and the prefix's length."""

    address: Address
    bits: int

    type_name = "net.CIDR"

    def __str__(self) -> str:
        return f"{self.address}/{self.bits}"

    @property
    def size(self) -> int:
        return (self.bits + 7) // 8

    @property
    def network(self) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        """The block itself."""
        return ipaddress.ip_network((self.address, self.bits), strict=False)


def _address(literal: str) -> Address:
    try:
        return ipaddress.ip_address(literal)
    except ValueError as error:
        raise EvaluationError("not an IP address") from error


def read_ip(text: str) -> Ip:
    """Read an address. Raises EvaluationError."""
    address = _address(text)
    if "%" in text or (isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None):
        raise EvaluationError("IP addresses with a zone, and IPv4-mapped ones, are not allowed")
    return Ip(address)


def read_cidr(text: str) -> Cidr:
    """Read a block such as `10.0.0.0/8`. Raises EvaluationError."""
    string, slash, bits = text.rpartition("/")
    if not slash or not re.fullmatch(r"0|[1-9][0-9]{0,2}", bits):
        raise EvaluationError("not a CIDR block")
    address = read_ip(string).address
    if int(bits) > address.max_prefixlen:
        raise EvaluationError("prefix length out of range")
    return Cidr(address, int(bits))


is_ip, is_cidr = succeeds(read_ip), succeeds(read_cidr)
"""`isIP` and `isCIDR`."""


def is_link_local_multicast(ip: Ip) -> bool:
    """`isLinkLocalMulticast`."""
    address = ip.address
    if isinstance(address, ipaddress.IPv4Address):
        return address in ipaddress.IPv4Network("224.0.0.0/24")
    return address.packed[0] == 0xFF and address.packed[1] & 0x0F == 0x02


def is_global_unicast(ip: Ip) -> bool:
    """`isGlobalUnicast`."""
    address = ip.address
    special = address.is_unspecified or address.is_loopback or address.is_multicast or address.is_link_local
    return not special and address != ipaddress.IPv4Address("255.255.255.255")


def contains_ip(block: Cidr, ip: Ip) -> bool:
    """`containsIP`."""
    return ip.address.version == block.address.version and ip.address in block.network


def contains_cidr(block: Cidr, inner: Cidr) -> bool:
    """`containsCIDR`."""
    return block.bits <= inner.bits and contains_ip(block, Ip(inner.network.network_address))
