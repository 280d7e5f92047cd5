"""Files of tokens; `test_environment_tokens` has those with several."""

from __future__ import annotations

from pathlib import Path

import pytest

from arcbridge.client.credentials.token_files import check_token, read_token
from arcbridge.errors import StateError, Unauthenticated


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(Unauthenticated, match="does not exist"):
        read_token(tmp_path / "none")
    with pytest.raises(StateError, match="cannot read"):
        read_token(tmp_path)


@pytest.mark.parametrize("data", [b"", b" \n", b"a b", b"a\nb", "é".encode(), b"\x00", b"x" * 70_000])
def test_no_tokens(data: bytes) -> None:
    with pytest.raises(Unauthenticated):
        check_token(data, "a file")


def test_a_token_holds_printable_characters_of_ascii_and_nothing_else() -> None:
    token = bytes(range(0x21, 0x7F))
    assert check_token(b" " + token + b"\n", "a file") == token.decode()
    for byte in {*range(256)} - {*token}:
        with pytest.raises(Unauthenticated, match="does not hold one token"):
            check_token(b"a" + bytes([byte]) + b"a", "a file")
