"""Loopback sockets: exclusive, both families, and the sentence about a port in use."""

from __future__ import annotations

import errno
import os
import pwd
import socket
from pathlib import Path
from typing import Any

import pytest

from arcbridge.errors import ConfigError, ExitCode
from arcbridge.net.loopback import PortInUse, listen_at, listen_local, port_holder
from tests.support.world import fixed_port


def test_both_families_have_one_port() -> None:
    sockets = listen_local(0)
    ports = {sock.getsockname()[1] for sock in sockets}
    hosts = [sock.getsockname()[0] for sock in sockets]
    for sock in sockets:
        sock.close()
    assert len(ports) == 1
    assert hosts[0] == "127.0.0.1"
    assert hosts[1:] in ([], ["::1"])


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_squatter_is_named(family: int, host: str) -> None:
    with socket.socket(family) as squatter:
        try:
            squatter.bind((host, 0))
        except OSError:
            pytest.skip(f"no {host}")
        squatter.listen()
        port = squatter.getsockname()[1]
        with pytest.raises(PortInUse) as caught:
            listen_local(port)
    first, *rest = caught.value.message.splitlines()
    assert first == f"Port {port} is already in use. Please select a different port with --port option."
    assert caught.value.exit_code == ExitCode.USAGE
    # By the account, and not by the environment, which may name another one; a container may have no name for it.
    names = [f"user {account.pw_name}" for account in pwd.getpwall() if account.pw_uid == os.getuid()]
    holder = (names or [f"user id {os.getuid()}"])[0]
    held_by = [f"the port is held by a process of {holder}"]
    assert rest == (held_by if Path("/proc/net/tcp").exists() else [])


def test_a_port_cannot_be_shared() -> None:
    sockets = listen_local(0)
    port = sockets[0].getsockname()[1]
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            thief.bind(("127.0.0.1", port))
    for sock in sockets:
        sock.close()


def test_the_other_option_is_named() -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        with pytest.raises(PortInUse, match="--listen option"):
            listen_at("127.0.0.1", squatter.getsockname()[1])


def test_a_foreign_address() -> None:
    with pytest.raises(ConfigError, match="no such address"):
        listen_at("192.0.2.1", 0)


def test_a_port_that_one_family_is_refused_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    create = socket.create_server

    def refuses(address: tuple[str, int], *, family: int, **settings: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise PermissionError(errno.EACCES, "Permission denied")
        return create(address, family=family, **settings)

    monkeypatch.setattr(socket, "create_server", refuses)
    port = fixed_port()
    with pytest.raises(ConfigError, match="permission denied") as refused:
        listen_local(port)
    create(("127.0.0.1", port)).close()
    assert refused.tb is not None, "it keeps what the call had opened"


def test_a_free_port_has_no_holder() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        assert port_holder(sock.getsockname()[1]) == ""
