"""Reads a recording of tcpdump and puts the bytes of each TCP connection together, each way.

It knows the classic file format, Ethernet and Linux's cooked captures, IPv4 and IPv6. A byte that was not recorded is
an error and never a silent gap: what is missing cannot be searched.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_IPV4: Final = 0x0800
_IPV6: Final = 0x86DD
_TCP: Final = 6
_FIN: Final = 0x01
_SYN: Final = 0x02
_RST: Final = 0x04
_ACK: Final = 0x10

# Link type -> bytes before the packet, and where in them its EtherType is; none for raw IP.
_LINKS: Final[dict[int, tuple[int, int | None]]] = {1: (14, 12), 101: (0, None), 113: (16, 14), 276: (20, 0)}

End = tuple[str, int]
"""Address and port."""


class BadCapture(Exception):
    """A recording that cannot be read, or that lacks bytes."""


class _Direction:
    """One direction of a connection, whose segments come in any order and more than once."""

    def __init__(self) -> None:
        self.first: int | None = None
        """Sequence number of the first byte; None until the SYN has come."""
        self.ended = False
        """Whether a FIN or RST was recorded."""
        self._segments: dict[int, bytes] = {}

    def add(self, sequence: int, payload: bytes) -> None:
        """Take the payload of a segment."""
        if self.first is None:
            raise BadCapture("the beginning of a connection was not recorded")
        offset = (sequence - self.first) & 0xFFFFFFFF
        # A keepalive repeats a byte before the first; nothing that is recorded here is 2 GiB long.
        if offset < 1 << 31 and len(payload) > len(self._segments.get(offset, b"")):
            self._segments[offset] = payload

    def stream(self) -> bytes:
        """All bytes in their order."""
        out = bytearray()
        for offset, payload in sorted(self._segments.items()):
            if offset > len(out):
                raise BadCapture(f"{offset - len(out)} bytes were not recorded: give tcpdump a larger buffer (-B)")
            out += payload[len(out) - offset :]
        return bytes(out)


@dataclass(frozen=True, slots=True)
class Connection:
    """One TCP connection to the server's port."""

    client: End
    server: End
    began: float
    """Seconds since 1970."""
    from_client: bytes
    from_server: bytes
    ended: bool
    """Whether it was recorded to its end, both ways or by a reset."""


def connections(path: Path, port: int) -> list[Connection]:
    """The connections to `port` in a recording, in the order in which they began. Raises `BadCapture`."""
    current: dict[tuple[End, End], tuple[_Direction, _Direction]] = {}
    found: list[tuple[End, End, float, _Direction, _Direction]] = []
    for time, packet in _packets(path):
        segment = _segment(packet)
        if segment is None or port not in (segment[0][1], segment[1][1]):
            continue
        source, target, sequence, flags, payload = segment
        to_server = target[1] == port
        key = (source, target) if to_server else (target, source)
        if flags & (_SYN | _ACK) == _SYN:
            first = (sequence + 1) & 0xFFFFFFFF
            if key not in current or current[key][0].first != first:  # else the SYN again
                there, back = current[key] = _Direction(), _Direction()
                there.first = first
                found.append((*key, time, there, back))
        elif key not in current:
            if payload:
                raise BadCapture("a connection is older than the recording: start tcpdump first, then the client")
        elif flags & _SYN:
            current[key][1].first = (sequence + 1) & 0xFFFFFFFF
        else:
            there, back = current[key]
            way = there if to_server else back
            if payload:
                way.add(sequence, payload)
            way.ended = way.ended or bool(flags & (_FIN | _RST))
            if flags & _RST:
                there.ended = back.ended = True
    return [
        Connection(client, server, began, there.stream(), back.stream(), there.ended and back.ended)
        for client, server, began, there, back in found
    ]


def _packets(path: Path) -> Iterator[tuple[float, bytes]]:
    """Time and network packet of each record."""
    data = path.read_bytes()
    if len(data) < 24:
        raise BadCapture(f"{path} is no recording of tcpdump")
    for order in "<>":
        magic = struct.unpack_from(f"{order}I", data)[0]
        if magic in (0xA1B2C3D4, 0xA1B23C4D):
            break
    else:
        raise BadCapture(f"{path} is no recording of tcpdump (pcapng is not read; use tcpdump -w)")
    fraction = 1e-9 if magic == 0xA1B23C4D else 1e-6
    link = struct.unpack_from(f"{order}I", data, 20)[0] & 0xFFFF
    if link not in _LINKS:
        raise BadCapture(f"link type {link} is not known: record with -i of one interface, or -i any")
    skip, type_at = _LINKS[link]
    at = 24
    while at + 16 <= len(data):
        seconds, parts, kept, length = struct.unpack_from(f"{order}IIII", data, at)
        packet = data[at + 16 : at + 16 + kept]
        at += 16 + kept
        if kept < length:
            raise BadCapture("packets are cut: record with -s 0")
        if len(packet) < kept:
            return  # the last record, of a tcpdump that was killed
        if type_at is not None and struct.unpack_from("!H", packet, type_at)[0] not in (_IPV4, _IPV6):
            continue
        yield seconds + parts * fraction, packet[skip:]


def _segment(packet: bytes) -> tuple[End, End, int, int, bytes] | None:
    """Source, target, sequence number, flags and payload; None for what is not TCP."""
    if packet[0] >> 4 == 4:
        header = (packet[0] & 0x0F) * 4
        if packet[9] != _TCP or struct.unpack_from("!H", packet, 6)[0] & 0x3FFF:
            return None
        addresses = packet[12:16], packet[16:20]
        end = struct.unpack_from("!H", packet, 2)[0] or len(packet)
    else:
        header = 40
        if packet[6] != _TCP:
            return None
        addresses = packet[8:24], packet[24:40]
        end = 40 + (struct.unpack_from("!H", packet, 4)[0] or len(packet) - 40)
    source, target = (str(ipaddress.ip_address(address)) for address in addresses)
    from_port, to_port, sequence = struct.unpack_from("!HHI", packet, header)
    begin = header + (packet[header + 12] >> 4) * 4
    return (source, from_port), (target, to_port), sequence, packet[header + 13], packet[begin:end]
