"""Seals a file to recipients while it is written, and opens it while it is read (https://c2sp.org/age).

Only public keys are needed to seal, and they open nothing. `age -d` of other programs opens what is sealed here, and
this opens what they sealed to keys that are known here; armor, passphrases and plugins are left out. The content
goes in chunks of 64 KiB, each of which is authentic by itself, in its order and with the mark of the last one.
Invariants: memory is that of two chunks and a header, however long a file is; whatever `open_sealed` yields was
sealed just so, in this order from the beginning on; and a file without its end is `Truncated`.
"""

from __future__ import annotations

import hmac
import itertools
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from arcbridge.errors import LocalProtocolError, SealingError, Truncated
from arcbridge.sealing import bech32
from arcbridge.sealing.header import MAX_STANZAS, ByteSource, SealedHeader, encoded, read_header, written
from arcbridge.sealing.openssh import parse_openssh_identity, parse_openssh_recipient
from arcbridge.sealing.recipients import (
    FILE_KEY,
    AgeIdentity,
    HybridIdentity,
    HybridRecipient,
    Recipient,
    X25519Identity,
    X25519Recipient,
    derived,
)

CHUNK: Final = 64 * 1024
"""Bytes of the content in each chunk but the last, which has fewer or as many."""
TAG: Final = 16
"""Bytes that a chunk has more when it is sealed."""
NONCE: Final = 16
"""Bytes behind the header from which, with the file's key, the key of the chunks is derived."""
_RECIPIENTS: Final[dict[str, type[X25519Recipient | HybridRecipient]]] = {
    "age": X25519Recipient,
    "age1pq": HybridRecipient,
}
_IDENTITIES: Final[dict[str, type[X25519Identity | HybridIdentity]]] = {
    "age-secret-key-": X25519Identity,
    "age-secret-key-pq-": HybridIdentity,
}
_PRIVATE: Final = "AGE-SECRET-KEY-"
_NO_MLKEM: Final = "this OpenSSL has no ML-KEM: install cryptography's wheel, or use keys of X25519"


def parse_recipient(text: str) -> Recipient:
    """Read a public key: `age1…`, `age1pq1…` (post-quantum), `ssh-ed25519 …` or `ssh-rsa …`. Raises `SealingError`."""
    try:
        if text.startswith(_PRIVATE):
            raise ValueError("it is a private key, whose public one `age-keygen -y` prints")
        if text.startswith(("ssh-", "ecdsa-", "sk-")):
            return parse_openssh_recipient(text)
        prefix, data = bech32.decode(text)
        if prefix not in _RECIPIENTS or not text.startswith("age"):
            raise ValueError("it is of a kind that is not known here")
        return _RECIPIENTS[prefix](data)
    except UnsupportedAlgorithm as error:
        raise SealingError(_NO_MLKEM) from error
    except ValueError as error:
        raise SealingError("a recipient is a public key of age (age1… or age1pq1…, as `age-keygen` prints them) or of "
                           f"OpenSSH (ssh-ed25519 …, ssh-rsa …), and this is none: {error}") from error  # fmt: skip


def parse_identity(text: str) -> AgeIdentity:
    """Read a private key: `AGE-SECRET-KEY-1…` or `AGE-SECRET-KEY-PQ-1…`. Raises `SealingError`, without the key."""
    try:
        prefix, data = bech32.decode(text)
        if prefix not in _IDENTITIES or not text.startswith(_PRIVATE):
            raise ValueError("it is of a kind that is not known here")
        return _IDENTITIES[prefix](data)
    except UnsupportedAlgorithm as error:
        raise SealingError(_NO_MLKEM) from error
    except ValueError as error:
        raise SealingError(f"this is no private key of age (AGE-SECRET-KEY-…): {error}") from error


def parse_identities(data: bytes) -> list[AgeIdentity]:
    """Read a file of private keys: age's, of which each has a line, or one of OpenSSH. Raises `SealingError`."""
    if data.startswith(b"-----BEGIN"):
        return [parse_openssh_identity(data)]
    lines = data.decode(errors="replace").split()
    keys = [parse_identity(one) for one in lines if one.startswith(_PRIVATE)]
    if not keys:
        raise SealingError("it holds no key of age (AGE-SECRET-KEY-1…, AGE-SECRET-KEY-PQ-1…) or OpenSSH")
    return keys


class Sealer:
    """Seals what is written to it, and passes it on in chunks; the header leaves at once.

    A chunk leaves when it is full and more follows, since the last one is marked: an age file cannot be flushed before.
    """

    __slots__ = ("_cipher", "_held", "_number", "_write")

    def __init__(self, recipients: Sequence[Recipient], write: Callable[[bytes], object]) -> None:
        """Seal to `recipients`: each of them alone can open the file, so it is as safe as the weakest of their keys.

        What `write` raises is passed on, and ends the use of this object. Raises `SealingError` for no recipient, too
        many, or one whose key is weak.
        """
        if not 0 < len(recipients) <= MAX_STANZAS:
            raise SealingError(f"a file is sealed to one recipient at least and {MAX_STANZAS} at most")
        self._write = write
        self._held = bytearray()
        self._number = 0
        file_key, nonce = secrets.token_bytes(FILE_KEY), secrets.token_bytes(NONCE)
        self._cipher: ChaCha20Poly1305 | None = _chunk_cipher(file_key, nonce)
        signed = written(one.wrap(file_key) for one in recipients)
        write(b"%b %b\n%b" % (signed, encoded(_mac(file_key, signed)), nonce))

    def write(self, data: bytes | memoryview) -> None:
        """Seal more of the content. Raises `LocalProtocolError` behind the end, and whatever `write` raises."""
        rest = memoryview(data)
        while len(self._held) + len(rest) > CHUNK:
            taken = CHUNK - len(self._held)
            self._held += rest[:taken]
            self._put(last=False)
            rest = rest[taken:]
        self._held += rest

    def finish(self) -> None:
        """Seal the last chunk; without it the file reads as one that broke off. Raises as `write` does."""
        self._put(last=True)
        self._cipher = None

    def _put(self, *, last: bool) -> None:
        if self._cipher is None:
            raise LocalProtocolError("this file is finished: nothing can be added to it")
        self._write(self._cipher.encrypt(_chunk_nonce(self._number, last), self._held, None))
        self._held.clear()
        self._number += 1


def seal(recipients: Sequence[Recipient], data: bytes) -> bytes:
    """Return the file that has `data` for its content. Raises `SealingError`, as `Sealer` does."""
    out: list[bytes] = []
    sealer = Sealer(recipients, out.append)
    sealer.write(data)
    sealer.finish()
    return b"".join(out)


def open_sealed(read: Callable[[int], bytes], identities: Sequence[AgeIdentity]) -> Iterator[bytes]:
    """Return an iterator over a file's content, in chunks of 64 KiB at most; its header is read at once.

    `read` returns up to so many bytes, and none only at the end. Raises `SealingError`, here or from the iterator, for
    what is no such file, is not sealed to one of `identities`, or was changed; and `Truncated`, which is one, behind
    the last whole chunk of a file that broke off.
    """
    source = ByteSource(read)
    header = read_header(source)
    file_key, nonce = _file_key(header, identities), source.take(NONCE)
    if len(nonce) < NONCE:
        raise Truncated("this file breaks off behind its header: nothing of its content is there")
    return _chunks(source, _chunk_cipher(file_key, nonce))


def _file_key(header: SealedHeader, identities: Sequence[AgeIdentity]) -> bytes:
    for identity, stanza in itertools.product(identities, header.stanzas):
        if (file_key := identity.unwrap(stanza)) is not None:
            if not hmac.compare_digest(_mac(file_key, header.signed), header.mac):
                raise SealingError("the header of this file was changed: its MAC does not match")
            return file_key
    raise SealingError("this file is not sealed to the key that was given: give that of one of its recipients")


def _chunks(source: ByteSource, cipher: ChaCha20Poly1305) -> Iterator[bytes]:
    for number in itertools.count():
        sealed = source.take(CHUNK + TAG)
        whole = len(sealed) == CHUNK + TAG
        if whole and (chunk := _opened(cipher, number, sealed, last=False)) is not None:
            yield chunk
            continue
        chunk = _opened(cipher, number, sealed, last=True)
        if chunk is None and whole:
            raise SealingError(f"this file was changed, {number * CHUNK} bytes behind the beginning of its content")
        if chunk is None:
            raise Truncated(
                f"this file breaks off: {number * CHUNK} bytes of its content are there, and its end is not"
            )
        if number and not chunk:
            raise SealingError("this file ends in a chunk with nothing in it, which age never writes")
        if chunk:
            yield chunk
        if source.take(1):
            raise SealingError("this file has bytes behind its end, which were not sealed with it")
        return


def _opened(cipher: ChaCha20Poly1305, number: int, sealed: bytes, *, last: bool) -> bytes | None:
    try:
        return cipher.decrypt(_chunk_nonce(number, last), sealed, None)
    except InvalidTag:
        return None


def _chunk_cipher(file_key: bytes, nonce: bytes) -> ChaCha20Poly1305:
    return ChaCha20Poly1305(derived(file_key, nonce, b"payload"))


def _chunk_nonce(number: int, last: bool) -> bytes:
    return (number << 8 | last).to_bytes(12, "big")


def _mac(file_key: bytes, signed: bytes) -> bytes:
    return hmac.digest(derived(file_key, b"", b"header"), signed, "sha256")
