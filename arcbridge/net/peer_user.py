"""Finds out whose process is at the other end of a connection within this machine: this user's, or another one's.

The kernel knows the user of each socket and tells every process (sock_diag(7), /proc/net/tcp). Where it cannot be
asked, as on other systems, no peer counts as another user: this is a further wall behind what a caller has to show. A
socket that its process has closed already has no user any more: such a peer is told apart, and is to be refused too,
because it may have been another user's.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import sys
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

_SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST = 20, 1  # linux/sock_diag.h, linux/netlink.h
_NETLINK_SOCK_DIAG = 4
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_REQUEST = struct.Struct("=BBBxI")  # inet_diag_req_v2 before the socket's id: family, protocol, extensions, states
_ID = struct.Struct("!HH16s16s12s")  # inet_diag_sockid: ports, addresses; interface and cookie
_MESSAGE = struct.Struct("=BBBB48sIIIII")  # inet_diag_msg: family, state, timer, retransmissions, id, …, uid, inode
_ANY_COOKIE = b"\0\0\0\0" + b"\xff" * 8
_ROOT = 0
_NO_USER = -1
"""The user of a socket that no process has."""


class PeerUser(StrEnum):
    """Whose process a peer is."""

    OWN = "own"
    """This user's or root's; also that of another machine, and any where the kernel does not tell."""
    OTHER = "other"
    GONE = "gone"
    """Its process has closed the socket, so whose it was cannot be told."""


OWN = PeerUser.OWN  # as a name of the module: see `wire.stream`


class UnixPeer(NamedTuple):
    """The process that connected to a Unix socket, as it was then."""

    pid: int
    uid: int


def unix_peer(sock: socket.socket) -> UnixPeer | None:
    """Return whose process is the peer of a Unix socket; None where the system does not say."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return None
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i")))
    return UnixPeer(pid, uid)


def peer_user(sock: socket.socket) -> PeerUser:
    """Tell whose process is the peer of a connected TCP socket over loopback. For root, each is its own."""
    if sys.platform != "linux" or os.geteuid() == _ROOT:
        return OWN
    try:
        near, far = sock.getsockname()[:2], sock.getpeername()[:2]
    except OSError:
        return PeerUser.GONE
    if not ipaddress.ip_address(far[0]).is_loopback:
        return OWN
    known, uid = _by_netlink(sock.family, far, near)
    if not known:
        known, uid = _by_table(sock.family, far, near)
    if known and uid == _NO_USER:
        return PeerUser.GONE
    return PeerUser.OTHER if known and uid not in (os.geteuid(), _ROOT) else OWN


def _by_netlink(family: int, source: tuple[str, int], target: tuple[str, int]) -> tuple[bool, int]:
    """Return whether the kernel was able to tell, and the user of the socket at `source` that is connected to
    `target`."""
    pack = socket.inet_pton
    wanted = _ID.pack(source[1], target[1], pack(family, source[0]), pack(family, target[0]), _ANY_COOKIE)
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0xFFFFFFFF) + wanted
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_SOCK_DIAG) as kernel:
            kernel.send(_HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + body)
            answer = kernel.recv(4096)
    except OSError:
        return False, 0
    if len(answer) < _HEADER.size + _MESSAGE.size or _HEADER.unpack_from(answer)[1] != _SOCK_DIAG_BY_FAMILY:
        return False, 0  # also "no such socket", which a kernel without tcp_diag says as well
    *_, found, _, _, _, uid, inode = _MESSAGE.unpack_from(answer, _HEADER.size)
    # Without an inode the process has closed the socket, and the kernel says root. A listener fits any peer.
    return found[:36] == wanted[:36] and inode != 0, uid


def _by_table(family: int, source: tuple[str, int], target: tuple[str, int]) -> tuple[bool, int]:
    """Read the same out of /proc/net; a socket that is not there, or without a process, has `_NO_USER`."""
    try:
        lines = Path("/proc/net/tcp6" if family == socket.AF_INET6 else "/proc/net/tcp").read_text().splitlines()
    except OSError:
        return False, 0
    ends = [_in_table(family, *source), _in_table(family, *target)]
    for line in lines[1:]:
        fields = line.split()  # proc_net_tcp of the kernel: number, both ends, state, …, uid in 7, inode in 9
        if fields[1:3] == ends:
            return (True, int(fields[7])) if fields[9] != "0" else (True, _NO_USER)
    return True, _NO_USER


def _in_table(family: int, host: str, port: int) -> str:
    words = struct.unpack(f"={1 if family == socket.AF_INET else 4}I", socket.inet_pton(family, host))
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"
