"""Reads of a service, a workload or a pod which pods are behind it, and which port of a pod is meant.

Pure: documents of the API server in, small facts out; of a document nothing else is kept. Invariants: a document of
another shape raises ValueError, and a pod's name is safe within a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from arcbridge.client.serving.pod_ports.target import PodTarget, is_name, port_number
from arcbridge.errors import ConfigError

MAX_PORTS = 256
"""Ports of one pod or service that are kept."""


class NoSuchPort(ConfigError):
    """The port that was asked for does not exist; the message says which do."""


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod, as far as a forward needs it."""

    name: str
    uid: str
    created: str
    """RFC 3339, so that texts compare as times do."""
    running: bool
    ready: bool
    ending: bool
    """It was deleted, and still finishes what it has begun."""
    over: bool
    """All its containers have ended."""
    ports: Mapping[str, int]
    """Its TCP ports that have names."""

    @classmethod
    def of(cls, document: Any) -> Pod:
        """Read a pod. Raises ValueError."""
        try:
            metadata, status = document["metadata"], document.get("status") or {}
            name, phase = metadata["name"], status.get("phase")
            if not is_name(name):
                raise ValueError("a pod without a name")
            ready = any(one["type"] == "Ready" and one["status"] == "True" for one in status.get("conditions") or ())
            return cls(
                name,
                str(metadata.get("uid", ""))[:64],
                str(metadata.get("creationTimestamp", ""))[:64],
                phase == "Running",
                ready,
                bool(metadata.get("deletionTimestamp")),
                phase in ("Succeeded", "Failed"),
                _named_ports(document.get("spec") or {}),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("a pod of an unknown shape") from error

    def usable(self, *, unready: bool) -> bool:
        """Return whether new connections may go here; `unready`: also before it is ready."""
        return self.running and not self.ending and (self.ready or unready)


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One TCP port of a service."""

    number: int
    name: str
    target: str
    """Number or name of the pods' port."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A thing with pods behind it."""

    target: PodTarget
    selector: str
    """Which pods: a label selector; empty for a pod itself."""
    unready: bool
    """Whether pods that are not ready are meant as well: of a pod that was named, and of a service that says so."""
    service: tuple[ServicePort, ...] | None
    """The ports of a service; None for all else."""
    ports: Mapping[str, int]
    """The ports of its pods, by name, as its template has them."""

    @classmethod
    def of(cls, target: PodTarget, document: Any) -> Workload:
        """Read a thing of the target's type. Raises ValueError, NoSuchPort for a service of no pods."""
        try:
            spec = document.get("spec") or {}
            if target.resource == "pods":
                return cls(target, "", True, None, _named_ports(spec))
            if target.resource == "services":
                labels = spec.get("selector") or {}
                if not labels:
                    raise NoSuchPort(f"{target} selects no pods: it has no selector, and leads elsewhere")
                headless = spec.get("clusterIP") == "None"
                ports = tuple(
                    _service_port(one, headless) for one in (spec.get("ports") or ())[:MAX_PORTS] if _is_tcp(one)
                )
                unready = spec.get("publishNotReadyAddresses") is True
                return cls(target, _equalities(labels), unready, ports, {})
            template = (spec.get("template") or {}).get("spec") or {}
            return cls(target, _selector(spec["selector"]), False, None, _named_ports(template))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{target} has an unknown shape") from error

    def number(self, remote: str) -> int:
        """Return the number of a port that was asked for, as the thing itself has it. Raises NoSuchPort."""
        if self.service is not None:
            return self._service_port(remote).number
        if number := port_number(remote) or self.ports.get(remote, 0):
            return number
        raise NoSuchPort(f"{self.target} has no TCP port {remote!r}; {_there_are(self.ports)}")

    def port_of(self, remote: str, pod: Pod) -> int:
        """Return the port of a pod that is meant. Raises NoSuchPort."""
        name = remote if self.service is None else self._service_port(remote).target
        if number := port_number(name) or pod.ports.get(name, 0):
            return number
        raise NoSuchPort(f"pod {pod.name} has no TCP port {name!r}; {_there_are(pod.ports)}")

    def _service_port(self, remote: str) -> ServicePort:
        number = port_number(remote)
        for one in self.service or ():
            if one.number == number or (not number and one.name == remote):
                return one
        there = {one.name or str(one.number): one.number for one in self.service or ()}
        raise NoSuchPort(f"{self.target} has no TCP port {remote!r}; {_there_are(there)}")


def _there_are(ports: Mapping[str, int]) -> str:
    shown = [f"{number} ({name})" if name != str(number) else name for name, number in list(ports.items())[:20]]
    return f"it has {', '.join(shown)}" if shown else "it names none"


def _is_tcp(port: Any) -> bool:
    return bool(port.get("protocol", "TCP") == "TCP")


def _named_ports(spec: Any) -> dict[str, int]:
    """Return the TCP ports of a pod's containers that have names; sidecars are containers that start earlier."""
    containers = [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]
    ports = [port for one in containers for port in one.get("ports") or () if _is_tcp(port) and port.get("name")]
    return {str(port["name"])[:63]: _port(port["containerPort"]) for port in ports[:MAX_PORTS]}


def _port(number: Any) -> int:
    if not isinstance(number, int) or not 0 < number < 65536:
        raise ValueError("a port is 1 to 65535")
    return number


def _service_port(port: Any, headless: bool) -> ServicePort:
    number = _port(port["port"])
    target = number if headless else port.get("targetPort") or number
    return ServicePort(number, str(port.get("name", ""))[:63], str(target)[:63])


def _equalities(labels: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def _selector(selector: Any) -> str:
    """Return a LabelSelector as the API server takes it in a query."""
    parts = [_equalities(selector["matchLabels"])] if selector.get("matchLabels") else []
    for one in selector.get("matchExpressions") or ():
        key, operator, values = one["key"], one["operator"], ",".join(one.get("values") or ())
        forms = {
            "In": f"{key} in ({values})",
            "NotIn": f"{key} notin ({values})",
            "Exists": key,
            "DoesNotExist": f"!{key}",
        }
        parts.append(forms[operator])
    if not parts:
        raise ValueError("a selector that selects everything")
    return ",".join(parts)
