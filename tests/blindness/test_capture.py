"""Recordings: put together in order, and never with a byte missing unnoticed."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.blindness.capture import BadCapture, connections

PORT = 8443
FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10


def packet(source: tuple[str, int], target: tuple[str, int], sequence: int, flags: int, payload: bytes = b"") -> bytes:
    tcp = struct.pack("!HHIIBBHHH", source[1], target[1], sequence, 0, 5 << 4, flags, 1000, 0, 0) + payload
    addresses = b"".join(bytes(map(int, host.split("."))) for host, _ in (source, target))
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 1, 0, 64, 6, 0) + addresses + tcp


def recording(path: Path, packets: list[bytes], *, link: int = 1, order: str = "<") -> Path:
    before = {1: b"\0" * 12 + b"\x08\x00", 101: b"", 113: b"\0" * 14 + b"\x08\x00", 276: b"\x08\x00" + b"\0" * 18}[link]
    data = struct.pack(f"{order}IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, link)
    for number, body in enumerate(packets):
        whole = before + body
        data += struct.pack(f"{order}IIII", 1000 + number, 500_000, len(whole), len(whole)) + whole
    path.write_bytes(data)
    return path


CLIENT, SERVER = ("192.0.2.1", 50000), ("192.0.2.2", PORT)


def opening(first: int = 100) -> list[bytes]:
    return [packet(CLIENT, SERVER, first, SYN), packet(SERVER, CLIENT, 900, SYN | ACK)]


@pytest.mark.parametrize("link", [1, 101, 113, 276])
@pytest.mark.parametrize("order", ["<", ">"])
def test_both_directions_of_a_connection(tmp_path: Path, link: int, order: str) -> None:
    packets = [*opening(), packet(CLIENT, SERVER, 101, ACK, b"ask"), packet(SERVER, CLIENT, 901, ACK, b"answer")]
    (found,) = connections(recording(tmp_path / "r", packets, link=link, order=order), PORT)
    assert (found.client, found.server, found.began) == (CLIENT, SERVER, 1000.5)
    assert (found.from_client, found.from_server) == (b"ask", b"answer")


def test_out_of_order_and_again(tmp_path: Path) -> None:
    said = [
        packet(CLIENT, SERVER, 104, ACK, b"def"),
        packet(CLIENT, SERVER, 101, ACK, b"ab"),
        packet(CLIENT, SERVER, 101, ACK, b"abcd"),  # sent again, with more
        packet(CLIENT, SERVER, 100, ACK, b"\0"),  # a keepalive: the byte before the next, again
        packet(("192.0.2.1", 1), ("192.0.2.2", 2), 1, ACK, b"elsewhere"),
    ]
    (found,) = connections(recording(tmp_path / "r", [*opening(), opening()[0], *said]), PORT)
    assert found.from_client == b"abcdef"


def test_a_port_that_is_used_again_is_another_connection(tmp_path: Path) -> None:
    packets = [
        *opening(),
        packet(CLIENT, SERVER, 101, ACK, b"one"),
        *opening(7000),
        packet(CLIENT, SERVER, 7001, ACK, b"two"),
    ]
    assert [each.from_client for each in connections(recording(tmp_path / "r", packets), PORT)] == [b"one", b"two"]


def test_whether_the_end_was_recorded(tmp_path: Path) -> None:
    fin = [packet(CLIENT, SERVER, 101, ACK | FIN), packet(SERVER, CLIENT, 901, ACK | FIN, b"last")]
    for said, ended in (([], False), (fin[:1], False), (fin, True), ([packet(SERVER, CLIENT, 901, RST)], True)):
        (found,) = connections(recording(tmp_path / "r", [*opening(), *said]), PORT)
        assert found.ended is ended
        assert found.from_server == (b"last" if said == fin else b"")


def test_a_byte_that_was_not_recorded_is_an_error(tmp_path: Path) -> None:
    packets = [*opening(), packet(CLIENT, SERVER, 103, ACK, b"late")]
    with pytest.raises(BadCapture, match="2 bytes were not recorded"):
        connections(recording(tmp_path / "r", packets), PORT)
