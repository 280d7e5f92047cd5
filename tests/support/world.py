"""A small made-up organisation: an issuer, a relay, an agent at an API server, clients; each a process of its own.

`make run` shows it to people, the end-to-end tests ask it questions, the benchmarks load it. Everything is started
the way an operator would: configuration files, a join token from `arcbridge --role relay token create`, the policy.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.issuer import Issuer
from tests.support.processes import ManagedProcess, run

CLUSTER = "berlin-factory"
RELAY_AUDIENCE = "arcbridge-relay"
CLUSTER_AUDIENCE = "arcbridge-cluster"


@dataclass(frozen=True, slots=True)
class User:
    """A person of the organisation."""

    name: str
    groups: tuple[str, ...] = ()

    @property
    def email(self) -> str:
        """What the API server knows the person by."""
        return f"{self.name}@example.com"


ALICE = User("alice", ("platform",))
BOB = User("bob", ("developers",))
MALLORY = User("mallory", ("interns",))


@dataclass(frozen=True, slots=True)
class ApiServer:
    """How the agent reaches an API server: a URL, its CA, and a token or a client certificate of its own."""

    url: str
    ca_file: Path | None = None
    token_file: Path | None = None
    client_certificate_file: Path | None = None
    client_key_file: Path | None = None


@dataclass(slots=True)
class Client:
    """One client process and the kubeconfig it saved."""

    process: ManagedProcess
    kubeconfig: Path
    directory: Path
    port: int = 0
    env: dict[str, str] = field(default_factory=dict)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def arcbridge(*args: str) -> list[str]:
    """The command line of the executable, run by this interpreter."""
    return [sys.executable, "-m", "arcbridge", *args]


class World:
    """The organisation. Use as a context manager; `stop` ends every process and removes the directory."""

    def __init__(self, api: ApiServer, *, cluster: str = CLUSTER, directory: Path | None = None) -> None:
        self._own = directory is None
        self.directory = Path(tempfile.mkdtemp(prefix="arcbridge-world-")) if directory is None else directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self.cluster = cluster
        self.api = api
        self.processes: list[ManagedProcess] = []
        self.logs = self.directory / "logs"
        self.targets: dict[str, tuple[str, tuple[str, ...]]] = {}
        """TCP targets of the agent: name -> (address, groups that may use it)."""
        self.policy = textwrap.dedent(
            """\
            # Who may reach which cluster. Nothing else is allowed.
            [[allow]]
            groups = ["platform", "developers"]
            clusters = ["*"]
            """
        )
        self.relay_port = free_port()
        self.relay_observe = free_port()
        self.agent_observe = free_port()
        self.issuer: Issuer
        self.relay: ManagedProcess
        self.agent: ManagedProcess
        self.relay_pin = ""
        self._clients = 0

    @property
    def relay_url(self) -> str:
        """What agents and clients are given."""
        return f"https://127.0.0.1:{self.relay_port}"

    @property
    def relay_config(self) -> Path:
        """The relay's configuration file."""
        return self.directory / "relay" / "relay.toml"

    @property
    def agent_config(self) -> Path:
        """The agent's configuration file."""
        return self.directory / "agent" / "agent.toml"

    @property
    def audit_log(self) -> Path:
        """The agent's audit log."""
        return self.directory / "agent" / "audit.jsonl"

    # -- starting ---------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Issuer, relay, agent, in this order; each is ready when the next starts."""
        self.start_issuer()
        self.start_relay()
        self.start_agent()
        return self

    def start_issuer(self) -> None:
        """The organisation's OIDC issuer."""
        self.issuer = Issuer(self.directory / "issuer")

    def start_relay(self, *, extra: str = "") -> ManagedProcess:
        """A relay on loopback, configured as config/relay.toml documents."""
        directory = self.relay_config.parent
        directory.mkdir(exist_ok=True)
        (directory / "authentication.yaml").write_text(self.authentication(RELAY_AUDIENCE))
        (directory / "policy.toml").write_text(self.policy)
        self.relay_config.write_text(
            textwrap.dedent(
                f"""\
                listen = "127.0.0.1:{self.relay_port}"
                public_address = "127.0.0.1:{self.relay_port}"
                data_dir = "data"
                authentication = "authentication.yaml"
                policy = "policy.toml"

                [observe]
                listen = "127.0.0.1:{self.relay_observe}"
                """
            )
            + extra
        )
        self.relay = self._start("relay", arcbridge("--role", "relay", "--config", str(self.relay_config)))
        self.relay.wait_for_url(f"http://127.0.0.1:{self.relay_observe}/readyz", timeout=30)
        return self.relay

    def join_token(self, cluster: str | None = None) -> tuple[str, str]:
        """A join token for the cluster and the relay CA's pin, from the relay's own command."""
        done = run(
            arcbridge(
                *("--role", "relay", "token", "create", "--cluster", cluster or self.cluster),
                *("--config", str(self.relay_config), "-o", "json"),
            ),
        )
        answer = json.loads(done.stdout)
        self.relay_pin = answer["relay_ca_pin"]
        return answer["token"], answer["relay_ca_pin"]

    def start_agent(self, *, extra: str = "") -> ManagedProcess:
        """An agent that enrols with a join token and reaches the API server with a credential of its own."""
        directory = self.agent_config.parent
        directory.mkdir(exist_ok=True)
        token, pin = self.join_token()
        (directory / "join-token").write_text(token)
        (directory / "authentication.yaml").write_text(self.authentication(CLUSTER_AUDIENCE))
        api = self.api
        lines = [f'server = "{api.url}"']
        for key in ("ca_file", "token_file", "client_certificate_file", "client_key_file"):
            if (path := getattr(api, key)) is not None:
                lines.append(f'{key} = "{path}"')
        for name, (address, groups) in self.targets.items():
            lines += [f"[targets.{name}]", f'address = "{address}"', f"groups = {json.dumps(list(groups))}"]
        kubernetes = "\n".join(lines)
        self.agent_config.write_text(
            textwrap.dedent(
                f"""\
                relays = ["{self.relay_url}"]
                relay_ca_pin = "{pin}"
                join_token_file = "join-token"
                authentication = "authentication.yaml"

                [state]
                directory = "state"

                [audit]
                file = "audit.jsonl"

                [observe]
                listen = "127.0.0.1:{self.agent_observe}"

                [kubernetes]
                """
            )
            + kubernetes
            + "\n"
            + extra
        )
        self.agent = self._start("agent", arcbridge("--role", "agent", "--config", str(self.agent_config)))
        self.agent.wait_for_url(f"http://127.0.0.1:{self.agent_observe}/readyz", timeout=30)
        return self.agent

    # -- people -----------------------------------------------------------------------------------------------------

    def token(self, user: User, audience: str, *, lifetime: int = 3600) -> str:
        """A token of the issuer for a person."""
        return self.issuer.mint(
            sub=user.name,
            aud=audience,
            lifetime=lifetime,
            groups=list(user.groups),
            email=user.email,
            email_verified=True,
        )

    def login_files(self, user: User, directory: Path, *, lifetime: int = 3600) -> tuple[Path, Path]:
        """Files with a person's access token (for the relay) and id token (for the cluster)."""
        directory.mkdir(parents=True, exist_ok=True)
        access, identity = directory / "access-token", directory / "id-token"
        for path, audience in ((access, RELAY_AUDIENCE), (identity, CLUSTER_AUDIENCE)):
            temporary = path.with_suffix(".new")
            temporary.write_text(self.token(user, audience, lifetime=lifetime))
            os.replace(temporary, path)
        return access, identity

    def client_arguments(self, user: User, directory: Path) -> list[str]:
        """The flags that a person's client needs."""
        access, identity = self.login_files(user, directory)
        return [
            *("--role", "client", "--relay", self.relay_url, "--relay-ca-pin", self.relay_pin),
            *("--cluster", self.cluster, "--trust-first-use"),
            *("--access-token-file", str(access), "--id-token-file", str(identity)),
        ]

    def start_client(
        self, user: User = ALICE, *extra: str, ready: bool = True, env: Mapping[str, str] | None = None
    ) -> Client:
        """A person's client with a home of its own; ready when the line that tools parse was printed."""
        self._clients += 1
        directory = self.directory / f"client-{self._clients}-{user.name}"
        environment = self.client_env(directory, env)
        kubeconfig = directory / "kubeconfig"
        arguments = [*self.client_arguments(user, directory), "--file", str(kubeconfig), "--port", "0", *extra]
        process = self._start(f"client-{self._clients}", arcbridge(*arguments), env=environment)
        client = Client(process, kubeconfig, directory, env=environment)
        if ready:
            client.port = int(process.wait_for_line(r"Proxy is listening on port (\d+)", timeout=30)[1])
            process.wait_for_line(r"Start sending kubectl requests on '(.+)' context", timeout=30)
        return client

    def client_env(self, directory: Path, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of a person whose home is `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        return {
            "HOME": str(directory),
            "XDG_STATE_HOME": str(directory / "state"),
            "XDG_CACHE_HOME": str(directory / "cache"),
            "XDG_CONFIG_HOME": str(directory / "config"),
            "KUBECONFIG": "",
            **(env or {}),
        }

    def start_forward(self, name: str, user: User = ALICE, *extra: str) -> tuple[ManagedProcess, int]:
        """A person's `forward` of a TCP target; the process and the local port."""
        self._clients += 1
        directory = self.directory / f"client-{self._clients}-{user.name}"
        port = free_port()
        arguments = [*self.client_arguments(user, directory), *extra, "forward", name, "--listen", f"127.0.0.1:{port}"]
        process = self._start(f"forward-{self._clients}", arcbridge(*arguments), env=self.client_env(directory))
        process.wait_for_line(r"[Ff]orwarding", timeout=30)
        return process, port

    def run_client(
        self, user: User, *arguments: str, check: bool = False, timeout: float = 30
    ) -> subprocess.CompletedProcess[str]:
        """One client command to its end."""
        self._clients += 1
        directory = self.directory / f"client-{self._clients}-{user.name}"
        done = run(
            arcbridge(*self.client_arguments(user, directory), *arguments),
            env={**os.environ, **self.client_env(directory)},
            check=check,
            timeout=timeout,
        )
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    # -- looking ----------------------------------------------------------------------------------------------------

    def authentication(self, audience: str) -> str:
        """An AuthenticationConfiguration that trusts the issuer for one audience."""
        return json.dumps(
            {
                "apiVersion": "apiserver.config.k8s.io/v1",
                "kind": "AuthenticationConfiguration",
                "jwt": [
                    {
                        "issuer": {
                            "url": self.issuer.url,
                            "certificateAuthority": Path(self.issuer.ca_file).read_text(),
                            "audiences": [audience],
                        },
                        "claimMappings": {
                            "username": {"claim": "email", "prefix": ""},
                            "groups": {"claim": "groups", "prefix": ""},
                        },
                    }
                ],
            },
            indent=2,
        )

    def audit_records(self) -> list[dict[str, object]]:
        """The agent's audit records so far."""
        if not self.audit_log.exists():
            return []
        text = self.audit_log.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    # -- ending -----------------------------------------------------------------------------------------------------

    def _start(self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> ManagedProcess:
        process = ManagedProcess(argv, log_dir=self.logs, name=name, env=env)
        self.processes.append(process)
        return process

    def stop(self) -> None:
        """End every process that is still there and remove the directory, if it was made here."""
        for process in reversed(self.processes):
            process.stop()
        self.processes.clear()
        if hasattr(self, "issuer"):
            self.issuer.stop()
        if self._own:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
