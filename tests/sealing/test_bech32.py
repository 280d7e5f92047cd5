"""A key is read just as it was written, and a mistake in it is found."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.sealing.bech32 import MOST, _checksum, decode
from tests.sealing.keys import HYBRID_IDENTITY, HYBRID_RECIPIENT, X25519_IDENTITY, X25519_RECIPIENT

ALPHABET = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"


@pytest.mark.parametrize(
    ("text", "prefix", "size"),
    [
        (X25519_IDENTITY, "age-secret-key-", 32),
        (X25519_RECIPIENT, "age", 32),
        (HYBRID_IDENTITY, "age-secret-key-pq-", 32),
        (HYBRID_RECIPIENT, "age1pq", 1216),
        # BIP 173
        ("A12UEL5L", "a", 0),
        ("an83characterlonghumanreadablepartthatcontainsthenumber1andtheexcludedcharactersbio1tt5tgs",
         "an83characterlonghumanreadablepartthatcontainsthenumber1andtheexcludedcharactersbio", 0),
        ("abcdef1qpzry9x8gf2tvdw0s3jn54khce6mua7lmqqqxw", "abcdef", 20),
    ],
)  # fmt: skip
def test_prefix_and_bytes(text: str, prefix: str, size: int) -> None:
    found, data = decode(text)
    assert (found, len(data)) == (prefix, size)


def test_the_bytes_are_those_that_were_written() -> None:
    assert decode(X25519_IDENTITY)[1] == b"B" * 32
    assert (
        decode("abcdef1qpzry9x8gf2tvdw0s3jn54khce6mua7lmqqqxw")[1].hex() == "00443214c74254b635cf84653a56d7c675be77df"
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "cut off"),
        ("age", "cut off"),
        ("age1", "cut off"),
        ("1nwldj5", "cut off"),  # BIP 173
        ("li1dgmt3", "cut off"),  # BIP 173
        ("de1lg7wt\xff", "capital and small"),  # BIP 173
        ("A1G7SGD8", "checksum"),  # BIP 173
        ("age1\N{KELVIN SIGN}", "capital and small"),
        (X25519_RECIPIENT.replace("z", "Z", 1), "capital and small"),
        (X25519_RECIPIENT.replace("v", "b", 1), "character that no key has"),
        (X25519_RECIPIENT[:-1], "checksum"),
        (f" {X25519_RECIPIENT}", "checksum"),
        (X25519_RECIPIENT + "\n", "character that no key has"),
        (HYBRID_RECIPIENT + "q" * MOST, "too long"),
        ("10a06t8", "cut off"),  # BIP 173
        ("x1b4n0q5v", "character that no key has"),  # BIP 173
    ],
)
def test_what_is_wrong_is_named(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        decode(text)


def text_of(*values: int) -> str:
    """Return the text with these values of five bits, and the right checksum."""
    checksum = _checksum("a", [*values, *[0] * 6]) ^ 1
    return "a1" + "".join(ALPHABET[one] for one in (*values, *(checksum >> 5 * at & 31 for at in range(5, -1, -1))))


def test_it_ends_where_a_byte_ends() -> None:
    assert decode(text_of(1, 4)) == ("a", b"\x09")
    for values in ([0], [1, 5], [0, 0, 0]):
        with pytest.raises(ValueError, match="where a byte ends"):
            decode(text_of(*values))


@given(st.sampled_from([X25519_IDENTITY, X25519_RECIPIENT, HYBRID_IDENTITY]), st.data())
def test_up_to_four_other_characters_are_found(text: str, data: st.DataObject) -> None:
    """BIP 173 promises that for texts of its length."""
    begin = text.rindex("1") + 1
    places = data.draw(st.sets(st.integers(begin, len(text) - 1), min_size=1, max_size=4))
    changed = list(text)
    for place in places:
        others = [one for one in ALPHABET if one != text[place].lower()]
        one = data.draw(st.sampled_from(others))
        changed[place] = one.upper() if text.isupper() else one
    with pytest.raises(ValueError, match="checksum"):
        decode("".join(changed))


def test_a_mistake_quotes_nothing_of_a_key() -> None:
    with pytest.raises(ValueError, match="checksum") as raised:
        decode(X25519_IDENTITY.replace("GFPYY", "GFPYZ", 1))
    assert "GFPY" not in str(raised.value)
