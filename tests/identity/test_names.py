"""Which names read the same everywhere (docs/threats.md#H4)."""

from __future__ import annotations

import pytest

from arcbridge.identity.names import MAX_NAME, is_plain


@pytest.mark.parametrize("name", ["a", "oidc:anna@example.org", "Ünïcode", "a b", "x" * MAX_NAME])
def test_plain(name: str) -> None:
    assert is_plain(name)


@pytest.mark.parametrize("name", ["", " a", "a ", "a\nb", "a\u200bb", "\ud800", "x" * (MAX_NAME + 1), "é" * MAX_NAME])
def test_not_plain(name: str) -> None:
    assert not is_plain(name)
