"""Decrypts TLS 1.3 with keys that an end gave away (RFC 8446, sections 5.2 and 7.1), as in an SSLKEYLOGFILE.

It authenticates every record and checks no certificate. After close_notify the rest of a direction is what came behind
the TLS, byte for byte. What it has no keys for it says so and leaves closed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

_CHANGE_CIPHER_SPEC: Final = 20
_ALERT: Final = 21
_HANDSHAKE: Final = 22
_APPLICATION_DATA: Final = 23
_CLIENT_HELLO: Final = 1
_SERVER_HELLO: Final = 2
_FINISHED: Final = 20
_KEY_UPDATE: Final = 24
_SERVER_NAME: Final = 0
_ALPN: Final = 16

# Cipher suite -> key length, hash, AEAD.
_SUITES: Final[dict[int, tuple[int, type[hashes.SHA256 | hashes.SHA384], type[AESGCM | ChaCha20Poly1305]]]] = {
    0x1301: (16, hashes.SHA256, AESGCM),
    0x1302: (32, hashes.SHA384, AESGCM),
    0x1303: (32, hashes.SHA256, ChaCha20Poly1305),
}

KeyLog = dict[tuple[str, bytes], bytes]
"""(Label, client random) -> secret."""


class Closed(Exception):
    """TLS to which there are no keys, or no TLS 1.3."""


@dataclass(frozen=True, slots=True)
class Hello:
    """What every machine on the path reads of a handshake."""

    random: bytes
    server_name: str
    protocols: tuple[str, ...]
    """What the client offers by ALPN."""


@dataclass(frozen=True, slots=True)
class Opened:
    """One connection, decrypted with the keys of an end."""

    hello: Hello
    from_client: bytes
    from_server: bytes
    handshake: bytes
    """Both ends' handshake messages, certificates included."""
    rest_of_client: bytes
    """What came behind the client's close_notify."""
    rest_of_server: bytes


def read_key_log(*paths: Path) -> KeyLog:
    """Return the secrets of key log files."""
    found: KeyLog = {}
    for path in paths:
        for line in path.read_text().splitlines():
            if line and not line.startswith("#"):
                label, random, secret = line.split()
                found[label, bytes.fromhex(random)] = bytes.fromhex(secret)
    return found


def hello(from_client: bytes) -> Hello:
    """Read the ClientHello at the beginning of a stream. Raises `Closed` where there is none."""
    message = bytearray()
    for kind, body, _ in _records(from_client):
        if kind != _HANDSHAKE:
            break
        message += body
        if len(message) >= 4 and len(message) >= 4 + int.from_bytes(message[1:4]):
            return _client_hello(bytes(message))
    raise Closed("no TLS: there is no ClientHello")


def decrypt(from_client: bytes, from_server: bytes, keys: KeyLog) -> Opened:
    """Decrypt both directions of a connection. Raises `Closed` without keys for it."""
    greeting = hello(from_client)
    if ("CLIENT_TRAFFIC_SECRET_0", greeting.random) not in keys:
        raise Closed("the key log has no keys for this TLS")
    suite = _server_suite(from_server)
    handshake = bytearray()
    plain, rest = [], []
    for label, stream in (("CLIENT", from_client), ("SERVER", from_server)):
        secrets = [
            keys[f"{label}_{kind}", greeting.random] for kind in ("HANDSHAKE_TRAFFIC_SECRET", "TRAFFIC_SECRET_0")
        ]
        payload, messages, behind = _direction(stream, suite, secrets)
        plain.append(payload)
        rest.append(behind)
        handshake += messages
    return Opened(greeting, plain[0], plain[1], bytes(handshake), rest[0], rest[1])


def _direction(stream: bytes, suite: int, secrets: list[bytes]) -> tuple[bytes, bytes, bytes]:
    """Payload, handshake messages, and what comes behind close_notify."""
    payload, messages, pending = bytearray(), bytearray(), bytearray()
    opener = _Opener(suite, secrets[0])
    for kind, body, end in _records(stream):
        if kind == _CHANGE_CIPHER_SPEC:
            continue
        if kind == _HANDSHAKE:
            messages += body
            continue
        if kind != _APPLICATION_DATA:
            raise Closed(f"a record of type {kind} in clear")
        inner, content = opener.open(body)
        if inner == _APPLICATION_DATA:
            payload += content
        elif inner == _ALERT:
            return bytes(payload), bytes(messages), stream[end:]
        else:
            messages += content
            pending += content
            while len(pending) >= 4 and len(pending) >= (size := 4 + int.from_bytes(pending[1:4])):
                if pending[0] == _KEY_UPDATE:
                    raise Closed("a key update: record a shorter connection")
                if pending[0] == _FINISHED:
                    opener = _Opener(suite, secrets[1])
                del pending[:size]
    return bytes(payload), bytes(messages), b""


class _Opener:
    """Opens the records of one direction under one traffic secret."""

    def __init__(self, suite: int, secret: bytes) -> None:
        length, digest, aead = _SUITES[suite]

        def expand(label: str, size: int) -> bytes:
            full = f"tls13 {label}".encode()
            info = struct.pack("!HB", size, len(full)) + full + b"\0"
            return HKDFExpand(digest(), size, info).derive(secret)

        self._aead = aead(expand("key", length))
        self._iv = int.from_bytes(expand("iv", 12))
        self._number = 0

    def open(self, body: bytes) -> tuple[int, bytes]:
        """Inner type and content of a record."""
        nonce = (self._iv ^ self._number).to_bytes(12)
        header = struct.pack("!BHH", _APPLICATION_DATA, 0x0303, len(body))
        try:
            inner = self._aead.decrypt(nonce, body, header).rstrip(b"\0")
        except InvalidTag as error:
            raise Closed(f"the keys do not open record {self._number}") from error
        self._number += 1
        return inner[-1], inner[:-1]


def _records(stream: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Type, body, and the offset behind each complete record."""
    at = 0
    while at + 5 <= len(stream):
        kind, version, length = struct.unpack_from("!BHH", stream, at)
        if not _CHANGE_CIPHER_SPEC <= kind <= _APPLICATION_DATA or version >> 8 != 3:
            raise Closed(f"no TLS: bytes {stream[at : at + 5].hex()} at {at} are no record")
        at += 5 + length
        if at > len(stream):
            return
        yield kind, stream[at - length : at], at


def _server_suite(from_server: bytes) -> int:
    for kind, body, _ in _records(from_server):
        if kind == _HANDSHAKE and body[0] == _SERVER_HELLO:
            session_id = body[38]
            suite: int = struct.unpack_from("!H", body, 39 + session_id)[0]
            if suite in _SUITES:
                return suite
        break
    raise Closed("no ServerHello of TLS 1.3")


def _client_hello(message: bytes) -> Hello:
    if message[0] != _CLIENT_HELLO:
        raise Closed("no TLS: the first message is no ClientHello")
    random = message[6:38]
    at = 39 + message[38]  # behind the session id
    at += 2 + struct.unpack_from("!H", message, at)[0]  # cipher suites
    at += 1 + message[at]  # compression methods
    end = at + 2 + struct.unpack_from("!H", message, at)[0]
    at += 2
    name, protocols = "", []
    while at + 4 <= end:
        kind, length = struct.unpack_from("!HH", message, at)
        body = message[at + 4 : at + 4 + length]
        at += 4 + length
        if kind == _SERVER_NAME:
            name = body[5:].decode("ascii", "replace")
        elif kind == _ALPN:
            offset = 2
            while offset < len(body):
                protocols.append(body[offset + 1 : offset + 1 + body[offset]].decode("ascii", "replace"))
                offset += 1 + body[offset]
    return Hello(random, name, tuple(protocols))
