"""Each finding of a relay about itself, at its bounds; and the public address over real TLS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from arcbridge.net.address import Address
from arcbridge.net.descriptors import UNLIMITED
from arcbridge.net.tls import ALPN_HTTP, RelayTrust, outer_server_contexts
from arcbridge.observe.diagnosis import State
from arcbridge.pki.authority import Authority
from arcbridge.relay import self_checks as looks

DAY = 86400.0


@pytest.mark.parametrize(
    ("days", "state"), [(60, State.OK), (14.1, State.OK), (13, State.WARNING), (0.9, State.FAILED), (-1, State.FAILED)]
)
@pytest.mark.parametrize("own", [True, False])
def test_the_certificates_end(days: float, state: State, own: bool) -> None:
    found = looks.certificate_finding(days * DAY, 0.0, own=own)
    assert found.state is state
    assert bool(found.remedy) == (state is not State.OK)


@pytest.mark.parametrize(
    ("used", "most", "state"),
    [(89, 100, State.OK), (90, 100, State.WARNING), (None, 100, State.SKIPPED), (5, UNLIMITED, State.SKIPPED)],
)
def test_descriptors(used: int | None, most: int, state: State) -> None:
    assert looks.descriptors_finding(used, most).state is state


def test_registry_and_policy() -> None:
    assert looks.registry_finding(None).state is State.OK
    assert looks.registry_finding("disk full").code == "registry"
    assert looks.policy_finding("").state is State.OK
    assert looks.policy_finding("policy.toml: line 3").code == "policy"


@asynccontextmanager
async def relay(authority: Authority, name: str = "127.0.0.1") -> AsyncIterator[Address]:
    issued = authority.issue_server([name])
    context = outer_server_contexts(issued.certificate_pem, issued.key_pem, authority.certificate_pem)[ALPN_HTTP]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1])


async def test_the_public_address_leads_here() -> None:
    authority = Authority.create("relay")
    async with relay(authority) as address:
        found = await looks.look_at_public_address(address, RelayTrust(authority.certificate_pem))
    assert found.state is State.OK


@pytest.mark.parametrize("name", ["127.0.0.1", "another.example"])
async def test_another_server_or_another_name_at_the_public_address(name: str) -> None:
    authority, other = Authority.create("relay"), Authority.create("other")
    async with relay(authority if name != "127.0.0.1" else other, name) as address:
        found = await looks.look_at_public_address(address, RelayTrust(authority.certificate_pem))
    assert (found.state, found.code) == (State.FAILED, "public_address")
    assert "another server" in found.detail


async def test_nothing_at_the_public_address() -> None:
    found = await looks.look_at_public_address(Address("127.0.0.1", 1), RelayTrust())
    assert (found.state, found.code) == (State.FAILED, "public_address")
