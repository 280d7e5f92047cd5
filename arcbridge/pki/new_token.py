"""A join token as it is shown once, with the shell lines that give it to a cluster's agents.

It makes and keeps no token. Invariant: in no line is the token an argument, which every user of that machine could read
(docs/threats.md#W4), and what stands in a line is quoted for the shell.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from arcbridge.errors import ConfigError


@dataclass(frozen=True, slots=True)
class NewToken:
    """A join token with what an agent needs besides."""

    id: str
    token: str = field(repr=False)
    cluster: str
    uses: int
    expires_at: float
    relay: str
    """`https://host:port`."""
    relay_ca_pin: str
    """Empty when the relay's certificate comes from elsewhere (`[tls]`): the pin of our CA says nothing about it."""
    command: str = field(repr=False)
    """Shell lines to paste: on the agent's machine where it was said how that reaches the API server, else where
    kubectl reaches the cluster, for the Helm chart. The token goes into a file and not into an argument list, which
    every user of that machine could read."""
    in_cluster: bool = False
    """Whether `command` is for the Helm chart."""

    @classmethod
    def of(
        cls, token: str, *, cluster: str, uses: int, expires_at: float, relay: str, pin: str, kubernetes: list[str]
    ) -> Self:
        """Return a token with its command. `kubernetes`: see `api_server_arguments`; empty: for the chart."""
        command = (
            _agent_command(token, cluster, relay, pin, kubernetes)
            if kubernetes
            else _chart_command(token, cluster, relay, pin)
        )
        return cls(token.partition(".")[0], token, cluster, uses, expires_at, relay, pin, command, not kubernetes)


API_SERVER_FLAGS = (
    "kube_server",
    "kube_ca_file",
    "kube_token_file",
    "kube_client_certificate_file",
    "kube_client_key_file",
)
"""How an agent on a machine that is no pod reaches its API server: flags of the command, which are also the agent's."""


def api_server_arguments(given: Mapping[str, str]) -> list[str]:
    """Return the agent's flags for values of `API_SERVER_FLAGS`; empty where none was given. Raises `ConfigError` that
    says which one is missing."""
    if not any(given.values()):
        return []
    if not given["kube_server"]:
        raise ConfigError("--kube-server is missing: https://host:port of the cluster's API server, for the agent")
    if not given["kube_token_file"] and not (given["kube_client_certificate_file"] and given["kube_client_key_file"]):
        raise ConfigError(
            "the agent needs a credential at the API server: give --kube-token-file, or "
            "--kube-client-certificate-file with --kube-client-key-file, as they are on its machine"
        )
    return [word for name, value in given.items() if value for word in (f"--{name.replace('_', '-')}", value)]


def _agent_command(token: str, cluster: str, relay: str, pin: str, kubernetes: list[str]) -> str:
    """Return what starts an agent on a machine that is no pod."""
    file, state = f"arcbridge-{cluster}.token", f"./arcbridge-{cluster}"
    arguments = ["arcbridge", "--role", "agent", "--relay", relay]
    if pin:
        arguments += ["--relay-ca-pin", pin]
    arguments += ["--join-token-file", file, "--state-dir", state, *kubernetes]
    return f"{_token_file(token, file)}\n{shlex.join(arguments)}"


def _chart_command(token: str, cluster: str, relay: str, pin: str) -> str:
    """Return what gives the token, the relay and its pin to the Helm chart; whose tokens count is left to a values
    file."""
    file = f"arcbridge-{cluster}.token"
    secret = [*_KUBECTL, "create", "secret", "generic", "arcbridge-join-token", f"--from-file=token={file}"]
    helm = ["helm", "install", "arcbridge-agent", "config/helm/arcbridge-agent", "--namespace", "arcbridge"]
    helm += ["--create-namespace", "--set", f"relays={{{relay}}}"]
    if pin:
        helm += ["--set", f"relayCAPin={pin}"]
    helm += ["-f", "values.yaml"]
    return "\n".join(
        (_token_file(token, file), "kubectl create namespace arcbridge", shlex.join(secret), shlex.join(helm))
    )


_KUBECTL = ("kubectl", "--namespace", "arcbridge")


def _token_file(token: str, file: str) -> str:
    return f"(umask 077; printf '%s\\n' {shlex.quote(token)} > {shlex.quote(file)})"
