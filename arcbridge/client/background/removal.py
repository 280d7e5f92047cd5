"""Removes a connection for `disconnect`: finds it by name, and takes its context, its record and its port away.

The background process calls it, and the command itself where no such process runs. It stops no endpoint and ends no
session, which the process does afterwards. Invariant: a connection is forgotten only after its context is out of the
kubeconfig, so that a removal which failed can be tried again.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog

from arcbridge.client.background.connections import Connection, Connections
from arcbridge.client.kubeconfig.entries import Kubeconfig
from arcbridge.client.service import ClientContext, Terminal
from arcbridge.client.session.restrictions import endpoint_name, restrictions_of
from arcbridge.errors import ArcbridgeError, ConfigError

log = structlog.get_logger("arcbridge.client")


def choose(known: Sequence[Connection], names: Sequence[str], *, every: bool) -> list[Connection]:
    """Choose the connections of clusters or contexts with these names; raises ConfigError for a name that is none."""
    if every:
        return list(known)
    if not names:
        if len(known) <= 1:
            return list(known)
        listed = ", ".join(sorted({one.context for one in known}))
        raise ConfigError(f"which cluster? name one of {listed}, or give --all")
    chosen: list[Connection] = []
    for name in names:
        found = [one for one in known if one.context == name] or [one for one in known if one.cluster == name]
        if not found:
            contexts = sorted({one.context for one in known})
            near = difflib.get_close_matches(name, contexts, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; connected: {', '.join(contexts) or 'none'}"
            raise ConfigError(f'"{name[:64]}" is not connected{hint}')
        chosen += [one for one in found if one not in chosen]
    return chosen


def remove_connection(connection: Connection, connections: Connections, environment: Mapping[str, str]) -> None:
    """Take a connection's context out of the kubeconfig, give its port back and forget it; raises ArcbridgeError."""
    relays: tuple[str, ...] = ()
    context: ClientContext | None = None
    try:
        context = ClientContext(connection.settings.load(environment), Terminal(), environment=environment)
        relays = context.relays.names
    except ArcbridgeError as error:
        # Its settings file may be gone; its context and cluster are in the record, so only the port stays taken.
        log.warning("the settings of a connection cannot be read", cluster=connection.cluster, reason=error.message)
    if connection.kubeconfig:
        Kubeconfig(connection.kubeconfig).remove(connection.context, connection.cluster, relays)
    connections.remove(connection)
    if context is not None:
        name = endpoint_name(connection.cluster, context.restrictions)
        if name not in (_endpoint_name(one, environment) for one in connections.all()):
            context.state.forget_port(relays, name)


def _endpoint_name(connection: Connection, environment: Mapping[str, str]) -> str:
    try:
        return endpoint_name(connection.cluster, restrictions_of(connection.settings.load(environment).restrict))
    except ArcbridgeError:
        return connection.cluster


def disconnect(
    path: Path, names: Sequence[str], environment: Mapping[str, str], *, every: bool
) -> list[dict[str, str]]:
    """Take connections off while no background process runs. `path`: the list of connections. Raises ArcbridgeError."""
    connections = Connections(path)
    chosen = choose(connections.all(), names, every=every)
    for connection in chosen:
        remove_connection(connection, connections, environment)
    return [{"cluster": one.cluster, "context": one.context} for one in chosen]
