"""Whether aiofastnet serves, as a process finds at its start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import aiofastnet
import pytest

from arcbridge.net.fast_tls import fast_tls


@pytest.fixture
def unchosen() -> Iterator[Callable[[], Any]]:
    """`fast_tls` as at the start of a process."""
    fast_tls.cache_clear()
    yield fast_tls
    fast_tls.cache_clear()


def test_the_log_tells_what_serves(unchosen: Callable[[], Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "arcbridge.net")
    assert unchosen() is aiofastnet
    assert unchosen() is aiofastnet
    assert [record.getMessage() for record in caplog.records] == [
        f"sessions use the TLS of aiofastnet {aiofastnet.__version__}"
    ]


@pytest.mark.parametrize("missing", ["library", "direct engine"])
def test_the_loop_serves_where_aiofastnet_is_missing_or_slow(
    unchosen: Callable[[], Any], missing: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG, "arcbridge.net")
    there = None if missing == "library" else SimpleNamespace(OPENSSL_DYN_LIBS=None, __version__="1.2.0")
    monkeypatch.setitem(__import__("sys").modules, "aiofastnet", there)
    assert unchosen() is None
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert "the TLS of `ssl`" in caplog.text
