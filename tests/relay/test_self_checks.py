"""Each finding of a relay about itself, at its bounds; and the public address over real TLS."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from arcbridge.checks.diagnosis import FindingState
from arcbridge.errors import Unreachable
from arcbridge.net.address import Address
from arcbridge.net.descriptors import UNLIMITED
from arcbridge.net.tls import ALPN_HTTP, outer_server_contexts
from arcbridge.pki.authority import Authority, Issued
from arcbridge.relay import self_checks as looks
from arcbridge.settings.config import RelayLimitsConfig

DAY = 86400.0


@pytest.mark.parametrize(
    ("days", "state"),
    [
        (60, FindingState.OK),
        (14.1, FindingState.OK),
        (13, FindingState.WARNING),
        (0.9, FindingState.FAILED),
        (-1, FindingState.FAILED),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_the_certificates_end(days: float, state: FindingState, own: bool) -> None:
    found = looks.certificate_finding(days * DAY, 0.0, own=own)
    assert found.state is state
    assert bool(found.remedy) == (state is not FindingState.OK)


@pytest.mark.parametrize(
    ("used", "most", "state"),
    [
        (89, 100, FindingState.OK),
        (90, 100, FindingState.WARNING),
        (None, 100, FindingState.SKIPPED),
        (5, UNLIMITED, FindingState.SKIPPED),
    ],
)
def test_descriptors(used: int | None, most: int, state: FindingState) -> None:
    limits = RelayLimitsConfig(sessions=10)
    assert looks.descriptors_finding(used, most, limits, limits).state is state
    fewer = looks.descriptors_finding(used, most, limits, RelayLimitsConfig(sessions=20))
    assert fewer.state is (FindingState.SKIPPED if state is FindingState.SKIPPED else FindingState.WARNING)
    assert state is not FindingState.OK or "10 sessions instead of 20" in fewer.detail


def test_registry_and_policy() -> None:
    assert looks.registry_finding(None).state is FindingState.OK
    assert looks.registry_finding("disk full").code == "registry"
    assert looks.policy_finding("").state is FindingState.OK
    assert looks.policy_finding("policy.toml: line 3").code == "policy"


@asynccontextmanager
async def relay(issued: Issued, authority: Authority) -> AsyncIterator[Address]:
    context = outer_server_contexts(issued.certificate_pem, issued.key_pem, authority.certificate_pem)[ALPN_HTTP]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1])


async def test_the_public_address_leads_here() -> None:
    authority = Authority.create("relay")
    async with relay(authority.issue_server(["127.0.0.1"]), authority) as address:
        found = await looks.look_at_public_address(address, authority.certificate_pem)
    assert (found.state, found.detail) == (FindingState.OK, f"{address} leads to this relay")


@pytest.mark.parametrize("name", ["127.0.0.1", "another.example"])
async def test_another_server_or_another_name_at_the_public_address(name: str) -> None:
    authority, other = Authority.create("relay"), Authority.create("other")
    issued = (authority if name != "127.0.0.1" else other).issue_server([name])
    async with relay(issued, authority) as address:
        found = await looks.look_at_public_address(address, authority.certificate_pem)
    assert (found.state, found.code) == (FindingState.FAILED, "public_address")
    assert "another server" in found.detail


async def test_files_of_a_private_ca_lead_here_too() -> None:
    """This system does not know the CA, and agents and clients are told it: only the relay's certificate is known."""
    private, authority = Authority.create("private"), Authority.create("relay")
    issued = private.issue_server(["127.0.0.1"])
    async with relay(issued, authority) as address:
        alone = await looks.look_at_public_address(address, None, issued.certificate_pem)
        chain = issued.certificate_pem + private.certificate_pem
        whole = await looks.look_at_public_address(address, None, chain)
    for found in (alone, whole):
        assert found.state is FindingState.OK
        assert "does not trust its CA, so that agents and clients need relay_ca_file" in found.detail


async def test_another_relay_of_the_same_private_ca_is_as_good() -> None:
    """Several relays behind one address: agents know the CA and not the one certificate."""
    private = Authority.create("private")
    ours, others = private.issue_server(["127.0.0.1"]), private.issue_server(["127.0.0.1"])
    async with relay(others, private) as address:
        chain = ours.certificate_pem + private.certificate_pem
        assert (await looks.look_at_public_address(address, None, chain)).state is FindingState.OK
        assert (await looks.look_at_public_address(address, None, ours.certificate_pem)).state is FindingState.FAILED


@pytest.mark.parametrize("name", ["127.0.0.1", "another.example"])
async def test_files_and_another_server_or_another_name(name: str) -> None:
    private, other = Authority.create("private"), Authority.create("other")
    ours = private.issue_server([name])
    shown = ours if name != "127.0.0.1" else other.issue_server([name])
    async with relay(shown, other) as address:
        found = await looks.look_at_public_address(address, None, ours.certificate_pem)
    assert (found.state, found.code) == (FindingState.FAILED, "public_address")


async def test_nothing_at_the_public_address_of_this_machine() -> None:
    found = await looks.look_at_public_address(Address("127.0.0.1", 1), None)
    assert (found.state, found.code) == (FindingState.FAILED, "public_address")


@pytest.mark.parametrize(
    "error", [Unreachable("no answer within 10 s"), TimeoutError(), ConnectionResetError()], ids=lambda one: repr(one)
)
async def test_an_address_that_this_machine_cannot_dial_is_not_judged(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NAT without a way back: what agents and clients find there nothing here can tell, and no alert is fired."""

    async def unreachable(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(looks, "try_tls", unreachable)
    # RFC 5737: an address for documentation, so that no machine has it.
    found = await looks.look_at_public_address(Address("192.0.2.7", 443), None)
    assert (found.state, found.code) == (FindingState.WARNING, "public_address_unknown")
    assert "cannot be judged from here" in found.detail


@pytest.mark.parametrize(
    ("code", "state"),
    [(socket.EAI_NONAME, FindingState.FAILED), (socket.EAI_AGAIN, FindingState.WARNING)],
    ids=["none", "again"],
)
async def test_a_name_that_does_not_exist_is_certain_and_a_resolver_that_is_silent_is_not(
    code: int, state: FindingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolve(*_: object) -> None:
        raise socket.gaierror(code, "why")

    async def connect(*_: object, **__: object) -> None:
        raise Unreachable("the name cannot be resolved")

    monkeypatch.setattr(looks, "try_tls", connect)
    monkeypatch.setattr(looks, "resolve", resolve)
    assert (await looks.look_at_public_address(Address("relay.test", 443), None)).state is state
