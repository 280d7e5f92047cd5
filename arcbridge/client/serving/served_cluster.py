"""One cluster that this machine serves: its port, session, endpoint and kubeconfig entry.

`proxy` serves with it in the foreground, the background process for all that `connect` named. A port is kept once the
cluster was reached; one that another program has taken meanwhile is left to it, and the next free one is used.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from itertools import chain, islice
from pathlib import Path

import structlog

from arcbridge.client.kubeconfig.entries import Entry
from arcbridge.client.relay.relay_profile import organisation
from arcbridge.client.serving.endpoint import LocalEndpoint
from arcbridge.client.session.session_manager import SessionManager
from arcbridge.client.state import LocalCertificates, StateDirectory, aged_at
from arcbridge.errors import ArcbridgeError
from arcbridge.net.loopback import PortInUse, listen_local, port_holder
from arcbridge.settings.config import ClientConfig

PORTS_TRIED = 100
"""Ports that are tried after the one of the cluster."""
RENEWAL_CHECK = 60.0
"""Seconds between two looks at the clock. The certificates' times are of the wall clock, which runs on while the
machine sleeps, and the loop's timers do not."""

log = structlog.get_logger("arcbridge.client")


class ServedCluster:
    """`bind`, then `session.connect_once`, then `serve`; `close` ends what is open."""

    def __init__(
        self,
        session: SessionManager,
        config: ClientConfig,
        state: StateDirectory,
        relays: tuple[str, ...],
        token: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`relays`: `host:port` of each; `token`: of token mode, where it is in no file; `clock`: unix seconds."""
        self.session = session
        self.cluster = session.cluster
        self.config = config
        self.state = state
        self.relays = relays
        self.endpoint: LocalEndpoint | None = None
        self.port = 0
        self.certificates: LocalCertificates | None = None
        self._token = token
        self._clock = clock
        self._renew_at: float | None = None
        """Unix seconds from which younger certificates are wanted; None: not looked at yet."""
        self._told_of_failure = False
        self._unwritten = False
        """Whether the kubeconfig has a former client certificate, or CA."""
        self._told_of_unwritten = False

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

    def announce(self, port: int) -> None:
        """Have what `entry` says before the sockets of this port are here; raises StateError."""
        self.certificates = self._certificates(self._clock())
        self.port = port

    def take(self, sockets: list[socket.socket]) -> None:
        """Serve on sockets that listen already; raises StateError, and nothing after `announce`."""
        self.certificates = self.certificates or self._certificates(self._clock())
        self.endpoint = LocalEndpoint(self.cluster, self.session, self.certificates, sockets)
        self.port = self.endpoint.port

    def _certificates(self, now: float) -> LocalCertificates:
        return self.state.certificates(self.cluster, organisation(self.config, self.state), now)

    def has_kept_port(self) -> bool:
        return self.state.has_port(self.relays, self.cluster)

    def keep_port(self) -> None:
        """Remember the port, once the cluster was reached; one that the system chose (0) is not kept."""
        if self.config.port != 0:
            self.state.remember_port(self.relays, self.cluster, self.port)

    async def serve(self) -> None:
        """Accept connections."""
        assert self.endpoint is not None
        await self.endpoint.start()

    def entry(self, name: str, *, process: str, arguments: tuple[str, ...] = (), plugin: bool = False) -> Entry:
        """Return what the kubeconfig has to say about it, in a context of that name."""
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

    async def renew(self) -> bool:
        """Take over younger certificates once a third of the life of those in use is left, for new connections.

        Returns whether the kubeconfig has to say something else: the client certificate, or its CA. A failure is
        logged once, and tried again at the next call.
        """
        now = self._clock()
        if self.certificates is None or (self._renew_at is not None and now < self._renew_at):
            return False
        try:
            if self._renew_at is None:
                self._renew_at = await asyncio.to_thread(renewal_time, self.certificates)
                if now < self._renew_at:
                    return False
            # Beside the loop: it makes keys, waits for locks, and imports `cryptography`.
            fresh = await asyncio.to_thread(self._certificates, now)
            renew_at = await asyncio.to_thread(renewal_time, fresh)
        except ArcbridgeError as error:
            if not self._told_of_failure:
                self._told_of_failure = True
                log.warning("certificates not renewed", reason=error.message)
            return False
        if fresh != self.certificates and self.endpoint is not None:
            self.endpoint.renew(fresh)
        former, self.certificates, self._renew_at = self.certificates, fresh, renew_at
        self._told_of_failure = False
        if fresh == former:
            return False
        log.info("took over younger certificates", cluster=self.cluster)
        changed = (fresh.ca_pem, fresh.client_certificate_pem) != (former.ca_pem, former.client_certificate_pem)
        self._unwritten = self._unwritten or changed
        return changed

    def write_later(self) -> None:
        """Have `update_kubeconfig` write what could not be written now, which was reported."""
        self._unwritten = self._told_of_unwritten = True

    async def update_kubeconfig(self, changed: Callable[[], Awaitable[None]]) -> None:
        """Call `changed` where the kubeconfig has to say something else, at each call until it has succeeded.

        Its ArcbridgeError is logged once.
        """
        if not self._unwritten:
            return
        certificates = self.certificates
        try:
            await changed()
        except ArcbridgeError as error:
            if not self._told_of_unwritten:
                self._told_of_unwritten = True
                log.warning("kubeconfig not updated", reason=error.message)
            return
        self._told_of_unwritten = False
        if self.certificates is certificates:
            self._unwritten = False

    async def keep_renewed(self, changed: Callable[[], Awaitable[None]]) -> None:
        """Call `renew` in a loop, and `changed` where the kubeconfig has to say something else, until it succeeds."""
        while True:
            await asyncio.sleep(RENEWAL_CHECK)
            try:
                await self.renew()
                await self.update_kubeconfig(changed)
            except Exception:  # a defect of ours is to cut nothing that runs
                log.exception("certificates not renewed", cluster=self.cluster)

    async def close(self) -> None:
        """Stop listening, reset what is open, and end the session in order."""
        if self.endpoint is not None:
            await self.endpoint.close()
        self.session.close()
        await self.session.wait_closed()
        await send_resets()


def renewal_time(certificates: LocalCertificates) -> float:
    """Return the unix seconds at which the first of them has a third of its life left; raises StateError."""
    return min(map(aged_at, (certificates.server_certificate_pem, certificates.client_certificate_pem)))


async def send_resets() -> None:
    """Give the loop some turns, in which the local resets are sent."""
    for _ in range(5):
        await asyncio.sleep(0)
