"""Decodes Bech32 (BIP 173), in which age writes its keys; as age does, without BIP 173's bound of 90 characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

MOST: Final = 4096
"""Characters of a text; the longest of age's keys, a post-quantum recipient, has 1 959."""
_ALPHABET: Final = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_GENERATOR: Final = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)
_CHECKSUM: Final = 6
"""Characters of the checksum at the end."""


def decode(text: str) -> tuple[str, bytes]:
    """Return what stands before the separator, in lower case, and the bytes behind it. Raises `ValueError`, whose
    text says what is wrong and quotes nothing: the key may be a private one."""
    if len(text) > MOST:
        raise ValueError("it is too long")
    if not text.isascii() or text not in (text.lower(), text.upper()):
        raise ValueError("it mixes capital and small letters, or has others than those of ASCII")
    prefix, _, data = text.lower().rpartition("1")
    values = [_ALPHABET.find(one) for one in data]
    if not prefix or len(values) < _CHECKSUM or -1 in values:
        raise ValueError("it is cut off, or has a character that no key has")
    if _checksum(prefix, values) != 1:
        raise ValueError("its checksum does not match: a character is missing or is another one")
    values = values[:-_CHECKSUM]
    number = 0
    for value in values:
        number = number << 5 | value
    size, padding = divmod(5 * len(values), 8)
    if padding >= 5 or number & ((1 << padding) - 1):
        raise ValueError("it does not end where a byte ends")
    return prefix, (number >> padding).to_bytes(size, "big")


def _checksum(prefix: str, values: Sequence[int]) -> int:
    """Return 1 where the checksum at the end of `values` is that of a text."""
    characters = prefix.encode()
    checksum = 1
    for value in (*(one >> 5 for one in characters), 0, *(one & 31 for one in characters), *values):
        top = checksum >> 25
        checksum = (checksum & 0x1FFFFFF) << 5 ^ value
        for bit, generator in enumerate(_GENERATOR):
            if top >> bit & 1:
                checksum ^= generator
    return checksum
