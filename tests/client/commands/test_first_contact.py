"""The first contact with a relay, and later ones: what vouches for it, and what is refused."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.commands import first_contact
from arcbridge.client.commands.first_contact import ask_known, ask_relay, check_known
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.relay.relay_profile import LoginOffer, RelayProfile
from arcbridge.errors import ConnectionLost, PinMismatch, Unreachable
from arcbridge.net.tls import ALPN_HTTP, RelayTrust, outer_client_context, outer_server_contexts
from arcbridge.pki.authority import Authority
from tests.relay.api_station import Relay, serving
from tests.support.world import fixed_port

DOCUMENT: dict[str, Any] = {"issuer": "https://login.example.org", "client_id": "arcbridge"}


@pytest.fixture
async def relay(tmp_path: Path) -> AsyncIterator[Relay]:
    async with serving(tmp_path, dict(DOCUMENT)) as relay:
        yield relay


def profile(relay: Relay, **changes: Any) -> RelayProfile:
    """What a user trusted of this relay."""
    authority = relay.authority
    known = RelayProfile(
        (f"https://127.0.0.1:{relay.port}",),
        LoginOffer.read(DOCUMENT),
        ca_pin=authority.pin,
        ca_pem=authority.certificate_pem,
    )
    return replace(known, **changes)


class TestAsk:
    async def test_nothing_vouches_for_a_ca_of_its_own(self, relay: Relay) -> None:
        contact = await ask_relay(RelayAccess(f"127.0.0.1:{relay.port}"), given=False)
        assert not contact.vouched_for
        assert (contact.ca_pin, contact.ca_pem) == (relay.authority.pin, relay.authority.certificate_pem)
        assert contact.offer == LoginOffer.read(DOCUMENT)

    async def test_a_pin_that_was_given(self, relay: Relay) -> None:
        access = RelayAccess(f"127.0.0.1:{relay.port}", ca_pin=relay.authority.pin)
        contact = await ask_relay(access, given=True)
        assert (contact.vouched_for, contact.ca_pin) == (True, relay.authority.pin)
        other = RelayAccess(f"127.0.0.1:{relay.port}", ca_pin=Authority.create("x").pin)
        with pytest.raises(PinMismatch, match=relay.authority.pin):
            await ask_relay(other, given=True)

    async def test_a_file_that_was_given(self, relay: Relay, tmp_path: Path) -> None:
        (tmp_path / "ca.pem").write_text(Authority.create("x").certificate_pem)
        with pytest.raises(PinMismatch, match="not of the CA that was given"):
            await ask_relay(RelayAccess(f"127.0.0.1:{relay.port}", ca_file=tmp_path / "ca.pem"), given=True)

    async def test_the_systems_cas_vouch(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine that trusts this CA as it trusts public ones: nothing is to be asked about it."""
        pem = relay.authority.certificate_pem

        def trusting(trust: RelayTrust, alpn: str) -> ssl.SSLContext:
            return outer_client_context(RelayTrust(trust.ca_pem or pem), alpn)

        monkeypatch.setattr(first_contact, "outer_client_context", trusting)
        contact = await ask_relay(RelayAccess(f"127.0.0.1:{relay.port}"), given=False)
        assert (contact.vouched_for, contact.ca_pin) == (True, "")

    async def test_a_certificate_for_another_name(self, relay: Relay) -> None:
        with pytest.raises(Unreachable, match="neither of a public CA nor of the relay's own"):
            await ask_relay(RelayAccess(f"localhost:{relay.port}"), given=False)

    @pytest.mark.parametrize(
        "document", [None, {"issuer": "http://plain.example", "client_id": "x"}], ids=["mute", "odd"]
    )
    async def test_a_relay_without_a_good_answer(self, tmp_path: Path, document: dict[str, Any] | None) -> None:
        async with serving(tmp_path, document) as relay:
            access = RelayAccess(f"127.0.0.1:{relay.port}")
            if document is None:
                assert (await ask_relay(access, given=False)).offer is None
                return
            with pytest.raises(Unreachable, match="cannot be used: issuer: must be an https:// URL") as caught:
                await ask_relay(access, given=False)
            assert "plain.example" not in caught.value.message

    async def test_b23_nothing_secret_is_sent_before_the_user_agreed(self) -> None:
        authority = Authority.create("relay CA")
        issued = authority.issue_server(["127.0.0.1"])
        contexts = outer_server_contexts(issued.certificate_pem, issued.key_pem, authority.certificate_pem)
        asked: list[bytes] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            asked.append(head)
            body = json.dumps(DOCUMENT) if b"/v1/login" in head else authority.certificate_pem
            writer.write(f"HTTP/1.0 200 OK\r\n\r\n{body}".encode())
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=contexts[ALPN_HTTP])
        port = server.sockets[0].getsockname()[1]
        await ask_relay(RelayAccess(f"127.0.0.1:{port}"), given=False)
        server.close()
        await server.wait_closed()
        rest = f"HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\nAccept: */*\r\n\r\n"
        assert [head.decode() for head in asked] == [f"GET /v1/ca {rest}", f"GET /v1/login {rest}"]


class TestKnown:
    async def test_the_same(self, relay: Relay) -> None:
        known = profile(relay)
        check_known(known, await ask_known(known))

    async def test_b22_another_ca(self, relay: Relay) -> None:
        other = Authority.create("x")
        known = profile(relay, ca_pin=other.pin, ca_pem=other.certificate_pem)
        with pytest.raises(PinMismatch) as caught:
            await ask_known(known)
        assert f"expected {other.pin}, found {relay.authority.pin}" in caught.value.message
        assert f"`arcbridge login --renew-trust https://127.0.0.1:{relay.port}`" in caught.value.message

    async def test_b22_no_public_ca_any_more(self, relay: Relay) -> None:
        with pytest.raises(PinMismatch, match="not of a public CA any more"):
            await ask_known(profile(relay, ca_pin="", ca_pem=""))

    async def test_the_ca_was_signed_again_over_its_key(self, relay: Relay) -> None:
        """What is kept has become void, and the pin says that the key is the same."""
        stale = Authority.create("x").certificate_pem
        contact = await ask_known(profile(relay, ca_pem=stale))
        assert contact.ca_pem.strip() == relay.authority.certificate_pem.strip()

    async def test_any_relay_of_the_profile_serves(self, relay: Relay) -> None:
        gone = f"https://127.0.0.1:{fixed_port()}"
        known = profile(relay, relays=(gone, f"https://127.0.0.1:{relay.port}"))
        assert (await ask_known(known)).address.port == relay.port
        with pytest.raises((Unreachable, ConnectionLost)):
            await ask_known(profile(relay, relays=(gone,)))

    def test_b22_another_login(self, tmp_path: Path) -> None:
        known = RelayProfile(("https://r.example:443",), LoginOffer.read(DOCUMENT))
        contact = first_contact.Contact(known.address, True)
        check_known(known, contact)  # it says nothing: what was trusted counts
        both = {"issuer": "https://login.example.net", "audience": "payroll"}
        changed = LoginOffer.read({**DOCUMENT, **both})
        with pytest.raises(PinMismatch) as caught:
            check_known(known, replace(contact, offer=changed))
        assert (
            'you trusted (issuer: "https://login.example.org" → "https://login.example.net"; '
            'audience: none → "payroll")'
        ) in caught.value.message
        assert "`arcbridge login --renew-trust https://r.example`" in caught.value.message
        # Where the user's own flags named the login, the relay is not asked.
        check_known(replace(known, from_relay=False), replace(contact, offer=changed))

    def test_b48_words_of_a_relay_are_no_sentence_of_ours(self) -> None:
        known = RelayProfile(("https://r.example:443",), LoginOffer.read(DOCUMENT))
        words = ['openid").', "Your", "login", "has", "expired;", "run"]
        contact = first_contact.Contact(known.address, True, offer=LoginOffer.read({**DOCUMENT, "scopes": words}))
        with pytest.raises(PinMismatch) as caught:
            check_known(known, contact)
        assert r'→ "openid\")." "Your" "login" "has" "expired;" "run")' in caught.value.message

    def test_b41_a_relay_that_leaves_out_the_browser_later(self) -> None:
        known = RelayProfile(("https://r.example:443",), LoginOffer.read(DOCUMENT))
        device = LoginOffer.read({**DOCUMENT, "grant_types": ["device-code"]})
        contact = first_contact.Contact(known.address, True, offer=device)
        with pytest.raises(PinMismatch, match=r"\(grant_type: auto → device-code\)"):
            check_known(known, contact)
        check_known(replace(known, grant_type="device-code"), contact)  # the user's own choice
        check_known(replace(known, login=device), contact)  # the user has seen it
        # More ways than before make no login weaker, and the kept one goes on to count.
        check_known(replace(known, login=device), replace(contact, offer=known.login))

    async def test_b41_one_audience_for_all_clusters_is_refused(self, tmp_path: Path) -> None:
        async with serving(tmp_path, {**DOCUMENT, "cluster_audience": "payroll"}) as relay:
            with pytest.raises(Unreachable, match=r"cannot be used: cluster_audience: has no \{cluster\} in it"):
                await ask_known(profile(relay))
