"""The TLS towards relays follows the credential."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from arcbridge.agent.enrol import CredentialKeeper
from arcbridge.agent.outer_tls import OuterTls
from arcbridge.errors import StateError
from arcbridge.net.address import parse_address
from arcbridge.net.tls import ALPN_CONTROL, ALPN_JOIN
from arcbridge.pki.credentials import DirectoryStore

from .fake_relay import FakeRelay


async def test_kept_until_the_credential_changes(tmp_path: Path) -> None:
    async with FakeRelay.serving() as relay:
        relay.tokens["id.secret"] = "one"
        (tmp_path / "token").write_text("id.secret")
        keeper = CredentialKeeper(
            DirectoryStore(tmp_path / "state"),
            [parse_address(relay.address)],
            relay_ca_pin=relay.pin,
            join_token_file=tmp_path / "token",
        )
        with pytest.raises(StateError):
            OuterTls(keeper).context(ALPN_CONTROL)
        await keeper.start()
    current = SimpleNamespace(current=keeper.current)
    outer = OuterTls(current)
    first = outer.context(ALPN_CONTROL)
    assert outer.context(ALPN_CONTROL) is first
    assert outer.context(ALPN_JOIN) is not first
    current.current = replace(keeper.current)
    assert outer.context(ALPN_CONTROL) is not first
