"""`run`: a command against one cluster or many, with a kubeconfig of its own that ends with it.

For each cluster, in this order: the session is up, the local endpoint serves, the kubeconfig is written, the command
starts. With one cluster the command has this process's input, output and terminal, and its exit code is ours. With
several each line of output begins with the cluster's name, all run whatever becomes of the others, and the worst exit
code is ours; a cluster that could not be reached counts with RUN_FAILED (125), which few commands end with.

Invariant: the user's own kubeconfig and ports are neither read nor changed, and when it ends, nothing of it is left. A
cluster that only a pattern chose says so, because then the relay has chosen its name (docs/threats.md#W21).
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from arcbridge.client.commands import child
from arcbridge.client.commands.directory import list_clusters
from arcbridge.client.kubeconfig.entries import Kubeconfig, render
from arcbridge.client.kubeconfig.private import KUBECONFIG, private_directory, sweep
from arcbridge.client.service import ClientContext, Terminal, check_name, refuse_for_several
from arcbridge.client.serving.served_cluster import OneTimeCluster, ServedCluster
from arcbridge.errors import ArcbridgeError, ConfigError, ExitCode, PinMismatch, Unreachable
from arcbridge.net.loopback import listen_local
from arcbridge.settings.config import ClientConfig
from arcbridge.tasks import first_error
from arcbridge.wire.records import UNRESTRICTED

PARALLEL = 4
"""Clusters at a time unless the user says otherwise."""

Report = Callable[[str, str], None]
"""Shows an error of one of several clusters: its name, and the message."""
_SPECIAL = frozenset("*?[")
_ALLOWED = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-.*?[]!")


async def run_command(
    config: ClientConfig,
    terminal: Terminal,
    command: Sequence[str],
    *,
    report: Report,
    write: child.Write,
    parallel: int = PARALLEL,
    token: str = "",
    lasts: float = 0.0,
    environment: Mapping[str, str],
) -> int:
    """Run `command` against the clusters of `config`; return the exit code. `lasts`: seconds after which it reaches
    them no more, 0: as long as it runs.

    Raises ArcbridgeError when nothing was run: the settings, the list of clusters, or the one cluster.
    """
    if shutil.which(command[0], path=environment.get("PATH")) is None:
        there = "/" in command[0] and os.path.exists(command[0])
        raise child.not_found(command[0], "not executable" if there else "", exists=there)
    wanted = list(dict.fromkeys(filter(None, (config.cluster, *config.clusters))))
    check_names(wanted)
    context = ClientContext(config, terminal, token=token, lasts=lasts, environment=environment)
    if context.restrictions != UNRESTRICTED and context.tokens.token_mode:
        raise ConfigError(
            "flag --token: the command would have the token itself, and could use it elsewhere without the "
            "restrictions; log in instead"
        )
    sweeping = asyncio.get_running_loop().run_in_executor(None, sweep, environment)
    clusters = await _choose(context, wanted)
    refuse_for_several(config, len(clusters), "cluster_ca_pin")
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
                    return int(ExitCode.RUN_FAILED)
                if code:
                    report(cluster.name, f"the command ended with exit code {code}")
                return code

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(at(cluster)) for cluster in clusters]
        await sweeping
        return max(task.result() for task in tasks)  # 0 only where each command had 0


async def _choose(context: ClientContext, wanted: Sequence[str]) -> list[Chosen]:
    listed: list[dict[str, Any]] = []
    if any(is_pattern(name) for name in wanted):
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
    # What a pattern matched is a name of the relay's choice, with a CA of its choice (docs/threats.md#W21).
    trust = context.trust(first_use=not cluster.pattern)
    restricted = context.restrictions != UNRESTRICTED
    served = (OneTimeCluster if restricted else ServedCluster)(context, cluster.name, trust=trust)
    try:
        try:
            with signals.starting():
                if cluster.pattern and not trust.asks and not trust.known(cluster.name):
                    raise PinMismatch(
                        f"the relay lists a cluster {cluster.name!r} that matches {cluster.pattern!r} and is not known "
                        "here, and what a pattern matches is not trusted unseen; give --pins-file, or name it once "
                        "with --cluster"
                    )
                await served.session.connect_once()
                served.take(listen_local(0))
                await served.serve()
        except asyncio.CancelledError:
            if not signals.received:
                raise
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
            return 128 + signals.received
        async with asyncio.TaskGroup() as group:
            keeping = group.create_task(served.session.run())
            with private_directory(context.environment, render(served.entry(cluster.name, process=""))) as directory:

                async def refresh() -> None:
                    kubeconfig = Kubeconfig([directory / KUBECONFIG])
                    await asyncio.to_thread(kubeconfig.refresh, served.entry(cluster.name, process=""))

                environment = child.environment_for(context.environment, directory, cluster.name)
                if restricted:
                    environment = child.without_tokens(environment, context.config.login)
                renewing = group.create_task(served.keep_renewed(refresh))
                code = await child.run(command, environment, signals, prefix=prefix, write=write)
                renewing.cancel()
            keeping.cancel()
        return code
    except BaseExceptionGroup as errors:
        raise first_error(errors) from errors
    finally:
        await served.close()


@dataclass(frozen=True, slots=True)
class Chosen:
    """One cluster of a command."""

    name: str
    pattern: str = ""
    """The pattern that chose it; empty: it was named."""


def is_pattern(name: str) -> bool:
    """Return whether a name is a pattern. No cluster's name has one of these characters."""
    return not _SPECIAL.isdisjoint(name)


def check_names(wanted: Sequence[str]) -> None:
    """Raise ConfigError for what is neither a cluster's name nor a pattern, and where there is none."""
    if not wanted:
        raise ConfigError("cluster: required but not set; give --cluster NAME or a pattern (`clusters` lists them)")
    for name in wanted:
        if not is_pattern(name):
            check_name(name)
        elif len(name) > 128 or not _ALLOWED.issuperset(name):
            raise ConfigError(
                f"flag --cluster: {name[:64]!r}: not a pattern; use lower-case letters, digits, '-', '.', and *, ?, […]"
            )


def choose(wanted: Sequence[str], listed: Sequence[Mapping[str, Any]]) -> list[Chosen]:
    """Return the clusters of `wanted` in its order, each once; `listed` are rows of `directory.list_clusters`.

    A cluster that is not connected now is chosen too: to leave it out silently would look like success. One that is
    revoked is not. Raises Unreachable for a pattern that matches nothing.
    """
    named = {name for name in wanted if not is_pattern(name)}
    found: dict[str, Chosen] = {}
    for one in wanted:
        if one in named:
            found.setdefault(one, Chosen(one))
            continue
        names = sorted(str(row["name"]) for row in listed if not row.get("revoked"))
        matches = [name for name in names if fnmatchcase(name, one)]
        if not matches:
            raise Unreachable(f"no cluster that you may reach matches {one!r}; `arcbridge clusters` lists them")
        for name in matches:
            if name not in named:
                found.setdefault(name, Chosen(name, one))
    # A name that stands behind a pattern that matches it keeps its place in the order that was given.
    return list(found.values())
