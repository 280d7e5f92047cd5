from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.errors import ConfigError
from arcbridge.net.address import Address, check_origins, origin_of, parse_address, parse_listen, source_of


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("https://relay.example.org:8443", "relay.example.org", 8443),
        ("https://relay.example.org/", "relay.example.org", 443),
        ("HTTPS://Relay.Example.ORG.:1", "relay.example.org", 1),
        ("relay:443", "relay", 443),
        ("10.0.0.1", "10.0.0.1", 443),
        ("[2001:DB8::1]:8443", "2001:db8::1", 8443),
        ("[::1]", "::1", 443),
        ("2001:db8::1", "2001:db8::1", 443),
        ("https://[::1]:47011", "::1", 47011),
        ("bücher.example:443", "xn--bcher-kva.example", 443),
    ],
)
def test_spellings(text: str, host: str, port: int) -> None:
    address = parse_address(text)
    assert address == Address(host, port)
    assert parse_address(str(address)) == address
    assert parse_address(address.url) == address


@pytest.mark.parametrize(
    "text",
    [
        "", "http://relay:443", "https://", ":443", "relay:0", "relay:65536", "relay:", "relay:x",
        "relay:" + "9" * 5000,
        "https://relay:443/path", "https://user@relay:443", "relay:443?x", "[::1", "[relay]:443", "::1:x:443:99999",
        "a b:443", "-relay:443", "relay..org:443", "x" * 300 + ":443", "re\r\nlay:443",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_address(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://user:SECRET@relay:443", "http://user:SECRET@relay", "user:SECRET@relay:443", "https://SECRET@SECRET@x",
        "https://relay:443/?token=SECRET", "relay:443#SECRET", "https://user:SECRET@relay:99999",
    ],
)  # fmt: skip
def test_o1_an_error_quotes_no_credentials(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_address(text)
    assert "SECRET" not in caught.value.message
    with pytest.raises(ConfigError) as caught:
        parse_listen(text)
    assert "SECRET" not in caught.value.message


def test_listening_takes_any_host_and_any_port() -> None:
    assert parse_listen("0.0.0.0:0") == Address("0.0.0.0", 0)
    assert parse_listen(":8443") == Address("", 8443)
    assert parse_listen("[::]:443") == Address("::", 443)


@given(st.text(max_size=80))
def test_any_text_is_an_address_or_a_config_error(text: str) -> None:
    try:
        address = parse_address(text)
    except ConfigError:
        return
    assert 1 <= address.port <= 65535
    assert parse_address(str(address)) == address


def test_sources() -> None:
    assert source_of("192.0.2.1") == source_of("::ffff:192.0.2.1") == "192.0.2.1"
    assert source_of("2001:db8::1") == source_of("2001:db8::ffff:1") == "2001:db8::/64"
    assert source_of("2001:db8:0:1::1") != source_of("2001:db8::1")
    assert source_of("fe80::1%eth0") == "fe80::/64"
    assert source_of("") == source_of("a name") == "unknown"


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://login.example.org/a?b#c", "https://login.example.org"),
        ("https://LOGIN.example.org:443", "https://login.example.org"),
        ("https://login.example.org:8443/", "https://login.example.org:8443"),
        ("https://[2001:db8::1]:443/x", "https://[2001:db8::1]"),
    ],
)
def test_b34_origins_are_read_as_a_browser_reads_them(url: str, origin: str) -> None:
    assert origin_of(url) == origin


@pytest.mark.parametrize(
    "url",
    [
        "http://login.example.org",
        "https://user@login.example.org/",
        "https://h.example\\@login.example.org/",
        "https://l\u043egin.example.org/",
        "https://login.example.org:0/",
        "https://login.example.org:",
        "https://login.example.org:000443",
        "https://-login.example.org",
        "https://[x/",
        "https://",
        "",
    ],
)
def test_b36_a_url_without_an_origin_has_none_to_compare(url: str) -> None:
    with pytest.raises(ConfigError, match="is not an https:// URL of a host") as caught:
        origin_of(url)
    assert caught.value.message.isascii()
    assert "user" not in caught.value.message


@pytest.mark.parametrize("origin", ["", "http://a.example", "https://a.example/", "https://A.example", "https://a:443"])
def test_what_is_no_origin(origin: str) -> None:
    check_origins("s", ("https://a.example", "https://a.example:8443"))
    with pytest.raises(ConfigError, match=r"^s: each must be https://"):
        check_origins("s", ("https://a.example", origin))
