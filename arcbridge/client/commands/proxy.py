"""Runs `proxy`: serves clusters to kubectl on local ports until it is interrupted.

The four lines that tools parse are those of `az connectedk8s proxy`, each shown when it has become true: the port is
bound, the kubeconfig is written, and requests work because a session is up. It prints nothing: what the user reads goes
to the `Terminal` of the command line. Invariant: whatever ends it, the kubeconfig is put back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from arcbridge.client.kubeconfig.entries import Entry, Kubeconfig, render
from arcbridge.client.kubeconfig.running import BACKGROUND, repair_kubeconfigs, running_of
from arcbridge.client.service import ClientContext, refuse_for_several
from arcbridge.client.serving.served_cluster import ServedCluster
from arcbridge.client.settings import required
from arcbridge.errors import ArcbridgeError, ConfigError
from arcbridge.tasks import first_error

log = structlog.get_logger("arcbridge.client")


async def run_proxy(context: ClientContext, *, ready: Callable[[], None] = lambda: None) -> None:
    """Serve the clusters of the settings until cancelled; then put back what was changed.

    Raises ArcbridgeError when the start fails: nothing was changed then.
    """
    config, tell = context.config, context.terminal.tell
    clusters = context.clusters()
    if not config.relay_urls():
        context.require_login()  # its error says to log in, which sets the relay as well
    required(context.given, context.environment)
    refuse_for_several(config, len(clusters), "kube_context", "cluster_ca_pin", "port")
    if config.file == "-" and len(clusters) > 1:
        raise ConfigError("flag --file: standard output takes the kubeconfig of one cluster; name one, or a file")
    contexts = Contexts(context) if config.file == "-" else SavedContexts(context)
    clusters = await contexts.free(clusters)
    if not clusters:
        return
    context.require_login()
    proxies = [ServedCluster(context, cluster) for cluster in clusters]
    observer = None
    try:
        for proxy in proxies:
            proxy.bind()
            if proxy.moved:
                tell(proxy.moved)
            tell(f"Proxy is listening on port {proxy.port}")
        if config.observe.listen:
            from arcbridge.client.serving.observation import observe

            observer = await observe(config.observe.listen, [proxy.session for proxy in proxies], proxies=proxies)
        try:
            async with asyncio.TaskGroup() as group:
                for proxy in proxies:
                    group.create_task(proxy.session.connect_once())
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None  # the user reads one sentence
        try:
            await _serve(context, proxies, contexts, ready)
        finally:
            contexts.put_back()
    finally:
        await asyncio.gather(*(proxy.close() for proxy in proxies))
        contexts.end()
        if observer is not None:
            await observer.stop()


async def _serve(
    context: ClientContext, proxies: list[ServedCluster], contexts: Contexts, ready: Callable[[], None]
) -> None:
    # `run` begins now; it also replaces a session that has ended since `connect_once`.
    async with asyncio.TaskGroup() as group:
        for proxy in proxies:
            proxy.keep_port()
            group.create_task(proxy.session.run())
            await proxy.serve()
            group.create_task(proxy.keep_renewed(lambda proxy=proxy: contexts.refresh(proxy)))  # type: ignore[misc]
        for proxy in proxies:
            await contexts.add(proxy, switch=proxy is proxies[0])
            context.state.add_cluster_name(proxy.cluster)
        context.terminal.tell("Press Ctrl+C to close proxy.")
        ready()


class Contexts:
    """Where kubectl finds the clusters that are served: the kubeconfig of one cluster on standard output, from which
    nothing can be taken back."""

    def __init__(self, context: ClientContext) -> None:
        self._context = context
        self._config = context.config

    async def free(self, clusters: list[str]) -> list[str]:
        """Return the clusters that no other process serves. Raises ConfigError where an entry is not ours."""
        return clusters

    async def add(self, proxy: ServedCluster, *, switch: bool) -> None:
        """Write a cluster's entry; `switch`: as the current context, where the settings want that."""
        self._context.terminal.write_data(render(proxy.entry(self._name(proxy.cluster), process="")))

    async def refresh(self, proxy: ServedCluster) -> None:
        """Write a younger client certificate to where the one of before was written."""
        log.warning(
            "kubeconfig not updated",
            cluster=proxy.cluster,
            reason="it was written to standard output, and its client certificate ends",
            advice="start the proxy again before that",
        )

    def put_back(self) -> None:
        """Undo what was written."""

    def end(self) -> None:
        """Note that this process serves no more."""

    def _name(self, cluster: str) -> str:
        return self._config.kube_context or cluster


class SavedContexts(Contexts):
    """The entries in the user's kubeconfig."""

    def __init__(self, context: ClientContext) -> None:
        super().__init__(context)
        self._kubeconfig = Kubeconfig.find(context.config.file, context.environment)
        self._running = running_of(context.state, context.environment)
        self._merged: list[Entry] = []

    async def free(self, clusters: list[str]) -> list[str]:
        """Repair what a killed proxy has left, and find what is taken: before any login, so that none is in vain."""
        await asyncio.to_thread(repair_kubeconfigs, self._context.state, self._running)
        names = self._context.relays.names
        for cluster in clusters:
            await asyncio.to_thread(self._kubeconfig.check, self._name(cluster), cluster, names)
        return [cluster for cluster in clusters if not self._served_by_another(cluster)]

    async def add(self, proxy: ServedCluster, *, switch: bool) -> None:
        entry = proxy.entry(self._name(proxy.cluster), process=self._running.begin())
        self._context.state.add_kubeconfig(file.path for file in self._kubeconfig.files)
        switch = switch and self._config.context_switch
        merging = asyncio.ensure_future(asyncio.to_thread(self._kubeconfig.merge, entry, switch=switch))
        try:
            path = await asyncio.shield(merging)
        except asyncio.CancelledError:
            # A thread cannot be cancelled: what it changes must be undone.
            await merging
            self._merged.append(entry)
            raise
        self._merged.append(entry)
        tell = self._context.terminal.tell
        tell(f'Merged "{entry.name}" {"as current context " if switch else ""}in {path}')
        tell(f"Start sending kubectl requests on '{entry.name}' context using kubeconfig at {path}")

    async def refresh(self, proxy: ServedCluster) -> None:
        entry = proxy.entry(self._name(proxy.cluster), process=self._running.begin())
        await asyncio.to_thread(self._kubeconfig.refresh, entry)

    def put_back(self) -> None:
        """Undo what was merged, without a thread: a second cancellation must not leave the file half-way."""
        for entry in reversed(self._merged):
            try:
                self._kubeconfig.undo(entry, remove=self._config.remove_context)
            except ArcbridgeError as error:
                log.warning("the kubeconfig was not put back", reason=error.message)

    def end(self) -> None:
        self._running.end()

    def _served_by_another(self, cluster: str) -> bool:
        """Return whether another process serves the context of a cluster already; the user is told then."""
        name = self._name(cluster)
        process, server = self._kubeconfig.served(name)
        if not server or (process != BACKGROUND and not self._running.alive(process)):
            return False
        how = "is connected in the background" if process == BACKGROUND else "is served by another proxy"
        port = server.rpartition(":")[2]
        self._context.terminal.tell(f'Cluster "{cluster}" {how} already: port {port}, context "{name}"')
        return True
