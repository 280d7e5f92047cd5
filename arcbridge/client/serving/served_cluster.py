"""One cluster that this machine serves: its port, session, endpoint and kubeconfig entry.

`proxy` serves with it in the foreground, the background process for all that `connect` named. A port is kept once the
cluster was reached. Where it cannot be bound any more (another program has it, or root alone may), the next free one
is used.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from arcbridge.client.kubeconfig.entries import Entry
from arcbridge.client.relay.relay_profile import organisation
from arcbridge.client.serving.endpoint import LocalEndpoint
from arcbridge.client.session.restrictions import endpoint_name
from arcbridge.client.state import LocalCertificates, aged_at, one_time_certificates
from arcbridge.errors import ArcbridgeError, ConfigError
from arcbridge.net.loopback import PortInUse, listen_local, port_holder

if TYPE_CHECKING:
    from arcbridge.client.service import ClientContext
    from arcbridge.client.session.trust import ClusterTrust
    from arcbridge.pki.authority import Authority

PORTS_TRIED = 100
"""Ports that are tried after the one of the cluster; then any free one is taken: others may have all of these."""
RENEWAL_CHECK = 60.0
"""Seconds between two looks at the clock. The certificates' times are of the wall clock, which runs on while the
machine sleeps, and the loop's timers do not."""

log = structlog.get_logger("arcbridge.client")


class ServedCluster:
    """`bind`, then `session.connect_once`, then `serve`; `close` ends what is open."""

    def __init__(
        self,
        context: ClientContext,
        cluster: str,
        *,
        clock: Callable[[], float] = time.time,
        trust: ClusterTrust | None = None,
    ) -> None:
        """`clock`: unix seconds; `trust`: another rule than that of the settings."""
        self.session = context.session(cluster, trust)
        self.cluster = cluster
        self.config = context.config
        self.state = context.state
        self.relays = context.relays.names
        self.endpoint: LocalEndpoint | None = None
        self.port = 0
        self.moved = ""
        """The line that says that the port is another one than the kubeconfig may say; empty: it is not."""
        self.certificates: LocalCertificates | None = None
        self._token = context.token
        self.restrictions = context.restrictions
        self.kept_as = endpoint_name(cluster, self.restrictions)
        """The cluster, and what is given up: each has a port of its own, and a certificate that no other endpoint
        takes."""
        self._clock = clock
        self._renew_at = 0.0
        """Unix seconds from which younger certificates are wanted; 0: not looked at yet."""
        self._written: tuple[str, str] | None = None
        """The CA and the client certificate that the kubeconfig has; None: it is to be written."""
        self._warned: set[str] = set()
        """What has failed, was logged, and has not succeeded since."""

    def bind(self) -> None:
        """Take the port: the wanted one, or the one this cluster had, or the next free one, as `moved` says then.

        Raises ConfigError, StateError.
        """
        if self.config.port is not None:
            self.take(listen_local(self.config.port))
            return
        had = self.state.kept_port(self.relays, self.kept_as)
        ports = [*(() if had is None else (had,)), *islice(self.state.free_ports(), PORTS_TRIED), 0]
        first: ConfigError | None = None
        for port in ports:
            try:
                sockets = listen_local(port)
            except ConfigError as error:
                first = first or error
                continue
            self.take(sockets)
            if had not in (None, port):
                holder = port_holder(had)
                by = f" by a process of {holder}" if holder else ""
                why = f"was taken{by}" if isinstance(first, PortInUse) else "is not open to this user any more"
                self.moved = f'Port {had} {why}; cluster "{self.cluster}" has port {self.port} now'
            return
        assert first is not None
        raise first

    def announce(self, port: int) -> None:
        """Have what `entry` says before the sockets of this port are here; raises StateError."""
        self.certificates = self._certificates(self._clock())
        self._written = _of_kubeconfig(self.certificates)
        self.port = port

    def take(self, sockets: list[socket.socket]) -> None:
        """Serve on sockets that listen already; raises StateError, and nothing after `announce`."""
        if self.certificates is None:
            self.announce(0)
        assert self.certificates is not None
        self.endpoint = LocalEndpoint(self.cluster, self.session, self.certificates, sockets)
        self.port = self.endpoint.port

    def _certificates(self, now: float) -> LocalCertificates:
        owner = organisation(self.config, self.state)
        if self.kept_as != self.cluster:
            owner += f" restricted {self.kept_as}"
        return self.state.certificates(self.cluster, owner, now)

    def keep_port(self) -> None:
        """Remember the port, once the cluster was reached; one that the system chose (0) is not kept."""
        if self.config.port != 0:
            self.state.remember_port(self.relays, self.kept_as, self.port)

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
            namespace=self.restrictions.namespaces if " " not in self.restrictions.namespaces else "",
        )

    async def renew(self) -> None:
        """Take over younger certificates once a third of the life of those in use is left, for new connections.

        A failure is logged once, and tried again at the next call.
        """
        if (now := self._clock()) < self._renew_at:
            return
        try:
            # Beside the loop: it makes keys, waits for locks, and imports `cryptography`.
            fresh, renew_at = await asyncio.to_thread(self._younger, now)
        except ArcbridgeError as error:
            self._warn_once("certificates not renewed", error)
            return
        self._warned.discard("certificates not renewed")
        if fresh != self.certificates:
            if self.endpoint is not None:
                self.endpoint.renew(fresh)
            self.certificates = fresh
            log.info("took over younger certificates", cluster=self.cluster)
        self._renew_at = renew_at

    def _younger(self, now: float) -> tuple[LocalCertificates, float]:
        """Return certificates that are good for long, and when the first of them has a third of its life left."""
        fresh = self._certificates(now)
        return fresh, min(map(aged_at, (fresh.server_certificate_pem, fresh.client_certificate_pem)))

    def _warn_once(self, event: str, error: ArcbridgeError) -> None:
        if event not in self._warned:
            self._warned.add(event)
            log.warning(event, reason=error.message)

    def write_later(self) -> None:
        """Have `update_kubeconfig` write what could not be written now, which was reported."""
        self._written = None
        self._warned.add("kubeconfig not updated")

    async def update_kubeconfig(self, write: Callable[[], Awaitable[None]]) -> None:
        """Call `write` where the kubeconfig has to say something else, at each call until it has succeeded.

        Its ArcbridgeError is logged once.
        """
        if self.certificates is None or self._written == (wanted := _of_kubeconfig(self.certificates)):
            return
        try:
            await write()
        except ArcbridgeError as error:
            self._warn_once("kubeconfig not updated", error)
            return
        self._warned.discard("kubeconfig not updated")
        self._written = wanted

    async def keep_renewed(self, write: Callable[[], Awaitable[None]]) -> None:
        """Call `renew` in a loop, and `write` where the kubeconfig has to say something else, until it succeeds."""
        while True:
            await asyncio.sleep(RENEWAL_CHECK)
            try:
                await self.renew()
                await self.update_kubeconfig(write)
            except Exception:  # a defect of ours is to cut nothing that runs
                log.exception("certificates not renewed", cluster=self.cluster)

    async def close(self) -> None:
        """Stop listening, reset what is open, and end the session in order."""
        if self.endpoint is not None:
            await self.endpoint.close()
        self.session.close()
        await self.session.wait_closed()
        await send_resets()


class OneTimeCluster(ServedCluster):
    """One that a single program reaches. Its CA and certificates are in this process and in the program's own
    kubeconfig alone: no other endpoint takes them, and they end with it (docs/threats.md#W32)."""

    _authority: Authority | None = None

    def _certificates(self, now: float) -> LocalCertificates:
        if self._authority is None:
            from arcbridge.pki.authority import Authority

            self._authority = Authority.create("arcbridge one-time endpoint", clock=self._clock)
        return one_time_certificates(self._authority, self.cluster)


def _of_kubeconfig(certificates: LocalCertificates) -> tuple[str, str]:
    return certificates.ca_pem, certificates.client_certificate_pem


async def send_resets() -> None:
    """Give the loop some turns, in which the local resets are sent."""
    for _ in range(5):
        await asyncio.sleep(0)
