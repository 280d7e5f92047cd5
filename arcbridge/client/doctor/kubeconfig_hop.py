"""Looks at our contexts in the kubeconfig, and at what listens at their ports on this machine.

The kubeconfig and the kept ports are read and never changed. Each look has a deadline, and leaves no connection open.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from arcbridge.checks.diagnosis import Finding, FindingState, ok, skipped
from arcbridge.client.doctor.codes import clip, fault, fault_to_come
from arcbridge.client.kubeconfig.entries import Kubeconfig, mark_of
from arcbridge.client.service import ClientContext
from arcbridge.client.state import StateDirectory
from arcbridge.errors import ArcbridgeError, StateError
from arcbridge.installation import is_another, is_there, own_path
from arcbridge.net.address import Address
from arcbridge.net.dialer import DIRECT, connect
from arcbridge.net.loopback import port_holder
from arcbridge.net.tlspipe import TlsPipe

LOCAL_DEADLINE = 2.0


@dataclass(frozen=True, slots=True)
class ContextFacts:
    """One context of ours in the kubeconfig."""

    name: str
    cluster: str
    port: int
    current: bool = False
    starts_itself: bool = False
    """Its user is an exec plugin, which starts what serves the port: that of a `proxy` that has ended only says so."""
    listening: bool = False
    ours: bool = False
    """What listens shows a certificate of this user's local CA."""
    holder: str = ""
    plugin: str = ""
    """The program of its exec plugin; empty: it has a client certificate."""
    edited: str = ""
    """The server of its cluster's entry, where it is not the one that was written and the plugin refuses it."""


async def look_at_kubeconfig(context: ClientContext, cluster: str, *, silent: bool = False) -> Finding:
    """Look at our contexts of `cluster`, or at all where that is empty. `silent`: the background process hangs."""
    file = context.config.file
    # `-` is standard output, which cannot be looked at.
    kubeconfig = Kubeconfig.find("" if file == "-" else file, context.environment)
    try:
        found = await contexts(kubeconfig, context.state)
    except ArcbridgeError as error:
        return fault("kubeconfig", clip(error.message), "kubeconfig")
    kept = await kept_port(context.state, context.relays.names, cluster) if cluster else None
    finding = judge_kubeconfig(found, cluster, kept, silent=silent)
    if finding.state is FindingState.SKIPPED and not silent and (elsewhere := _elsewhere(context, kubeconfig, cluster)):
        return fault_to_come(
            finding.hop, f"{finding.detail} that kubectl reads here; {elsewhere}", "kubeconfig_elsewhere"
        )
    return finding


def _elsewhere(context: ClientContext, kubeconfig: Kubeconfig, cluster: str) -> str:
    """Say in which other kubeconfig there are contexts of `cluster`; empty: in none."""
    here = {os.path.abspath(file.path) for file in kubeconfig.files}
    for files in context.state.kubeconfigs():
        other = [file for file in Kubeconfig(files).files if os.path.abspath(file.path) not in here]
        for file in other:
            try:
                file.read()
            except ArcbridgeError:
                continue
            for name, body in file.bodies("contexts"):
                if (mark := mark_of(body)) is not None and cluster in ("", str(mark.get("cluster", ""))):
                    return f'context "{clip(name)}" is in {clip(str(file.path))}'
    return ""


def judge_kubeconfig(
    contexts: Sequence[ContextFacts], cluster: str, kept: ContextFacts | None = None, *, silent: bool = False
) -> Finding:
    """Judge our contexts of `cluster`, or all where that is empty; `kept`: the port that is kept for it."""
    hop = "kubeconfig"
    looked_at = [one for one in contexts if not cluster or one.cluster == cluster]
    for one in looked_at:
        if one.edited:
            detail = f'context "{clip(one.name)}" leads to {clip(one.edited)}, which arcbridge has not written'
            return fault(hop, detail, "kubeconfig_edited")
    for one in [*looked_at, *([kept] if kept is not None else [])]:
        if one.listening and not one.ours:
            if silent:  # it listens there, and shows no certificate
                return skipped(hop, f"what listens at port {one.port} cannot be told while that process is silent")
            by = f" of {clip(one.holder)}" if one.holder else ""
            detail = f'port {one.port}, which "{one.cluster}" has, is held by another program{by}'
            return fault(hop, detail, "port_taken")
    dead = [one for one in looked_at if not one.listening and not one.starts_itself]
    dead.sort(key=lambda one: not one.current)
    if dead:
        detail = f"nothing listens at the port of the {_named(dead)}{' (the current one)' if dead[0].current else ''}"
        again = f"start it again: arcbridge proxy -n {dead[0].cluster}"
        return fault(hop, detail, "kubeconfig_dead", f"{again}; or use another: kubectl config use-context NAME")
    for one in looked_at:
        if one.plugin and not is_there(one.plugin):
            return fault(
                hop, f'context "{clip(one.name)}" runs {clip(one.plugin)}, which is not there', "plugin_missing"
            )
        if one.plugin and is_another(one.plugin):
            detail = f'context "{clip(one.name)}" runs {clip(one.plugin)}, and this is {clip(own_path())}'
            return fault_to_come(hop, detail, "plugin_other")
    if not looked_at:
        which = f' for "{cluster}"' if cluster else ""
        return skipped(hop, f"no context of arcbridge{which}")
    return ok(hop, _named(looked_at))


def _named(contexts: Sequence[ContextFacts]) -> str:
    names = ", ".join(f'"{clip(one.name)}"' for one in contexts[:4])
    return f"context{'s' if len(contexts) > 1 else ''} {names}"


async def contexts(kubeconfig: Kubeconfig, state: StateDirectory) -> list[ContextFacts]:
    """Return our contexts, each with what listens at its port. Raises StateError for a file that cannot be read."""
    sections: dict[str, dict[str, dict[Any, Any]]] = {"clusters": {}, "users": {}, "contexts": {}}
    current = ""
    for file in kubeconfig.files:
        file.read()
        current = current or str(file.current_context or "")
        for section, entries in sections.items():
            for name, body in file.bodies(section):
                entries.setdefault(name, body)
    found: list[ContextFacts] = []
    for name, body in sections["contexts"].items():
        cluster = sections["clusters"].get(str(body.get("cluster")), {})
        if (mark := mark_of(body)) is None:
            continue
        server, plugin = str(cluster.get("server", "")), _plugin(sections["users"].get(str(body.get("user")), {}))
        starts = bool(plugin) and "--ended" not in (plugin.get("args") or [])
        facts = ContextFacts(
            name,
            str(mark.get("cluster", "")),
            _local_port(server),
            current=name == current,
            starts_itself=starts,
            plugin=str(plugin.get("command", "")),
            edited=server if starts and server != str((mark_of(cluster) or {}).get("server", server)) else "",
        )
        if facts.edited:
            found.append(facts)
        elif facts.port:
            found.append(await at_port(facts, state))
    return found


def _plugin(user: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the exec plugin of a user; empty where it has none."""
    plugin = user.get("exec")
    return plugin if isinstance(plugin, dict) else {}


async def at_port(facts: ContextFacts, state: StateDirectory) -> ContextFacts:
    """Return the same facts with what listens at the context's port."""
    listening, ours = await _look_at_port(facts.port, state.path / "local-ca" / "ca.crt")
    holder = port_holder(facts.port) if listening and not ours else ""
    return replace(facts, listening=listening, ours=ours, holder=holder)


async def kept_port(state: StateDirectory, relays: tuple[str, ...], cluster: str) -> ContextFacts | None:
    """Return what listens at the port that is kept for a cluster; None where none is kept."""
    try:
        if (port := state.kept_port(relays, cluster)) is not None:
            return await at_port(ContextFacts("", cluster, port), state)
    except StateError:
        pass  # the file is damaged
    return None


async def _look_at_port(port: int, ca_file: Path) -> tuple[bool, bool]:
    """Return whether something listens at a port of loopback, and whether it shows a certificate of this user's local
    CA."""
    try:
        sock = await connect(Address("127.0.0.1", port), deadline=LOCAL_DEADLINE, proxy=DIRECT)
    except ArcbridgeError:
        return False, False
    with sock:
        try:
            context = ssl.create_default_context(cafile=ca_file)
            async with asyncio.timeout(LOCAL_DEADLINE):
                await TlsPipe(sock, context, server_hostname="127.0.0.1").handshake()
        except (OSError, EOFError, TimeoutError):
            return True, False
    return True, True


def _local_port(server: str) -> int:
    """Return the port of a server on loopback; 0 for any other."""
    try:
        url = urlsplit(server)
        return (url.port or 0) if url.hostname in ("127.0.0.1", "localhost", "::1") else 0
    except ValueError:
        return 0
