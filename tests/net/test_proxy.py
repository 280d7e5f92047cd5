from __future__ import annotations

import pytest

from arcbridge.errors import ConfigError
from arcbridge.net.address import Address
from arcbridge.net.proxy import Proxy, parse_proxy, proxy_for

RELAY = Address("relay.example.org", 443)


def test_no_setting_means_direct() -> None:
    assert proxy_for(RELAY, {}) is None
    assert proxy_for(RELAY, {"HTTPS_PROXY": "", "HTTP_PROXY": "http://other:1"}) is None


def test_the_lower_case_spelling_counts_first() -> None:
    environ = {"https_proxy": "http://low:3128", "HTTPS_PROXY": "http://high:3128", "ALL_PROXY": "http://all:1"}
    assert proxy_for(RELAY, environ) == Proxy(Address("low", 3128))
    assert proxy_for(RELAY, {"ALL_PROXY": "all"}) == Proxy(Address("all", 80))


def test_credentials_are_percent_decoded_and_not_shown() -> None:
    proxy = parse_proxy("http://us%40er:p%3Ass@[::1]:3128")
    assert proxy == Proxy(Address("::1", 3128), "Basic dXNAZXI6cDpzcw==")
    assert "dXN" not in repr(proxy)


@pytest.mark.parametrize(
    "text", ["https://proxy:443", "socks4://proxy:1", "http://", "socks5://", "http://x:99999999", "http://a b"]
)
def test_other_proxies_are_refused_without_quoting_them(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        proxy_for(RELAY, {"HTTPS_PROXY": text.replace("://", "://user:secret@")})
    assert "HTTPS_PROXY" in caught.value.message
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_a_socks_proxy(scheme: str) -> None:
    assert proxy_for(RELAY, {"ALL_PROXY": f"{scheme}://proxy"}) == Proxy(Address("proxy", 1080), socks=True)
    proxy = proxy_for(RELAY, {"HTTPS_PROXY": f"{scheme}://us%40er:p%3Ass@[::1]:9050", "ALL_PROXY": "http://other"})
    assert proxy == Proxy(Address("::1", 9050), socks=True, username="us@er", password="p:ss")
    assert "us@er" not in repr(proxy)
    assert "p:ss" not in repr(proxy)


def test_credentials_that_socks_cannot_carry_are_refused_without_quoting_them() -> None:
    with pytest.raises(ConfigError, match="at most 255 bytes") as caught:
        parse_proxy(f"socks5://user:{'secret' * 50}@proxy")
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("host", "patterns", "direct"),
    [
        ("relay.example.org", "*", True),
        ("relay.example.org", "example.org", True),
        ("relay.example.org", ".example.org", True),
        ("relay.example.org", "*.example.org", True),
        ("relay.example.org", "localhost, RELAY.example.org", True),
        ("relay.example.org", "relay.example.org:443", True),
        ("relay.example.org", "relay.example.org:8443", False),
        ("relay.example.org", "ample.org", False),
        ("relay.example.org", "10.0.0.0/8,,", False),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3", "10.1.2.4", False),
        ("10.1.2.3", "nonsense/8", False),
        ("fd00::1", "fd00::/8", True),
        ("fd00::1", "[fd00::1]:443", True),
        ("fd00::1", "FD00:0::1", True),
    ],
)
def test_no_proxy(host: str, patterns: str, direct: bool) -> None:
    found = proxy_for(Address(host, 443), {"HTTPS_PROXY": "http://p:1", "NO_PROXY": patterns})
    assert (found is None) == direct
