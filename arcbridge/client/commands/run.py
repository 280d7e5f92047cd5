"""`run`: a command against one cluster or many, with a kubeconfig of its own that ends with it.

For each cluster, in this order: the session is up, the local endpoint serves, the kubeconfig is written, the command
starts. With one cluster the command has this process's input, output and terminal, and its exit code is ours. With
several each line of output begins with the cluster's name, all run whatever becomes of the others, and the worst exit
code is ours; a cluster that could not be reached counts with the exit code of that error.

Invariant: the user's own kubeconfig and ports are neither read nor changed, and when it ends, nothing of it is left.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from arcbridge.client.commands import child
from arcbridge.client.commands.cluster_selection import Chosen, check_names, choose, is_pattern
from arcbridge.client.kubeconfig.entries import Entry, Kubeconfig, render
from arcbridge.client.kubeconfig.private import KUBECONFIG, private_directory, sweep
from arcbridge.client.service import ClientContext, Terminal
from arcbridge.errors import ArcbridgeError, ConfigError, PinMismatch
from arcbridge.net.loopback import listen_local
from arcbridge.settings.config import ClientConfig
from arcbridge.tasks import first_error

PARALLEL = 4
"""Clusters at a time unless the user says otherwise."""

Report = Callable[[str, str], None]
"""Shows an error of one of several clusters: its name, and the message."""


async def run_command(
    config: ClientConfig,
    terminal: Terminal,
    command: Sequence[str],
    *,
    report: Report,
    write: child.Write,
    parallel: int = PARALLEL,
    token: str = "",
    environment: Mapping[str, str],
) -> int:
    """Run `command` against the clusters of `config`; return the exit code.

    Raises ArcbridgeError when nothing was run: the settings, the list of clusters, or the one cluster.
    """
    if shutil.which(command[0], path=environment.get("PATH")) is None:
        raise child.not_found(command[0])
    wanted = list(dict.fromkeys(filter(None, (config.cluster, *config.clusters))))
    check_names(wanted)
    context = ClientContext(config, terminal, token=token, environment=environment)
    sweeping = asyncio.get_running_loop().run_in_executor(None, sweep, environment)
    clusters = await _choose(context, wanted)
    if len(clusters) > 1 and config.cluster_ca_pin:
        raise ConfigError(f"flag --cluster-ca-pin: fits one cluster, but there are {len(clusters)}")
    with child.Signals() as signals:
        if len(clusters) == 1:
            return await _at(context, clusters[0], command, signals)
        width = max(len(one.name) for one in clusters)
        places = asyncio.Semaphore(parallel)

        async def at(cluster: Chosen) -> int:
            async with places:
                prefix = f"{cluster.name:{width}} | "
                try:
                    code = await _at(context, cluster, command, signals, prefix=prefix, write=write)
                except ArcbridgeError as error:
                    report(cluster.name, error.told())
                    return int(error.exit_code)
                if code:
                    report(cluster.name, f"the command ended with exit code {code}")
                return code

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(at(cluster)) for cluster in clusters]
        await sweeping
        return child.worst([task.result() for task in tasks])


async def _choose(context: ClientContext, wanted: Sequence[str]) -> list[Chosen]:
    listed: list[dict[str, Any]] = []
    if any(is_pattern(name) for name in wanted):
        from arcbridge.client.commands.directory import list_clusters  # aiohttp: a quarter of a second

        listed = await list_clusters(context.relays, context.tokens)
    return choose(wanted, listed)


async def _at(
    context: ClientContext,
    cluster: Chosen,
    command: Sequence[str],
    signals: child.Signals,
    *,
    prefix: str | None = None,
    write: child.Write | None = None,
) -> int:
    """Run the command against one cluster; return its exit code. Raises ArcbridgeError when it was not started."""
    place = _Place(context, cluster)
    try:
        try:
            with signals.starting():
                await place.start()
        except asyncio.CancelledError:
            if not signals.received:
                raise
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
            return 128 + signals.received
        async with asyncio.TaskGroup() as group:
            keeping = group.create_task(place.session.run())
            with private_directory(context.environment, render(place.entry())) as directory:
                environment = child.environment_for(context.environment, directory, cluster.name)
                renewing = group.create_task(place.keep_renewed(directory))
                code = await child.run(command, environment, signals, prefix=prefix, write=write)
                renewing.cancel()
            keeping.cancel()
        return code
    except BaseExceptionGroup as errors:
        raise first_error(errors) from errors
    finally:
        await place.close()


class _Place:
    """One cluster of a command: its session, and its endpoint at a port that the kernel chooses."""

    def __init__(self, context: ClientContext, cluster: Chosen) -> None:
        self._cluster = cluster
        # What a pattern matched is a name of the relay's choice, with a CA of its choice (docs/threats.md#W21).
        self._trust = context.trust(first_use=not cluster.pattern)
        self.served = context.served(cluster.name, trust=self._trust)
        self.session = self.served.session

    async def start(self) -> None:
        """Have the session up and the endpoint serving. Raises ArcbridgeError."""
        name, pattern = self._cluster.name, self._cluster.pattern
        if pattern and not self._trust.asks and not self._trust.known(name):
            raise PinMismatch(
                f"the relay lists a cluster {name!r} that matches {pattern!r} and is not known here, and what a "
                "pattern matches is not trusted unseen; give --pins-file, or name it once with --cluster"
            )
        await self.session.connect_once()
        self.served.take(listen_local(0))
        await self.served.serve()

    def entry(self) -> Entry:
        """Return what the command's kubeconfig says."""
        return self.served.entry(self._cluster.name, process="")

    async def keep_renewed(self, directory: Path) -> None:
        """Keep the certificates of the endpoint and of the command's kubeconfig young."""

        async def write() -> None:
            await asyncio.to_thread(Kubeconfig([directory / KUBECONFIG]).refresh, self.entry())

        await self.served.keep_renewed(write)

    async def close(self) -> None:
        await self.served.close()
