"""Two ends of a real TCP connection on loopback, and the certificates for it."""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from collections.abc import Callable
from typing import Any

import pytest

from arcbridge.loop_shares import LoopTime
from arcbridge.net.sockets import tune
from arcbridge.net.tls import ALPN_JOIN, RelayTrust, outer_client_context, outer_server_contexts
from arcbridge.pki.authority import Authority, Issued
from arcbridge.pki.enrolment import make_csr, make_key

RELAY = "relay.test"


@functools.cache
def authority() -> Authority:
    return Authority.create("test relay CA")


@functools.cache
def server_certificate() -> Issued:
    return authority().issue_server([RELAY, "127.0.0.1", "::1"])


@functools.cache
def agent_certificate(cluster: str, cluster_ca_pin: str = "") -> tuple[str, str]:
    """(certificate, key) as PEM."""
    key = make_key()
    return authority().sign_agent(make_csr(key), cluster, life=3600.0, cluster_ca_pin=cluster_ca_pin), key


@functools.cache
def server_contexts() -> dict[str, ssl.SSLContext]:
    issued = server_certificate()
    return outer_server_contexts(issued.certificate_pem, issued.key_pem, authority().certificate_pem)


@functools.cache
def client_context(alpn: str = ALPN_JOIN, cluster: str = "", cluster_ca_pin: str = "") -> ssl.SSLContext:
    """Return an outer TLS context with the agent's certificate of `cluster`, or without one."""
    certificate = agent_certificate(cluster, cluster_ca_pin) if cluster else None
    return outer_client_context(RelayTrust(authority().certificate_pem), alpn, client_certificate=certificate)


def listening() -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    sock.listen(128)
    sock.setblocking(False)
    return sock


async def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """(connected, accepted), both tuned and non-blocking. The caller closes both."""
    loop = asyncio.get_running_loop()
    with listening() as server:
        near = socket.socket()
        near.setblocking(False)
        await loop.sock_connect(near, server.getsockname())
        far, _ = await loop.sock_accept(server)
    tune(near)
    tune(far)
    return near, far


def completed_work(patch: pytest.MonkeyPatch) -> list[LoopTime]:
    """Return the list to which each payer is added whose work came to its end: of a handshake, its last step."""
    payers: list[LoopTime] = []
    run = LoopTime.run

    def noted(self: LoopTime, work: Callable[[], Any]) -> Any:
        result = run(self, work)
        payers.append(self)
        return result

    patch.setattr(LoopTime, "run", noted)
    return payers
