"""Runs `proxy`: serves clusters to kubectl on local ports until it is interrupted.

The four lines that tools parse are those of `az connectedk8s proxy`, each shown when it has become true: the port is
bound, the kubeconfig is written, and requests work because a session is up. It prints nothing: what the user reads goes
to the `Terminal` of the command line. Invariant: whatever ends it, the kubeconfig is put back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import structlog

from arcbridge.client.kubeconfig.entries import Kubeconfig, Merged, render
from arcbridge.client.kubeconfig.repair import repair_kubeconfigs, running_of
from arcbridge.client.kubeconfig.running import BACKGROUND
from arcbridge.client.service import ClientContext, Terminal
from arcbridge.client.serving.observation import observe
from arcbridge.client.serving.served_cluster import ServedCluster
from arcbridge.client.settings import required
from arcbridge.errors import ArcbridgeError, ConfigError
from arcbridge.settings.config import ClientConfig
from arcbridge.tasks import first_error

log = structlog.get_logger("arcbridge.client")


async def run_proxy(
    config: ClientConfig,
    terminal: Terminal,
    *,
    environment: Mapping[str, str],
    token: str = "",
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve the clusters of `config` until cancelled; then put back what was changed.

    Raises ArcbridgeError when the start fails: nothing was changed then.
    """
    context = ClientContext(config, terminal, token=token, environment=environment)
    clusters = context.clusters()
    if not config.relay_urls():
        context.require_login()  # its error says to log in, which sets the relay as well
    required(config, environment)
    _check_flags(config, clusters)
    contexts: Contexts = _Printed(context) if config.file == "-" else _Saved(context)
    clusters = await contexts.free(clusters)
    if not clusters:
        return
    context.require_login()
    proxies = [context.served(cluster) for cluster in clusters]
    observer = None
    try:
        for proxy in proxies:
            if moved := proxy.bind():
                terminal.tell(moved)
            terminal.tell(f"Proxy is listening on port {proxy.port}")
        observer = await observe(config.observe.listen, [proxy.session for proxy in proxies], proxies=proxies)
        await _all([proxy.session.connect_once() for proxy in proxies])
        try:
            await _serve(context, proxies, contexts, ready)
        finally:
            contexts.put_back()
    finally:
        await asyncio.gather(*(proxy.close() for proxy in proxies))
        contexts.end()
        if observer is not None:
            await observer.stop()


def _check_flags(config: ClientConfig, clusters: list[str]) -> None:
    """Raise ConfigError for settings of one cluster where several were named."""
    if len(clusters) == 1:
        return
    for flag, value in (("--kube-context", config.kube_context), ("--cluster-ca-pin", config.cluster_ca_pin)):
        if value:
            raise ConfigError(f"flag {flag}: fits one cluster, but {len(clusters)} were named")
    if config.port:
        raise ConfigError(f"flag --port: fits one cluster, but {len(clusters)} were named; each keeps its own")
    if config.file == "-":
        raise ConfigError("flag --file: standard output takes the kubeconfig of one cluster; name one, or a file")


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


class Contexts(Protocol):
    """Where kubectl finds the clusters that are served."""

    async def free(self, clusters: list[str]) -> list[str]:
        """Return the clusters that no other process serves. Raises ConfigError where an entry is not ours."""

    async def add(self, proxy: ServedCluster, *, switch: bool) -> None:
        """Write a cluster's entry; `switch`: as the current context, where the settings want that."""

    async def refresh(self, proxy: ServedCluster) -> None:
        """Write a younger client certificate to where the one of before was written."""

    def put_back(self) -> None:
        """Undo what was written."""

    def end(self) -> None:
        """Note that this process serves no more."""


class _Printed:
    """The kubeconfig of one cluster on standard output, from which nothing can be taken back."""

    def __init__(self, context: ClientContext) -> None:
        self._context = context

    async def free(self, clusters: list[str]) -> list[str]:
        return clusters

    async def add(self, proxy: ServedCluster, *, switch: bool) -> None:
        name = self._context.config.kube_context or proxy.cluster
        self._context.terminal.write_data(render(proxy.entry(name, process="")))

    async def refresh(self, proxy: ServedCluster) -> None:
        log.warning(
            "kubeconfig not updated",
            cluster=proxy.cluster,
            reason="it was written to standard output, and its client certificate ends",
            advice="start the proxy again before that",
        )

    def put_back(self) -> None:
        pass

    def end(self) -> None:
        pass


class _Saved:
    """The entries in the user's kubeconfig."""

    def __init__(self, context: ClientContext) -> None:
        self._context = context
        self._config = context.config
        self._kubeconfig = Kubeconfig.find(context.config.file, context.environment)
        self._running = running_of(context.state, context.environment)
        self._merged: list[Merged] = []

    async def free(self, clusters: list[str]) -> list[str]:
        """Repair what a killed proxy has left, and find what is taken: before any login, so that none is in vain."""
        await asyncio.to_thread(repair_kubeconfigs, self._context.state, self._running)
        names = self._context.relays.names
        for cluster in clusters:
            await asyncio.to_thread(self._kubeconfig.check, self._name(cluster), cluster, names)
        return [cluster for cluster in clusters if not self._served_by_another(cluster)]

    async def add(self, proxy: ServedCluster, *, switch: bool) -> None:
        entry = proxy.entry(self._name(proxy.cluster), process=self._running.begin())
        self._context.state.add_kubeconfig([file.path for file in self._kubeconfig.files])
        switch = switch and self._config.context_switch
        merging = asyncio.ensure_future(asyncio.to_thread(self._kubeconfig.merge, entry, switch=switch))
        try:
            merged = await asyncio.shield(merging)
        except asyncio.CancelledError:
            # A thread cannot be cancelled: what it changes must be undone.
            self._merged.append(await merging)
            raise
        self._merged.append(merged)
        name, tell = merged.entry.name, self._context.terminal.tell
        tell(f'Merged "{name}" {"as current context " if merged.switched else ""}in {merged.path}')
        tell(f"Start sending kubectl requests on '{name}' context using kubeconfig at {merged.path}")

    async def refresh(self, proxy: ServedCluster) -> None:
        entry = proxy.entry(self._name(proxy.cluster), process=self._running.begin())
        await asyncio.to_thread(self._kubeconfig.refresh, entry)

    def put_back(self) -> None:
        """Undo what was merged, without a thread: a second cancellation must not leave the file half-way."""
        for merged in reversed(self._merged):
            try:
                self._kubeconfig.undo(merged, remove=self._config.remove_context)
            except ArcbridgeError as error:
                log.warning("the kubeconfig was not put back", reason=error.message)

    def end(self) -> None:
        self._running.end()

    def _name(self, cluster: str) -> str:
        return self._config.kube_context or cluster

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


async def _all(starts: list[Awaitable[None]]) -> None:
    """Run all at once; raises the first failure itself, without a group, because the user reads one sentence."""

    async def run(start: Awaitable[None]) -> None:
        await start

    try:
        async with asyncio.TaskGroup() as group:
            for start in starts:
                group.create_task(run(start))
    except BaseExceptionGroup as errors:
        ours = errors.subgroup(ArcbridgeError)
        if ours is None:
            raise
        raise first_error(ours) from None
