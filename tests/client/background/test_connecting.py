"""What is settled at the terminal before the background process is asked to serve a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from arcbridge.client.background.connecting import check_connect, is_to_be_trusted, login_may_help
from arcbridge.client.service import ClientContext, Terminal
from arcbridge.errors import ConfigError, Unauthenticated, Unreachable
from arcbridge.settings.config import ClientConfig, LoginConfig


@pytest.mark.parametrize(
    ("names", "config", "words"),
    [
        ((), ClientConfig(), "name the clusters to connect"),
        (("Bad_Name",), ClientConfig(), "Bad_Name"),
        (("a", "b"), ClientConfig(port=1), "flag --port: fits one cluster, but 2 were named"),
        (("a", "b"), ClientConfig(kube_context="c"), "flag --kube-context: fits one cluster"),
        (("a",), ClientConfig(file="-"), "flag --file"),
    ],
)
def test_what_cannot_be_connected(names: tuple[str, ...], config: ClientConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_connect(config, names)
    check_connect(ClientConfig(port=1), ("a",))


async def _yes(cluster: str, pin: str) -> bool:
    return True


@pytest.mark.parametrize(
    ("terminal", "config", "asked"),
    [
        (Terminal(), ClientConfig(), False),
        (Terminal(ask_trust=_yes), ClientConfig(), True),
        (Terminal(), ClientConfig(trust_first_use=True), True),
        (Terminal(ask_trust=_yes), ClientConfig(cluster_ca_pin="sha256:" + "a" * 64), False),
    ],
    ids=["no terminal", "terminal", "setting", "pinned"],
)
def test_who_says_whether_a_cluster_is_trusted(
    terminal: Terminal, config: ClientConfig, asked: bool, tmp_path: Path
) -> None:
    from dataclasses import replace

    context = ClientContext(replace(config, relay="https://r", state_dir=tmp_path), terminal)
    assert is_to_be_trusted(context, "prod") is asked


@pytest.mark.parametrize(
    ("may_log_in", "login", "error", "mends"),
    [
        (True, LoginConfig(issuer="https://i", client_id="c"), Unauthenticated("x"), True),
        (False, LoginConfig(issuer="https://i", client_id="c"), Unauthenticated("x"), False),
        (True, LoginConfig(), Unauthenticated("x"), False),
        (True, LoginConfig(issuer="https://i", client_id="c"), Unreachable("x"), False),
    ],
    ids=["yes", "no terminal", "no issuer", "another error"],
)
def test_when_a_login_helps(
    may_log_in: bool, login: LoginConfig, error: ConfigError, mends: bool, tmp_path: Path
) -> None:
    context = ClientContext(
        ClientConfig(relay="https://r", login=login, state_dir=tmp_path), Terminal(may_log_in=may_log_in)
    )
    assert login_may_help(context, error) is mends
