"""The header of version 2, as the specification's section 2.2 lays it out, and whatever else comes in its place."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from arcbridge.errors import ConfigError
from arcbridge.relay.proxy_protocol import (
    FIXED,
    MAX_HEADER,
    SIGNATURE,
    ProxyHeader,
    ProxyIncomplete,
    ProxyRefusal,
    is_among,
    parse_networks,
    peek,
)


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def header(
    source: str = "192.0.2.1",
    *,
    command: int = 0x21,
    family: int | None = None,
    tlvs: bytes = b"",
    block: bytes | None = None,
) -> bytes:
    """A header as a balancer sends it, by default for a connection over TCP from `source`."""
    address = ipaddress.ip_address(source)
    if block is None:
        block = address.packed + address.packed + struct.pack("!HH", 50_000, 443)
    if family is None:
        family = 0x11 if address.version == 4 else 0x21
    return SIGNATURE + bytes([command, family]) + struct.pack("!H", len(block) + len(tlvs)) + block + tlvs


ENDPOINT = tlv(0xEA, b"\x01vpce-08d2bf15fac5001c9") + tlv(0x04, b"") + tlv(0x03, bytes(4))


@pytest.mark.parametrize("source", ["192.0.2.1", "0.0.0.0", "2001:db8::17", "::ffff:192.0.2.1"])
@pytest.mark.parametrize("tlvs", [b"", ENDPOINT, tlv(0x20, bytes(1500))])
def test_where_a_connection_comes_from(source: str, tlvs: bytes) -> None:
    data = header(source, tlvs=tlvs)
    assert peek(data) == ProxyHeader(len(data), str(ipaddress.ip_address(source)))
    # What follows is the connection's own, whatever it is.
    assert peek(data + data) == ProxyHeader(len(data), str(ipaddress.ip_address(source)))


@pytest.mark.parametrize("family", [0x00, 0x11, 0x21, 0x31, 0xFF])
@pytest.mark.parametrize("block", [b"", bytes(12), b"anything at all"])
def test_a_balancer_that_speaks_for_itself_names_no_source(family: int, block: bytes) -> None:
    """LOCAL: the block is skipped, its family with it."""
    data = header(command=0x20, family=family, block=block)
    assert peek(data) == ProxyHeader(len(data), "")


@pytest.mark.parametrize("block", [b"", ENDPOINT, bytes(36)])
def test_a_connection_of_no_known_family_names_no_source(block: bytes) -> None:
    data = header(family=0x00, block=block)
    assert peek(data) == ProxyHeader(len(data), "")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 50000 443\r\n", ProxyRefusal.VERSION_1),
        (b"PROXY UNKNOWN\r\n", ProxyRefusal.VERSION_1),
        (b"\x16\x03\x01\x02\x00\x01", ProxyRefusal.MISSING),
        (b"GET / HTTP/1.1\r\n", ProxyRefusal.MISSING),
        (SIGNATURE[:-1] + b"\r", ProxyRefusal.MISSING),
        (header(command=0x11), ProxyRefusal.MALFORMED),
        (header(command=0x31), ProxyRefusal.MALFORMED),
        (header(command=0x22), ProxyRefusal.MALFORMED),
        (header(command=0x2F), ProxyRefusal.MALFORMED),
        (header(family=0x12), ProxyRefusal.MALFORMED),
        (header(family=0x10), ProxyRefusal.MALFORMED),
        (header(family=0x41), ProxyRefusal.MALFORMED),
        (header(family=0x31, block=bytes(216)), ProxyRefusal.MALFORMED),
        (header(family=0x11, block=bytes(11)), ProxyRefusal.MALFORMED),
        (header(family=0x21, block=bytes(35)), ProxyRefusal.MALFORMED),
        (header(family=0x21), ProxyRefusal.MALFORMED),
        (header(tlvs=b"\x01"), ProxyRefusal.MALFORMED),
        (header(tlvs=b"\x01\x00"), ProxyRefusal.MALFORMED),
        (header(tlvs=b"\x01\x00\x05abcd"), ProxyRefusal.MALFORMED),
        (header(tlvs=bytes(2)), ProxyRefusal.MALFORMED),
        (header(tlvs=bytes(MAX_HEADER)), ProxyRefusal.TOO_LARGE),
        (SIGNATURE + b"\x21\x11\xff\xff", ProxyRefusal.TOO_LARGE),
    ],
)
def test_whatever_else_comes_is_refused(data: bytes, reason: ProxyRefusal) -> None:
    assert peek(data) is reason


def test_the_largest_one() -> None:
    data = header(tlvs=tlv(0x20, bytes(MAX_HEADER - FIXED - 12 - 3)))
    assert len(data) == MAX_HEADER
    assert isinstance(peek(data), ProxyHeader)
    assert peek(header(tlvs=tlv(0x20, bytes(MAX_HEADER - FIXED - 12 - 2)))) is ProxyRefusal.TOO_LARGE


addresses = st.ip_addresses().map(str)
tlvs = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=200)), max_size=5).map(
    lambda found: b"".join(tlv(kind, value) for kind, value in found)
)


@given(addresses, tlvs, st.binary(max_size=50))
def test_in_pieces_and_with_anything_behind_it(source: str, tlvs: bytes, behind: bytes) -> None:
    """However the bytes arrive, the verdict comes when it is due, says what the whole says, and stays."""
    data = header(source, tlvs=tlvs)
    for size in range(len(data)):
        answer = peek(data[:size])
        assert isinstance(answer, ProxyIncomplete)
        assert size < answer.need <= len(data)
    assert peek(data + behind) == ProxyHeader(len(data), source)


def reference(data: bytes) -> str | None:
    """The origin by the specification's layout, read in another way; None: not a header with an origin."""
    if len(data) < 16 or data[:12] != bytes.fromhex("0d0a0d0a000d0a515549540a") or data[12] != 0x21:
        return None
    size = struct.unpack("!H", data[14:16])[0]
    rest = data[16 : 16 + size]
    width = {0x11: 4, 0x21: 16}.get(data[13])
    if width is None or len(rest) != size or size > MAX_HEADER - 16 or size < 2 * width + 4:
        return None
    view = rest[2 * width + 4 :]
    while view:
        if len(view) < 3 or len(view) < 3 + (view[1] << 8 | view[2]):
            return None
        view = view[3 + (view[1] << 8 | view[2]) :]
    return str(ipaddress.ip_address(rest[:width]))


@st.composite
def nearly_headers(draw: st.DrawFn) -> bytes:
    """Headers with some bytes changed, cut or put in: what a parser is fooled with."""
    data = bytearray(header(draw(addresses), tlvs=draw(tlvs), command=draw(st.sampled_from([0x20, 0x21]))))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data) - 1))
        change = draw(st.sampled_from(["set", "cut", "insert"]))
        if change == "set":
            data[at] = draw(st.integers(0, 255))
        elif change == "cut" and len(data) > 1:
            del data[at]
        else:
            data.insert(at, draw(st.integers(0, 255)))
    return bytes(data)


@given(st.one_of(nearly_headers(), st.binary(max_size=100), st.binary(max_size=100).map(SIGNATURE.__add__)))
@example(b"")
@example(SIGNATURE)
def test_bytes_of_any_kind(data: bytes) -> None:
    """It never raises, asks for no more than its bound, agrees with the other reading, and no verdict changes later."""
    answer = peek(data)
    if isinstance(answer, ProxyIncomplete):
        assert len(data) < answer.need <= MAX_HEADER
        assert reference(data) is None
        return
    if isinstance(answer, ProxyHeader):
        assert FIXED <= answer.size <= min(len(data), MAX_HEADER)
        assert answer.source == (reference(data) or "")
        assert peek(data[: answer.size]) == answer
    else:
        assert reference(data) is None
    assert peek(data + b"\x00more") == answer


def test_which_peers_are_balancers() -> None:
    networks = parse_networks(("10.0.0.5", " 10.1.0.0/24 ", "2001:db8::/64"))
    for address, expected in (
        ("10.0.0.5", True),
        ("::ffff:10.0.0.5", True),
        ("10.0.0.6", False),
        ("10.1.0.255", True),
        ("2001:db8::1", True),
        ("2001:db8::1%eth0", True),
        ("2001:db8:1::1", False),
        ("", False),
    ):
        assert is_among(address, networks) is expected, address
    assert not is_among("10.0.0.5", ())


@pytest.mark.parametrize("text", ["", "balancer", "10.0.0.5:443", "10.0.0.5/24", "10.0.0.0/33", "x" * 1000])
def test_a_setting_that_is_no_network_is_quoted(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^proxy_protocol_from: .* is no address or network") as caught:
        parse_networks([text])
    assert len(caught.value.message) < 200
