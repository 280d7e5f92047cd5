"""Ports: kept after success, moved aside when another program has one."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from arcbridge.client.service import ClientContext, Terminal
from arcbridge.client.serving.endpoint import _certificate_refusal
from arcbridge.client.serving.served_cluster import ServedCluster
from arcbridge.errors import ConfigError, StateError
from arcbridge.net.loopback import PortInUse
from arcbridge.pki.authority import certificate_validity
from arcbridge.settings.config import ClientConfig, RestrictConfig
from tests.client.session.test_session_manager import login
from tests.support.eventually import until
from tests.support.world import fixed_port


@pytest.fixture
def squatter() -> Iterator[socket.socket]:
    """A program that listens on a port."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock


def served(
    tmp_path: Path,
    port: int | None = None,
    clock: Callable[[], float] = time.time,
    restrict: RestrictConfig = RestrictConfig(),  # noqa: B008 - it is frozen
) -> ServedCluster:
    config = ClientConfig(
        relay="https://127.0.0.1:1",
        cluster="prod",
        port=port,
        state_dir=tmp_path / "state",
        login=login(tmp_path),
        restrict=restrict,
    )
    return ServedCluster(ClientContext(config, Terminal(), environment={}), "prod", clock=clock)


async def test_a_kept_port_that_was_taken_is_left_to_who_has_it(
    tmp_path: Path, squatter: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A port that no other client, and no connection of this machine, takes before it is bound again.
    monkeypatch.setattr("arcbridge.client.state.FIRST_PORT", fixed_port())
    port = squatter.getsockname()[1]
    one = served(tmp_path)
    one.state.remember_port(one.relays, "prod", port)
    one.bind()
    assert one.moved.startswith(f"Port {port} was taken")
    assert one.moved.endswith(f'; cluster "prod" has port {one.port} now')
    assert one.port != port
    one.keep_port()
    await one.close()
    again = served(tmp_path)
    again.bind()
    assert (again.moved, again.port) == ("", one.port)
    await again.close()


async def test_where_others_have_all_the_usual_ports_any_free_one_is_taken(
    tmp_path: Path, squatter: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many users of one machine each has a port for each cluster."""
    port = squatter.getsockname()[1]
    monkeypatch.setattr("arcbridge.client.state.FIRST_PORT", port)
    monkeypatch.setattr("arcbridge.client.serving.served_cluster.PORTS_TRIED", 1)
    one = served(tmp_path)
    one.bind()
    one.keep_port()
    assert one.moved == ""
    assert one.state.kept_port(one.relays, one.kept_as) == one.port
    assert one.port not in (0, port)
    await one.close()


async def test_a_port_that_the_system_chose_is_named_where_all_others_are_taken(
    tmp_path: Path, squatter: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = squatter.getsockname()[1]
    monkeypatch.setattr("arcbridge.client.serving.served_cluster.PORTS_TRIED", 0)
    one = served(tmp_path)
    one.state.remember_port(one.relays, one.kept_as, port)
    one.bind()
    assert one.moved.endswith(f'; cluster "prod" has port {one.port} now')
    assert one.port not in (0, port)
    await one.close()


async def test_a_kept_port_that_root_alone_may_bind_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sudo -E arcbridge proxy --port 80`, and a later start without root."""
    create = socket.create_server

    def unprivileged(address: tuple[str, int], **settings: Any) -> socket.socket:
        if address[1] == 80:
            raise PermissionError(errno.EACCES, "Permission denied")
        return create(address, **settings)

    monkeypatch.setattr(socket, "create_server", unprivileged)
    monkeypatch.setattr("arcbridge.client.state.FIRST_PORT", fixed_port())
    one = served(tmp_path)
    one.state.remember_port(one.relays, "prod", 80)
    one.bind()
    assert one.moved == f'Port 80 is not open to this user any more; cluster "prod" has port {one.port} now'
    await one.close()
    with pytest.raises(ConfigError, match="port 80: permission denied"):
        served(tmp_path, 80).bind()


async def test_settings_that_are_wrong_are_said_at_the_first_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, times = served(tmp_path), list[float]()

    def refuse(now: float) -> None:
        times.append(now)
        raise ConfigError("a wrong pin")

    monkeypatch.setattr(one, "_certificates", refuse)
    with pytest.raises(ConfigError, match="a wrong pin"):
        one.bind()
    assert len(times) == 1


async def test_w32_a_restricted_endpoint_has_its_own_port_and_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a context with fewer rights stays beside the one with all, and its certificate does not open that one."""
    monkeypatch.setattr("arcbridge.client.state.FIRST_PORT", fixed_port())
    plain, fewer = served(tmp_path), served(tmp_path, restrict=RestrictConfig(read_only=True))
    for one in (plain, fewer):
        one.bind()
        one.keep_port()
        assert one.moved == ""
    assert plain.port != fewer.port
    relays = []
    for one in (plain, fewer):
        assert one.certificates is not None
        relays.append(one.certificates.relay)
        await one.close()
    assert relays[0] != relays[1]
    peer = {"subject": ((("commonName", "prod"),),), "subjectAltName": (("URI", relays[1]),)}
    assert _certificate_refusal(peer, "prod", relays[0]) is not None
    assert _certificate_refusal(peer, "prod", relays[1]) is None
    again = served(tmp_path, restrict=RestrictConfig(read_only=True))
    again.bind()
    assert (again.port, again.certificates and again.certificates.relay) == (fewer.port, relays[1])
    await again.close()


async def test_a_port_that_no_cluster_had_is_passed_over_silently(
    tmp_path: Path, squatter: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arcbridge.client.state.FIRST_PORT", squatter.getsockname()[1])
    one = served(tmp_path)
    one.bind()
    assert one.moved == ""
    assert one.port > squatter.getsockname()[1]
    assert one.state.kept_port(one.relays, "prod") is None
    await one.close()


async def test_a_port_that_was_asked_for_is_that_port_or_an_error(tmp_path: Path, squatter: socket.socket) -> None:
    with pytest.raises(PortInUse):
        served(tmp_path, port=squatter.getsockname()[1]).bind()


async def test_a_port_of_the_system_is_not_kept(tmp_path: Path) -> None:
    one = served(tmp_path, port=0)
    one.bind()
    one.keep_port()
    assert one.state.kept_port(one.relays, "prod") is None
    entry = one.entry("mine", process="me", arguments=("--cluster", "prod"), plugin=True)
    assert (entry.name, entry.server, entry.plugin) == ("mine", f"https://127.0.0.1:{one.port}", True)
    await one.close()


DAY = 86400.0


async def test_certificates_are_renewed_when_a_third_of_their_life_is_left(tmp_path: Path) -> None:
    began = now = time.time() - 365 * DAY
    one = served(tmp_path, port=0, clock=lambda: now)
    one.bind()
    first = one.certificates
    assert first is not None
    seen = []
    while now < began + 300 * DAY:
        former = one.certificates
        await one.renew()
        certificates = one.certificates
        assert former is not None
        assert certificates is not None
        if certificates != former:
            changed = certificates.client_certificate_pem != former.client_certificate_pem
            seen.append((round((now - began) / DAY), changed))
        for pem in (certificates.server_certificate_pem, certificates.client_certificate_pem):
            assert certificate_validity(pem)[1] > now + 29 * DAY
        now += DAY
    # 90 days for the endpoint, 366 for the client, in the same minute where both are due.
    assert seen == [(60, False), (120, False), (180, False), (240, False), (244, True)]
    assert one.certificates.ca_pem == first.ca_pem
    await one.close()


async def test_a_certificate_that_is_not_written_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each minute, and not with the next certificate in months; a lock, a full disk or half of a file is soon over."""
    monkeypatch.setattr("arcbridge.client.serving.served_cluster.RENEWAL_CHECK", 0.01)
    now = time.time() - 245 * DAY
    one = served(tmp_path, port=0, clock=lambda: now)
    one.bind()
    now = time.time()
    failures: list[Exception] = [StateError("is locked"), StateError("is locked"), RuntimeError("a defect")]
    written: list[object] = []

    async def write() -> None:
        if failures:
            raise failures.pop(0)
        written.append(one.certificates)

    with capture_logs() as logs:
        keeping = asyncio.create_task(one.keep_renewed(write))
        await until(lambda: written)
        await asyncio.sleep(0.1)
        keeping.cancel()
    assert written == [one.certificates], "once it is written it is written"
    assert [line["event"] for line in logs].count("kubeconfig not updated") == 1
    await one.close()


async def test_an_endpoint_that_does_not_take_a_certificate_is_given_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time() - 61 * DAY
    one = served(tmp_path, port=0, clock=lambda: now)
    one.bind()
    former, now = one.certificates, time.time()
    endpoint = one.endpoint
    assert endpoint is not None

    def refuse(*_: object) -> None:
        raise ssl.SSLError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(endpoint, "renew", refuse)
        with pytest.raises(ssl.SSLError):
            await one.renew()
    assert one.certificates is former
    shown = endpoint._context
    await one.renew()
    assert one.certificates != former
    assert endpoint._context is not shown
    await one.close()


async def test_a_renewal_that_fails_is_told_once_and_tried_again(tmp_path: Path) -> None:
    now = time.time() - 61 * DAY
    one = served(tmp_path, port=0, clock=lambda: now)
    one.bind()
    former, now = one.certificates, now + 61 * DAY
    file = tmp_path / "state" / "local-ca" / "ca.key"
    file.rename(file.with_name("away"))
    with capture_logs() as logs:
        for _ in range(3):
            await one.renew()
    assert one.certificates is former
    assert [line["event"] for line in logs].count("certificates not renewed") == 1
    file.with_name("away").rename(file)
    await one.renew()
    assert one.certificates != former
    await one.close()
