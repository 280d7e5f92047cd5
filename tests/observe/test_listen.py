from __future__ import annotations

import socket

import pytest

from arcbridge.errors import ConfigError
from arcbridge.observe.listen import check_observe_port, parse_observe_listen, port_of


@pytest.mark.parametrize(
    "listen", ["9464", "127.0.0.1", "127.0.0.1:http", "127.0.0.1:70000", "::1:9464", "host:-1", ":٣"]
)
def test_malformed_addresses_are_refused(listen: str) -> None:
    with pytest.raises(ConfigError, match=r"observe\.listen"):
        parse_observe_listen(listen)


@pytest.mark.parametrize("listen", [":9464", "127.0.0.1:9464", "[::1]:9464", "localhost:9464"])
def test_the_port(listen: str) -> None:
    parse_observe_listen("")
    parse_observe_listen(listen)
    assert port_of(listen) == 9464


def test_a_port_that_a_start_could_not_have() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match="the port is in use"):
            check_observe_port(listen)
    check_observe_port(listen)
    with pytest.raises(ConfigError, match="no such address"):
        check_observe_port("192.0.2.1:0")
