"""The clusters that the background process serves, and the contexts for which it does.

A cluster is served once for each set of settings, whatever contexts name it. A connection with other settings is proved
by a session of its own before it takes the place of the former one, whose port it takes over; until then, and where it
fails, the former one serves. What is connected is kept in a file, and served again by the next process. Where the
settings file restricts sessions otherwise than before, that counts from the next connect or credential on, unproved.

Invariant: once `leaving` is set nothing begins to be served here, because no process would know of it.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from arcbridge.client.background.connection_settings import ConnectionSettings
from arcbridge.client.background.connections import Connection, Connections, same_place
from arcbridge.client.background.plugin_trust import refuse_untrusted
from arcbridge.client.background.removal import choose, remove_connection
from arcbridge.client.credentials.jwt_unverified import read_unverified
from arcbridge.client.credentials.token_files import read_token
from arcbridge.client.kubeconfig.entries import Entry, Kubeconfig
from arcbridge.client.kubeconfig.running import BACKGROUND, running_of
from arcbridge.client.service import ClientContext, Terminal
from arcbridge.client.serving.served_cluster import ServedCluster
from arcbridge.client.session.restrictions import restrictions_of
from arcbridge.errors import ArcbridgeError, ConfigError, StateError, Unreachable
from arcbridge.tasks import TaskSet, cancel_and_wait, within
from arcbridge.units import rfc3339

SESSION_WAIT = 25.0
"""Seconds that a caller waits for a session: kubectl's user sees nothing meanwhile."""
RENEW_BEFORE = 3600.0
"""Seconds before the certificate's end at which kubectl is to ask again."""
RETRY = 30.0
"""Seconds between two attempts to serve a static connection that failed; mostly a person has to change something."""

log = structlog.get_logger("arcbridge.client")


class AskAgain(Exception):
    """This process ends, another one has taken its place, or what the caller waited for is gone: it is to ask again."""


class Served(ServedCluster):
    """A cluster, and the connections for which it is served."""

    def __init__(self, context: ClientContext, cluster: str, clock: Callable[[], float]) -> None:
        super().__init__(context, cluster, clock=clock)
        self.connections: list[Connection] = []
        self.since = clock()
        self.tasks: list[asyncio.Task[None]] = []
        """Keep the session up, and the certificates young."""

    async def wait_for_session(self) -> None:
        """Wait for a session; raises the error of the attempt."""
        late = f'cluster "{self.cluster}" did not answer within {SESSION_WAIT:.0f} s; see `arcbridge logs`'
        async with within(SESSION_WAIT, Unreachable(late)):
            await self.session.ready()

    def entry_of(self, connection: Connection) -> Entry:
        """Return what the kubeconfig has to say for one of the connections."""
        return self.entry(
            connection.context, process=BACKGROUND, arguments=connection.settings.words(), plugin=not connection.static
        )

    def exec_credential(self) -> dict[str, Any]:
        """Return what the plugin prints (client.authentication.k8s.io/v1), in token mode with the token of the file
        besides; kubectl asks again before certificate or token is refused. Raises Unauthenticated, StateError."""
        from arcbridge.pki.authority import certificate_validity

        assert self.certificates is not None
        status: dict[str, Any] = {
            "clientCertificateData": self.certificates.client_certificate_pem,
            "clientKeyData": self.certificates.client_key_pem,
        }
        ends_at = certificate_validity(self.certificates.client_certificate_pem)[1] - RENEW_BEFORE
        if (file := self.config.token_file) is not None:
            status["token"] = read_token(file)
            ends_at = min(ends_at, read_unverified(status["token"]).expires_at or ends_at)
        status["expirationTimestamp"] = rfc3339(ends_at)
        # The kind comes first: the plugin looks for it, and hands the line on as it is.
        return {
            "kind": "ExecCredential",
            "apiVersion": "client.authentication.k8s.io/v1",
            "spec": {"interactive": False},
            "status": status,
        }

    async def close(self) -> None:
        await cancel_and_wait(*self.tasks)
        await super().close()

    def document(self) -> dict[str, Any]:
        """Return the cluster for `status`."""
        session, endpoint = self.session, self.endpoint
        up, down = endpoint.moved() if endpoint is not None else (0, 0)
        state = "connected" if session.current is not None else "resuming" if session.detached_count else "waiting"
        return {
            "name": self.cluster,
            "contexts": [one.context for one in self.connections],
            "port": self.port,
            "state": state,
            "reason": session.failure.message if session.failure is not None else "",
            "user": session.subject,
            "relay": str(session.relay.address) if session.relay is not None else self.relays[0],
            "round_trip": round(session.current.round_trip, 6) if session.current is not None else 0.0,
            "since": self.since,
            "connections": endpoint.stats.open if endpoint is not None else 0,
            "bytes_to_cluster": up,
            "bytes_from_cluster": down,
            "token_expires": session.token_ends_at(),
            "restricted": list(self.restrictions.words()),
        }


class ServedClusters:
    """What one background process serves; `add`, `connect` and `disconnect` change it, one at a time."""

    def __init__(self, kept: Path, environment: Mapping[str, str], clock: Callable[[], float] = time.time) -> None:
        """`kept`: the file of connections. `clock`: unix seconds."""
        self.kept = Connections(kept)
        self.served: dict[ConnectionSettings, Served] = {}
        """By what is served once: the settings of a connection without the name of its context."""
        self.failed: dict[Connection, str] = {}
        """Connections that were kept and could not be served again, and why."""
        self.changing = asyncio.Lock()
        """Held while it is changed, so that a process that hands over hands over a whole state."""
        self.leaving = False
        self._closing = TaskSet()
        """Parts that are closed beside what runs; `wait_closed` waits for them."""
        self._environment = environment
        self._clock = clock

    @property
    def is_empty(self) -> bool:
        return not self.served and not self.failed

    def connections(self) -> list[Connection]:
        """Return all connections, those that failed last."""
        return [*(one for served in self.served.values() for one in served.connections), *self.failed]

    # -- serving ----------------------------------------------------------------------------------------------------

    async def restore(self, inherited: Mapping[ConnectionSettings, list[socket.socket]]) -> None:
        """Serve what was connected; what cannot be served now is told by `status`, and tried when it is asked
        for. A static connection, for which nothing asks, is tried again by itself (`keep_retrying`).

        `inherited`: sockets that listen already. Those of settings that nothing is connected with any more are closed.
        """
        left = dict(inherited)
        try:
            kept = self.kept.all()
        except StateError as error:
            log.warning("connections not read", reason=error.message)
            kept = []
        for connection in kept:
            try:
                await self.add(connection, left.pop(connection.settings.without_context(), None))
            except ArcbridgeError as error:
                self.failed[connection] = error.message
                log.warning("cluster not served", cluster=connection.cluster, reason=error.message)
        for sockets in left.values():
            for sock in sockets:
                sock.close()

    async def add(self, connection: Connection, sockets: list[socket.socket] | None = None) -> Served:
        """Serve a connection's cluster, unless it is served already; raises ArcbridgeError, AskAgain.

        `sockets`: what it is to be served on; None: a port is taken.
        """
        async with self.changing:
            if self.leaving:
                raise AskAgain
            return await self._add(connection, sockets)

    async def _add(self, connection: Connection, sockets: list[socket.socket] | None) -> Served:
        key = connection.settings.without_context()
        if (served := await self._restrict(key)) is None:
            try:
                served = Served(self._context(connection.settings), connection.cluster, self._clock)
                if sockets:
                    served.take(sockets)
                else:
                    served.bind()
            except BaseException:
                for sock in sockets or ():
                    sock.close()
                raise
            self._begin(served)
            await self._accept(key, served)
        self._enter(served, connection)
        if served.moved or connection.static:
            await self._update_kubeconfig(served, connection)
        return served

    async def _current(self, key: ConnectionSettings) -> Served | None:
        """Return what serves a cluster with the restrictions that its settings file has now; raises ArcbridgeError,
        AskAgain."""
        served = self.served.get(key)
        if served is None or not self._restricts_otherwise(key, served):
            return served
        async with self.changing:
            if self.leaving:
                raise AskAgain
            return await self._restrict(key)

    def _restricts_otherwise(self, key: ConnectionSettings, served: Served) -> bool:
        """Return whether the settings file restricts sessions otherwise than when the cluster began to be served;
        one that cannot be read says nothing about it."""
        try:
            return restrictions_of(key.load(self._environment).restrict) != served.restrictions
        except ArcbridgeError as error:
            log.warning("settings not read", cluster=served.cluster, reason=error.message)
            return False

    async def _restrict(self, key: ConnectionSettings) -> Served | None:
        """Return what serves a cluster; where the settings file restricts sessions otherwise by now, that is a new one
        at the same port, and what ran by the former rights ends. Raises ArcbridgeError."""
        former = self.served.get(key)
        if former is None or former.endpoint is None or not self._restricts_otherwise(key, former):
            return former
        served = Served(self._context(key), former.cluster, self._clock)
        served.announce(former.port)
        # From here on nothing fails, and nothing waits until no new connection meets the former rights.
        served.take(list(former.endpoint.release()))
        served.connections = former.connections
        self._begin(served)
        self.served[key] = served
        closing = self._closing.start(former.close())
        await self._accept(key, served)
        await asyncio.shield(closing)
        log.info("restrictions changed", cluster=served.cluster, restricted=" ".join(served.restrictions.words()))
        for connection in list(served.connections):
            await self._update_kubeconfig(served, connection)
        return served

    def _context(self, settings: ConnectionSettings) -> ClientContext:
        return ClientContext(settings.load(self._environment), Terminal(), environment=self._environment)

    def _begin(self, served: Served) -> None:
        """Keep a session up, from now on until `close`."""
        keeping = asyncio.create_task(served.session.run())
        served.tasks.append(keeping)
        keeping.add_done_callback(lambda task: self._ended(served, task))

    def _ended(self, served: Served, task: asyncio.Task[None]) -> None:
        """After a defect of ours ended what keeps a session up: serve the cluster anew when it is asked for."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.error("session task failed", cluster=served.cluster, exc_info=error)
        if served in self.served.values():
            self._closing.start(self._give_up(served, f"internal error ({type(error).__name__})"))

    async def _give_up(self, served: Served, reason: str) -> None:
        async with self.changing:
            if served in self.served.values():
                # `failed` gets its connections before `served` loses them: a process in which both are empty ends.
                self.failed |= dict.fromkeys(served.connections, f"{reason}; see `arcbridge logs`")
                await self.close(served)

    async def keep_retrying(self) -> None:
        """Have static connections that failed served again: their contexts have no plugin that would ask for it."""
        while True:
            await asyncio.sleep(RETRY)
            async with self.changing:
                for connection in [one for one in self.failed if one.static and not self.leaving]:
                    try:
                        await self._add(connection, None)
                        log.info("cluster served again", cluster=connection.cluster)
                    except ArcbridgeError as error:
                        self.failed[connection] = error.message
                    except Exception:  # a defect of ours ends no attempts
                        log.exception("cluster not served", cluster=connection.cluster)

    async def _accept(self, key: ConnectionSettings, served: Served) -> None:
        """Serve at the port that it has."""
        if served.moved:
            log.warning("port moved", reason=served.moved)
        self.served[key] = served
        served.tasks.append(asyncio.create_task(served.keep_renewed(lambda: self._renewed(served))))
        await served.serve()

    def _enter(self, served: Served, connection: Connection) -> None:
        """Let a connection have this cluster, in place of one that has the same context of the same file."""
        if connection in served.connections:
            self.failed.pop(connection, None)
            return
        served.connections = [one for one in served.connections if not same_place(one, connection)]
        served.connections.append(connection)
        for one in list(self.failed):
            if same_place(one, connection):
                del self.failed[one]

    async def close(self, served: Served) -> None:
        """Serve a cluster no more."""
        for key, one in list(self.served.items()):
            if one is served:
                del self.served[key]
        await served.close()

    async def close_all(self) -> None:
        await asyncio.gather(*(self.close(served) for served in list(self.served.values())))

    async def wait_closed(self) -> None:
        """Wait after `close_all` until no candidate of a connect is left open either."""
        if self._closing:
            await asyncio.wait(self._closing)

    # -- the kubeconfig ---------------------------------------------------------------------------------------------

    async def _renewed(self, served: Served) -> None:
        """Let the kubeconfigs have the client certificate, or the CA, that the endpoint has by now.

        Raises the first error, after all were tried.
        """
        failure: ArcbridgeError | None = None
        for connection in list(served.connections):
            if self.leaving:
                return
            try:
                await self._write_context(served, connection)
            except ArcbridgeError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    async def _update_kubeconfig(self, served: Served, connection: Connection) -> str:
        """Let the context of a connection name the port and the process of today; returns why it does not."""
        try:
            return await self._write_context(served, connection)
        except ArcbridgeError as error:
            log.warning("kubeconfig not changed", reason=error.message)
            served.write_later()
            return error.message

    async def _write_context(self, served: Served, connection: Connection) -> str:
        """Write the context; return why it was not written. Raises ArcbridgeError where it may be written later."""
        if not connection.kubeconfig or connection not in self.kept.all():
            return "nothing is connected with it"
        refresh, entry = Kubeconfig(connection.kubeconfig).refresh, served.entry_of(connection)
        writing = asyncio.ensure_future(asyncio.to_thread(refresh, entry))
        try:
            written = await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.gather(writing, return_exceptions=True)  # a thread cannot be cancelled
            raise
        return "" if written else "the entry was changed, or taken out, by hand"

    async def make_plugins(self, connections: Sequence[Connection]) -> None:
        """Replace client certificates in the kubeconfigs by the plugin, which can start the next process."""
        for connection in connections:
            try:
                await asyncio.to_thread(Kubeconfig(connection.kubeconfig).repair, lambda process: process != BACKGROUND)
            except ArcbridgeError as error:
                log.warning("kubeconfig not changed", reason=error.message)

    # -- credential -------------------------------------------------------------------------------------------------

    async def credential(self, settings: ConnectionSettings, server: str) -> dict[str, Any]:
        """Return what kubectl's plugin prints: the client certificate, once the endpoint serves and a session is up.

        `server`: to which address kubectl is about to connect; empty: not known. Raises ArcbridgeError, AskAgain.
        """
        served = self._serving(settings)
        if served is None:
            served = await self.add(self._connection_of(settings))
            for connection in served.connections:
                if connection.settings == settings and not connection.kubeconfig:
                    self.kept.add(connection)
        else:
            served = await self._current(settings.without_context()) or served
        if server and server != f"https://127.0.0.1:{served.port}":
            raise ConfigError(await self._elsewhere(served, settings, server))
        if served.session.current is None:
            try:
                await served.wait_for_session()
            except ArcbridgeError as error:
                now = self._serving(settings)
                if now is served:
                    raise
                if now is None and not any(one.settings == settings for one in self.failed):
                    # What the user has taken off does not come back by itself.
                    raise Unreachable(
                        f'cluster "{served.cluster}" was disconnected, or connected with other settings, meanwhile; '
                        "run the command again"
                    ) from error
                raise AskAgain from error
            self._keep_port(served)
        await served.renew()
        return served.exec_credential()

    def _serving(self, settings: ConnectionSettings) -> Served | None:
        served = self.served.get(settings.without_context())
        if served is not None and any(one.settings == settings for one in served.connections):
            return served
        return None

    def _connection_of(self, settings: ConnectionSettings) -> Connection:
        """Return the connection that has these settings; else one that no kubeconfig is known for, if it says nothing
        that this user does not trust. Raises ConfigError, StateError."""
        try:
            kept = self.kept.all()
        except StateError:
            kept = []
        for connection in (*kept, *self.failed):
            if connection.settings == settings:
                return connection
        config = settings.load(self._environment)
        refuse_untrusted(settings, self._environment)
        return Connection(settings, config.cluster, config.kube_context or config.cluster)

    async def _elsewhere(self, served: Served, settings: ConnectionSettings, server: str) -> str:
        """Say what to do where kubectl's context names another address than that of the cluster."""
        says = f'cluster "{served.cluster}" has port {served.port} now, and kubectl was about to connect to {server}'
        again = settings.connect_command()
        known = [one for one in served.connections if one.kubeconfig and one.settings == settings]
        if not known:
            return f"{says}; run `{again}` to save the context anew"
        right, failures = [], []
        for connection in known:
            files = ", ".join(connection.kubeconfig)
            if why := await self._update_kubeconfig(served, connection):
                failures.append(f"the context in {files} was not changed ({why})")
            else:
                right.append(files)
        if failures:
            return f"{says}; {'; '.join(failures)}: run `{again}` to save it anew"
        return (
            f"{says}; the context in {', '.join(right)} says so now: run the command again. If that does not help, "
            f"kubectl reads another file: run `{again} --file FILE` with that one"
        )

    def _keep_port(self, served: Served) -> None:
        """Remember the port of a cluster that was reached, unless other settings of it hold the one that is kept."""
        kept = served.state.kept_port(served.relays, served.kept_as)
        if not any(one is not served and one.port == kept for one in self.served.values()):
            served.keep_port()

    # -- connect ----------------------------------------------------------------------------------------------------

    async def connect(
        self, settings: ConnectionSettings, files: tuple[str, ...], *, static: bool, switch: bool
    ) -> dict[str, Any]:
        """Serve a cluster and put its context into the kubeconfig: prove it, then put it in its place.

        A failure changes nothing but what `_current` does. Raises ArcbridgeError, AskAgain.
        """
        context = self._context(settings)
        cluster = context.config.cluster
        name = context.config.kube_context or cluster
        connection = Connection(settings, cluster, name, files, static)
        kubeconfig = Kubeconfig(files)
        await asyncio.to_thread(kubeconfig.check, name, cluster, context.relays.names)
        process, server = kubeconfig.served(name)
        if process not in ("", BACKGROUND) and running_of(context.state, self._environment).alive(process):
            raise ConfigError(
                f'context "{name}" belongs to a proxy in the foreground (port {server.rpartition(":")[2]}): '
                "end it with Ctrl-C, then connect"
            )
        key = settings.without_context()
        candidate: Served | None = None
        try:
            if self.leaving:
                raise AskAgain
            served = await self._current(key)
            if served is None:
                served = candidate = Served(context, cluster, self._clock)
                if self._donor(connection, candidate) is None:
                    candidate.bind()
                self._begin(candidate)
            try:
                await served.wait_for_session()
            except ArcbridgeError as error:
                if candidate is None and self.served.get(key) is not served:
                    raise AskAgain from error  # what closed it is no failure of the cluster
                raise
            async with self.changing:
                now = self.served.get(key)
                if self.leaving or (now is None and candidate is None):
                    raise AskAgain
                # Another connect with these settings may have been quicker: then its cluster is served, and the one
                # that was proved here is closed.
                return await self._replace(key, now or served, connection, kubeconfig, switch=switch)
        finally:
            if candidate is not None and self.served.get(key) is not candidate:
                await asyncio.shield(self._closing.start(candidate.close()))

    async def _replace(
        self, key: ConnectionSettings, served: Served, connection: Connection, kubeconfig: Kubeconfig, *, switch: bool
    ) -> dict[str, Any]:
        """Serve a proved connection, in place of what its context was served by."""
        donor = None
        if served.endpoint is None:
            donor = self._donor(connection, served)
            if donor is None:  # it was closed since the proof, and another program may have taken its port
                served.bind()
            else:
                served.announce(donor.port)
        served.state.add_kubeconfig(connection.kubeconfig)
        former = [one for one in self.kept.all() if same_place(one, connection)]
        self.kept.add(connection)
        merging = asyncio.ensure_future(asyncio.to_thread(kubeconfig.merge, served.entry_of(connection), switch=switch))
        try:
            path = await asyncio.shield(merging)
        except BaseException:
            await asyncio.wait([merging])  # a thread cannot be cancelled
            if merging.exception() is not None:
                self._put_back(connection, former)
            raise
        # From here on nothing fails and nothing waits until it is done.
        replaced = [
            (one, entry)
            for one in self.served.values()
            for entry in one.connections
            if one is not served and same_place(entry, connection)
        ]
        if donor is not None:
            assert donor.endpoint is not None
            served.take(list(donor.endpoint.release()))
        self._enter(served, connection)
        for one, entry in replaced:
            one.connections.remove(entry)
        if key not in self.served:
            await self._accept(key, served)
        for one, _ in replaced:
            if not one.connections:
                await self.close(one)
        try:
            self._keep_port(served)
            served.state.add_cluster_name(connection.cluster)
        except StateError as error:  # no reason to fail: the next process only may have to take another port
            log.warning("port not kept", cluster=connection.cluster, reason=error.message)
        return {
            "cluster": connection.cluster,
            "context": connection.context,
            "port": served.port,
            "kubeconfig": str(path),
            "current": switch,
        }

    def _donor(self, connection: Connection, candidate: Served) -> Served | None:
        """Return what serves the connection's context alone, at a port that is good for the candidate too."""
        for served in self.served.values():
            mine = served.connections and all(same_place(one, connection) for one in served.connections)
            if mine and candidate.config.port in (None, served.port):
                return served
        return None

    def _put_back(self, connection: Connection, former: Sequence[Connection]) -> None:
        """Keep what was connected before, where the kubeconfig could not be written."""
        try:
            self.kept.remove(connection)
            for one in former:
                self.kept.add(one)
        except StateError as error:
            log.warning("connections not kept", reason=error.message)

    # -- disconnect, status -----------------------------------------------------------------------------------------

    async def disconnect(self, names: tuple[str, ...], *, every: bool) -> dict[str, Any]:
        """Take connections off: their ports and their contexts; raises ArcbridgeError, AskAgain."""
        async with self.changing:
            if self.leaving:
                raise AskAgain
            chosen = choose(self.connections(), names, every=every)
            for connection in chosen:
                await asyncio.to_thread(remove_connection, connection, self.kept, self._environment)
                self.failed.pop(connection, None)
                for served in list(self.served.values()):
                    if connection in served.connections:
                        served.connections.remove(connection)
                        if not served.connections:
                            await self.close(served)
            return {"disconnected": [{"cluster": one.cluster, "context": one.context} for one in chosen]}

    def describe(self) -> list[dict[str, Any]]:
        """Return each cluster for `status`, sorted by name."""
        clusters = [served.document() for served in self.served.values()]
        clusters += [
            {"name": one.cluster, "contexts": [one.context], "state": "failed", "reason": reason}
            for one, reason in self.failed.items()
        ]
        return sorted(clusters, key=lambda one: str(one["name"]))
