"""Runs `gateway`: serves many callers and clusters over HTTPS until it is interrupted.

It has no login of its own and writes no kubeconfig: each request comes with its caller's tokens. The certificate is
read again where its files have changed. Invariant: settings that cannot work are refused before the port is bound.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Final

import structlog

from arcbridge.client.service import ClientContext, Terminal
from arcbridge.client.serving.endpoint import https_context
from arcbridge.client.serving.gateway.caller_sessions import CallerSessions
from arcbridge.client.serving.gateway.caller_tokens import CallerTokens, GivenTokens
from arcbridge.client.serving.gateway.server import GatewayServer
from arcbridge.client.session.session_manager import SessionManager
from arcbridge.client.settings import required
from arcbridge.errors import ArcbridgeError, ConfigError
from arcbridge.net.address import parse_listen
from arcbridge.net.loopback import listen_at
from arcbridge.settings.config import ClientConfig, LoginConfig
from arcbridge.tasks import cancel_and_wait

CERTIFICATE_CHECK: Final = 30.0
"""Seconds between two reads of the files of the certificate."""
_FILE_LIMIT: Final = 1024 * 1024
_LOGIN_SETTINGS: Final = frozenset({"one_token", "cluster_audience", "audience"})
"""Settings of `[login]` by which a gateway decides about tokens that it is given."""

log = structlog.get_logger("arcbridge.client")


async def run_gateway(
    config: ClientConfig,
    terminal: Terminal,
    listen: str,
    certificate: Path,
    key: Path,
    *,
    environment: Mapping[str, str],
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve at `listen` (`host:port`, an address of this machine; an empty host: all of IPv4) until cancelled.

    Raises ArcbridgeError when the start fails.
    """
    # A gateway has no user at a terminal whom it could ask whether to trust a cluster.
    context = ClientContext(config, replace(terminal, ask_trust=None), environment=environment)
    if not config.relay_urls():
        raise ConfigError("relays: required, because a gateway has no login; give --relay https://host:port")
    relays = context.relays
    _refuse_settings_of_a_login(config)
    required(config, environment)
    if config.cluster_ca_pin:
        raise ConfigError("cluster_ca_pin: is for one cluster; give a pins_file with those of all")
    if config.pins_file is None and not config.trust_first_use:
        raise ConfigError("pins_file: required, because a gateway has no user to ask whether to trust a cluster")
    context.trust()  # raises where the pins cannot be read
    address = parse_listen(listen)
    files = CertificateFiles(certificate, key)
    tls = files.load()

    def make(cluster: str, tokens: CallerTokens) -> SessionManager:
        return SessionManager(
            relays.with_own_record(cluster),
            cluster,
            GivenTokens(tokens, config.login),
            context.trust(),
            resumption=config.resumption,
            restrictions=context.restrictions,
        )

    sessions = CallerSessions(make)
    sock = listen_at(address.host or "0.0.0.0", address.port)
    server = GatewayServer([sock], tls, sessions, one_token=config.login.one_token)
    observer = None
    beside: list[asyncio.Task[None]] = []
    try:
        if config.observe.listen:
            from arcbridge.client.serving.gateway.observation import observe_gateway

            observer = await observe_gateway(config.observe.listen, server, sessions)
        server.start()
        beside += [asyncio.create_task(sessions.sweep()), asyncio.create_task(files.keep_fresh(server))]
        host, port = sock.getsockname()[:2]
        terminal.tell(f"Gateway is listening on https://{f'[{host}]' if ':' in host else host}:{port}")
        ready()
        await asyncio.Event().wait()
    finally:
        await cancel_and_wait(*beside)
        await server.close()
        await sessions.close()
        if observer is not None:
            await observer.stop()


def _refuse_settings_of_a_login(config: ClientConfig) -> None:
    """Raise ConfigError for a setting of `[login]` that has no effect here: the callers bring their tokens."""
    usual = LoginConfig()
    for name in (field.name for field in fields(LoginConfig)):
        if name not in _LOGIN_SETTINGS and getattr(config.login, name) != getattr(usual, name):
            raise ConfigError(f"login.{name}: has no effect at a gateway, whose callers bring their tokens; remove it")


class CertificateFiles:
    """The files of the gateway's certificate chain and of its key, which another program may renew."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._paths = (certificate, key)
        self._read: tuple[str, ...] = ()
        """The contents of both files when they were loaded last."""

    def load(self) -> ssl.SSLContext:
        """Return a TLS context. Raises ConfigError, which names the file."""
        self._read = texts = tuple(map(_text, ("--certificate", "--key"), self._paths))
        try:
            return https_context(*texts)
        except ConfigError as error:
            raise ConfigError(f"flags --certificate and --key: {error.message}") from error

    async def keep_fresh(self, server: GatewayServer) -> None:
        """Have new connections show what the files hold, in a loop until cancelled; a failure is logged once."""
        warned = False
        while True:
            await asyncio.sleep(CERTIFICATE_CHECK)
            try:
                if self._read != tuple(map(_text, ("--certificate", "--key"), self._paths)):
                    server.context = self.load()
                    log.info("took over younger certificates")
                warned = False
            except ArcbridgeError as error:
                if not warned:
                    log.warning("certificates not renewed", reason=error.message)
                warned = True


def _text(flag: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_FILE_LIMIT).decode("ascii")
    except OSError as error:
        raise ConfigError(f"flag {flag}: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"flag {flag}: {path} is no PEM file") from error
