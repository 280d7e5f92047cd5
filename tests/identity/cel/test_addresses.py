"""URLs, addresses and blocks, where the table of `test_evaluation` does not reach."""

from __future__ import annotations

import pytest

from arcbridge.identity.cel.addresses import is_cidr, is_ip, is_url, query_of, read_cidr, read_ip, read_url
from arcbridge.identity.cel.values import EvaluationError, equal
from tests.identity.cel.calls import called

URLS = [
    ("https://user:pw@Host.example:8443/a%2Fb?x=1#f", ("https", "Host.example:8443", "/a%2Fb", "x=1")),
    ("mailto:a@b", ("mailto", "", "", "")), ("/only/a path", ("", "", "/only/a%20path", "")),
    ("https://[fe80::1%25eth0]:80/", ("https", "[fe80::1%eth0]:80", "/", "")), ("*", ("", "", "*", "")),
    ("a+b-c.d:x?", ("a+b-c.d", "", "", "")), ("https://h/é", ("https", "h", "/%C3%A9", "")),
    ("https://é/", ("https", "é", "/", "")),
]  # fmt: skip


@pytest.mark.parametrize(("text", "parts"), URLS, ids=[row[0] for row in URLS])
def test_parts_of_a_url(text: str, parts: tuple[str, ...]) -> None:
    url = read_url(text)
    assert (url.scheme, url.host, url.path, url.query) == parts


@pytest.mark.parametrize("text", [
    "", "relative", ":no-scheme", "https://h:port/", "https://a b/", "https://h/%zz", "https://[::1/",
    "https://[1.2.3.4]/", "https://x[::1]/", "https://u^@h/", "https://h%41/", "https://h:1:2/", "https://h/\n",
])  # fmt: skip
def test_no_url(text: str) -> None:
    assert not is_url(text)
    with pytest.raises(EvaluationError):
        read_url(text)


def test_hosts_and_ports() -> None:
    assert (read_url("https://h").hostname, read_url("https://h").port) == ("h", "")
    assert (read_url("https://[::1]:80").hostname, read_url("https://[::1]:80").port) == ("::1", "80")
    assert read_url("https://h:").port == ""


def test_a_query() -> None:
    query = query_of(read_url("https://h/?a=1&b=x+y&a=%41&c;d=1&e=%zz&f"))
    assert {key: list(query.find(key)[1]) for key in ("a", "b", "f")} == {"a": ["1", "A"], "b": ["x y"], "f": [""]}
    assert len(query) == 3


@pytest.mark.parametrize(
    "text", ["1.2.3", "1.2.3.04", "::ffff:1.2.3.4", "fe80::1%eth0", "", " ::1", "1.2.3.4/8", "::g"]
)
def test_no_address(text: str) -> None:
    assert not is_ip(text)


@pytest.mark.parametrize(
    "text", ["1.2.3.4", "1.2.3.4/33", "1.2.3.4/08", "1.2.3.4/+8", "::ffff:1.2.3.4/120", "/8", "::/129"]
)
def test_no_block(text: str) -> None:
    assert not is_cidr(text)


# In the order of `IP_PROPERTIES`: family, unspecified, loopback, local multicast, local unicast, global unicast.
IP_PROPERTIES = (
    "family", "isUnspecified", "isLoopback", "isLinkLocalMulticast", "isLinkLocalUnicast", "isGlobalUnicast",
)  # fmt: skip
PROPERTIES = [
    ("127.0.0.1", (4, False, True, False, False, False)), ("0.0.0.0", (4, True, False, False, False, False)),
    ("224.0.0.1", (4, False, False, True, False, False)), ("224.0.1.1", (4, False, False, False, False, False)),
    ("169.254.1.1", (4, False, False, False, True, False)), ("10.0.0.1", (4, False, False, False, False, True)),
    ("255.255.255.255", (4, False, False, False, False, False)), ("::", (6, True, False, False, False, False)),
    ("ff02::1", (6, False, False, True, False, False)), ("fe80::1", (6, False, False, False, True, False)),
    ("2001:db8::1", (6, False, False, False, False, True)),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), PROPERTIES, ids=[row[0] for row in PROPERTIES])
def test_properties_of_an_address(text: str, expected: tuple[int | bool, ...]) -> None:
    assert tuple(called(name, read_ip(text)) for name in IP_PROPERTIES) == expected


def test_blocks() -> None:
    block = read_cidr("10.1.2.3/8")
    assert str(called("masked", block)) == "10.0.0.0/8"
    assert called("containsIP", block, "10.255.0.1")
    assert not called("containsIP", block, "::1")
    assert called("containsCIDR", block, "10.1.0.0/16")
    assert not called("containsCIDR", block, "10.0.0.0/7")
    assert not called("containsCIDR", block, "::/0")
    assert equal(read_cidr("::1/64"), read_cidr("0::1/64"))
    with pytest.raises(EvaluationError):
        equal(block, read_ip("10.1.2.3"))
