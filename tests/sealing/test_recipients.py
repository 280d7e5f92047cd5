"""A file's key is read by the identity of its recipient, and by no other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from arcbridge.errors import SealingError
from arcbridge.sealing.age import parse_identity, parse_recipient
from arcbridge.sealing.bech32 import decode
from arcbridge.sealing.header import Stanza, encoded
from arcbridge.sealing.recipients import FILE_KEY, AgeIdentity, HybridRecipient, Recipient, X25519Recipient
from tests.sealing.keys import HYBRID_IDENTITY, HYBRID_RECIPIENT, X25519_IDENTITY, X25519_RECIPIENT

KEY = b"sixteen bytes ok"
LOW_ORDER = bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f11d7")
"""A point of order 8."""
PAIRS = {"X25519": (X25519_RECIPIENT, X25519_IDENTITY, 32), "mlkem768x25519": (HYBRID_RECIPIENT, HYBRID_IDENTITY, 1120)}


@pytest.fixture(params=PAIRS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pair(kind: str) -> tuple[Recipient, AgeIdentity]:
    recipient, identity, _ = PAIRS[kind]
    return parse_recipient(recipient), parse_identity(identity)


def test_what_is_wrapped_for_a_recipient_is_read_with_its_identity(kind: str) -> None:
    recipient, identity = pair(kind)
    first, second = recipient.wrap(KEY), recipient.wrap(KEY)
    assert (first.kind.decode(), len(first.arguments), len(first.body)) == (kind, 1, FILE_KEY + 16)
    assert (first.arguments, first.body) != (second.arguments, second.body), "an ephemeral key serves once"
    assert KEY not in first.body
    assert identity.unwrap(first) == identity.unwrap(second) == KEY


def test_what_is_for_another_is_none(kind: str) -> None:
    recipient, identity = pair(kind)
    stanza = recipient.wrap(KEY)
    assert all(pair(other)[1].unwrap(stanza) is None for other in PAIRS if other != kind)
    assert identity.unwrap(Stanza(kind.lower().encode() + b"x", stanza.arguments, stanza.body)) is None
    changed = bytes([stanza.body[0] ^ 1]) + stanza.body[1:]
    assert identity.unwrap(replace(stanza, body=changed)) is None


def test_a_stanza_that_age_does_not_write_is_refused(kind: str) -> None:
    recipient, identity = pair(kind)
    stanza, size = recipient.wrap(KEY), PAIRS[kind][2]
    for arguments in ((), (*stanza.arguments, b"x"), (encoded(bytes(size - 1)),), (encoded(bytes(size + 1)),), (b"!",)):
        with pytest.raises(SealingError, match="damaged"):
            identity.unwrap(replace(stanza, arguments=arguments))
    for body in (b"", stanza.body[1:], stanza.body + b"x"):
        with pytest.raises(SealingError, match="no key of a file"):
            identity.unwrap(replace(stanza, body=body))


def test_a_point_of_low_order_is_refused_on_both_sides() -> None:
    """With it the secret that both ends share would be zero."""
    _, identity = pair("X25519")
    with pytest.raises(SealingError, match="X25519"):
        identity.unwrap(Stanza(b"X25519", (encoded(LOW_ORDER),), bytes(32)))
    public = decode(HYBRID_RECIPIENT)[1]
    for recipient in (X25519Recipient(LOW_ORDER), HybridRecipient(public[:-32] + LOW_ORDER)):
        with pytest.raises(SealingError, match="X25519"):
            recipient.wrap(KEY)
