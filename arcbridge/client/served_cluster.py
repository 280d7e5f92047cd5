"""One cluster that this machine serves: its port, session, endpoint and kubeconfig entry.

`proxy` serves with it in the foreground, the background process for all that `connect` named. A port is kept once the
cluster was reached; one that another program has taken meanwhile is left to it, and the next free one is used.
"""

from __future__ import annotations

import asyncio
import socket
import time
from itertools import chain, islice
from pathlib import Path

from arcbridge.client.endpoint import LocalEndpoint
from arcbridge.client.kubeconfig import Entry
from arcbridge.client.listening import PortInUse, listen_local, port_holder
from arcbridge.client.session_manager import SessionManager
from arcbridge.client.state import LocalCertificates, StateDirectory
from arcbridge.config import ClientConfig

PORTS_TRIED = 100
"""Ports that are tried after the one of the cluster."""


class ServedCluster:
    """`bind`, then `session.connect_once`, then `serve`; `close` ends what is open."""

    def __init__(
        self, session: SessionManager, config: ClientConfig, state: StateDirectory, relays: tuple[str, ...], token: str
    ) -> None:
        """`relays`: `host:port` of each; `token`: of token mode, where it is in no file."""
        self.session = session
        self.cluster = session.cluster
        self.config = config
        self.state = state
        self.relays = relays
        self.endpoint: LocalEndpoint | None = None
        self.port = 0
        self.certificates: LocalCertificates | None = None
        self._token = token

    def bind(self) -> str:
        """Take the port: the wanted one, or the one this cluster had, or the next free one.

        Returns the line that says that the cluster has another port now, or nothing. Raises PortInUse, StateError.
        """
        wanted, state, relays = self.config.port, self.state, self.relays
        if wanted is not None:
            self.take(listen_local(wanted))
            return ""
        had = state.port(relays, self.cluster)
        for port in chain([had], islice((port for port in state.free_ports() if port != had), PORTS_TRIED)):
            try:
                self.take(listen_local(port))
            except PortInUse:
                continue
            if port == had or not state.has_port(relays, self.cluster):
                return ""
            holder = port_holder(had)
            by = f" by a process of {holder}" if holder else ""
            return f'Port {had} was taken{by}; cluster "{self.cluster}" has port {port} now'
        raise PortInUse(had)

    def take(self, sockets: list[socket.socket]) -> None:
        """Serve on sockets that listen already."""
        self.certificates = self.state.certificates(self.cluster, time.time())
        self.endpoint = LocalEndpoint(self.cluster, self.session, self.certificates, sockets)
        self.port = self.endpoint.port

    def keep_port(self) -> None:
        """Remember the port, once the cluster was reached; one that the system chose (0) is not kept."""
        if self.config.port != 0:
            self.state.remember_port(self.relays, self.cluster, self.port)

    async def serve(self) -> None:
        """Accept connections."""
        assert self.endpoint is not None
        await self.endpoint.start()

    def entry(self, name: str, *, process: str, arguments: tuple[str, ...] = (), plugin: bool = False) -> Entry:
        """What the kubeconfig has to say about it, in a context of that name."""
        assert self.certificates is not None
        file = self.config.token_file
        return Entry(
            name,
            self.cluster,
            f"https://127.0.0.1:{self.port}",
            self.certificates.ca_pem,
            self.certificates.client_certificate_pem,
            self.certificates.client_key_pem,
            token=self._token,
            token_file=str(Path(file).absolute()) if file is not None and not self._token else "",
            relays=self.relays,
            process=process,
            arguments=arguments,
            plugin=plugin,
        )

    async def close(self) -> None:
        """Stop listening, reset what is open, and end the session in order."""
        if self.endpoint is not None:
            await self.endpoint.close()
        self.session.close()
        await self.session.wait_closed()
        await let_close()


async def let_close() -> None:
    """Give the loop some turns, in which the local resets are sent."""
    for _ in range(5):
        await asyncio.sleep(0)
