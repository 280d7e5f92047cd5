"""Reads what `forward` is to reach, as kubectl's port-forward spells it: TYPE/NAME, ports as [LOCAL:]REMOTE, addresses.

It knows the command line alone: whether a thing of that name exists, and has such a port, is for `workload`. Invariant:
what passes is safe within a path of the API server.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from arcbridge.errors import ConfigError
from arcbridge.settings.suggest import unknown

LOOPBACK = "localhost"
"""Both loopback addresses."""

_CORE, _APPS = "/api/v1", "/apis/apps/v1"
_KINDS = {
    "pods": (_CORE, ("pod", "po", "pods")),
    "services": (_CORE, ("svc", "service", "services")),
    "deployments": (_APPS, ("deploy", "deployment", "deployments")),
    "statefulsets": (_APPS, ("sts", "statefulset", "statefulsets")),
    "daemonsets": (_APPS, ("ds", "daemonset", "daemonsets")),
    "replicasets": (_APPS, ("rs", "replicaset", "replicasets")),
}
"""By the resource: its group, and the words for it."""
_RESOURCES = {word: resource for resource, (_, words) in _KINDS.items() for word in words}
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_PORT_NAME = re.compile(r"[a-zA-Z0-9]([-a-zA-Z0-9]{0,61}[a-zA-Z0-9])?")


@dataclass(frozen=True, slots=True)
class PortPair:
    """One local port and what it leads to."""

    local: int | None
    """0: any that is free. None: that of the remote one, which has a name."""
    remote: str
    """A number or a name."""


@dataclass(frozen=True, slots=True)
class PodTarget:
    """One thing with pods, and the ports that are to lead there."""

    resource: str
    name: str
    namespace: str
    ports: tuple[PortPair, ...]

    def __str__(self) -> str:
        return f"{_KINDS[self.resource][1][0]}/{self.name}"

    @property
    def collection(self) -> str:
        """The path of all things of its type in the namespace."""
        return f"{_KINDS[self.resource][0]}/namespaces/{self.namespace}/{self.resource}"


def is_kubernetes(words: Sequence[str]) -> bool:
    """Return whether words name things of Kubernetes, and not one target of the agent's settings."""
    return len(words) > 1 or any("/" in word for word in words)


def parse_targets(words: Sequence[str], namespace: str) -> list[PodTarget]:
    """Return the targets of a command line: each TYPE/NAME, and the ports behind it. Raises ConfigError.

    A first word without a type is a pod's name, as kubectl has it.
    """
    if not is_name(namespace):
        raise ConfigError(f"flag --namespace: {namespace[:64]!r} is not the name of a namespace")
    found: list[tuple[str, str, list[PortPair]]] = []
    for word in words:
        if "/" in word:
            found.append((*_thing(word), []))
        elif not found and is_name(word) and not word.isdigit():
            found.append(("pods", word, []))
        elif not found:
            raise ConfigError(f"{word[:64]!r}: what is to be reached comes first, as in `forward svc/NAME 8080:80`")
        else:
            found[-1][2].append(parse_ports(word))
    for resource, name, ports in found:
        if not ports:
            raise ConfigError(f"{_KINDS[resource][1][0]}/{name}: give its ports, as 8080:80, :80 or 80")
    locals_ = [pair.local for *_, ports in found for pair in ports if pair.local]
    for port in locals_:
        if locals_.count(port) > 1:
            raise ConfigError(f"the local port {port} was given twice; each leads to one place")
    return [PodTarget(resource, name, namespace, tuple(ports)) for resource, name, ports in found]


def _thing(word: str) -> tuple[str, str]:
    kind, _, name = word.partition("/")
    kind = kind.lower().partition(".")[0]  # deployment.apps, as kubectl prints it
    if kind not in _RESOURCES:
        raise ConfigError(unknown("TYPE", kind[:64], [words[0] for _, words in _KINDS.values()]))
    if not is_name(name):
        raise ConfigError(f"{word[:64]!r}: {name[:64]!r} is not a name of Kubernetes")
    return _RESOURCES[kind], name


def parse_ports(word: str) -> PortPair:
    """Return the ports of one word, as kubectl reads it. Raises ConfigError."""
    local, colon, remote = word.rpartition(":")
    number = port_number(remote)
    if (not number and not _PORT_NAME.fullmatch(remote)) or (remote.isdigit() and not number):
        raise ConfigError(f"{word[:64]!r}: {remote[:64]!r} is neither a port (1 to 65535) nor the name of one")
    if not colon:
        return PortPair(number or None, remote)
    if local not in ("", "0") and not port_number(local):
        raise ConfigError(f"{word[:64]!r}: {local[:64]!r} is not a local port; give 1 to 65535, or none for a free one")
    return PortPair(port_number(local), remote)


def parse_addresses(texts: Sequence[str]) -> list[str]:
    """Return where the local ports listen, as kubectl takes it: with commas, or repeated. Raises ConfigError."""
    found = list(dict.fromkeys(address for text in texts for address in text.split(",")))
    for address in found:
        try:
            if address != LOOPBACK:
                ipaddress.ip_address(address)
        except ValueError as error:
            raise ConfigError(f"flag --address: {address[:64]!r} is no IP address; give one, or {LOOPBACK}") from error
    return found


def port_number(text: str) -> int:
    """Return the port that a text is; 0 for what is none."""
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0
    return number if number < 65536 else 0


def is_name(text: str) -> bool:
    """Return whether a text can be the name of a thing or a namespace of Kubernetes."""
    return _NAME.fullmatch(text) is not None
