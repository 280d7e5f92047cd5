"""A small made-up organisation: an issuer, a relay, an agent at an API server, clients; each a process of its own.

`make run` shows it to people, the end-to-end tests ask it questions, the benchmarks load it. Everything is started
the way an operator would: configuration files, a join token from `arcbridge --role relay token create`, the policy.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from arcbridge.client.credentials.login import REDIRECT_PORTS
from tests.support.issuer import Issuer
from tests.support.processes import ManagedProcess, run
from tests.support.stopping import Stopping

CLUSTER = "berlin-factory"
RELAY_AUDIENCE = "arcbridge-relay"
CLUSTER_AUDIENCE = "arcbridge-cluster"
HEAVY_USERS = """\
limits.requests_per_second = 1_000_000
limits.request_burst = 1_000_000
limits.bytes_per_second_to_cluster = 1_000_000_000_000
limits.bytes_per_second_to_user = 1_000_000_000_000
limits.bytes_per_day = 1_000_000_000_000_000_000
limits.apiserver_seats = 1_000
limits.connects_per_second = 100_000
limits.agent_connects_per_second = 100_000
limits.waiting_bytes = 268_435_456
limits.audit_bytes_per_second = 1_000_000_000
limits.streams = 100_000
"""
"""Settings of an agent at which one user makes the load of many: each limit counts, and none is reached."""


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


def fixed_port() -> int:
    """Reserve a free port of 127.0.0.1 for this process: no outgoing connection and no other test process gets it.

    A port of the usual kind may be taken as the near end of any connection while its server is down, even of one to
    that very port, which then is connected to itself.
    """
    setting = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(setting.read_text().split()[0]) if setting.exists() else 49_152
    low, high = (15_000, min(first, 32_768)) if first >= 17_000 else (61_000, 65_000)
    for port in random.sample(range(low, high), 200):
        if port in _reserved or port in REDIRECT_PORTS:
            continue
        reservation = socket.socket(socket.AF_UNIX)
        try:
            if sys.platform == "linux":
                reservation.bind(f"\0arcbridge-test-port-{port}")
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", port))
        except OSError:
            reservation.close()
            continue
        _reserved[port] = reservation
        return port
    raise RuntimeError(f"no free port of 127.0.0.1 between {low} and {high}")


@contextmanager
def login_ports() -> Iterator[None]:
    """Have the two ports at which a login of the executable waits for its browser: one test process at a time."""
    with socket.socket(socket.AF_UNIX) as held:
        deadline = time.monotonic() + 300  # who holds them may drive a browser, or an identity provider
        while sys.platform == "linux":
            try:
                held.bind("\0arcbridge-test-login")
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)  # between two attempts
        yield


_reserved: dict[int, socket.socket] = {}
"""Ports of this process. Each socket has an abstract name, which one process of a machine can have until it ends."""


def arcbridge(*args: str) -> list[str]:
    """The command line of the executable, run by this interpreter."""
    return [sys.executable, "-m", "arcbridge", *args]


class World(Stopping):
    """The organisation. Use as a context manager; `stop` ends every process and removes the directory.

    With `relays=N` there are N relays, each with a data directory and a registry of its own, over one CA; the agents
    and the clients are given them all. With `agents=N` there are N agents of the one cluster with one credential.
    `relay`, `agent` and what belongs to them are those of the first.
    """

    def __init__(
        self, api: ApiServer, *, cluster: str = CLUSTER, directory: Path | None = None, relays: int = 1, agents: int = 1
    ) -> None:
        self._own = directory is None
        self.directory = Path(tempfile.mkdtemp(prefix="arcbridge-world-")) if directory is None else directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self.cluster = cluster
        self.api = api
        self.processes: list[ManagedProcess] = []
        self.logs = self.directory / "logs"
        self.targets: dict[str, tuple[str, tuple[str, ...]]] = {}
        """TCP targets of the agent: name -> (address, groups that may use it)."""
        self.policy = '[[allow]]\ngroups = ["platform", "developers"]\nclusters = ["*"]\n'
        """Who may reach which cluster. Nothing else is allowed."""
        self.cluster_audience = CLUSTER_AUDIENCE
        """Audience of the tokens that the agents take; `{cluster}` stands for an agent's cluster."""
        self.agent_clusters = [cluster] * agents
        """The cluster of each agent. One of another cluster than the first's enrols by itself."""
        self.agent_settings = ""
        """Further settings of every agent, such as `resumption = false`: lines that belong to no section."""
        self.agent_audit = ""
        """Further settings of every agent in its section `audit`."""
        self.relay_settings = ""
        """The same for every relay."""
        self.relay_listens = [f"127.0.0.1:{fixed_port()}" for _ in range(relays)]
        """Where each relay listens."""
        self.agent_routes = list(self.relay_listens)
        """The address of each relay as agents are given it and as it is in dial requests; set it before `start`."""
        self.client_routes = list(self.relay_listens)
        """The address of each relay as clients are given it; what starts later uses what is here then."""
        self.relay_observes = [fixed_port() for _ in range(relays)]
        self.agent_observes = [fixed_port() for _ in range(agents)]
        self.relay_observe, self.agent_observe = self.relay_observes[0], self.agent_observes[0]
        """The ports of metrics and health of the first relay and of the first agent."""
        self.relay_config, self.agent_config = self.config_of("relay", 0), self.config_of("agent", 0)
        """The configuration files of the first relay and of the first agent."""
        self.audit_log = self.agent_config.parent / "audit.jsonl"
        """The first agent's audit log."""
        self.relay_prefixes: list[tuple[str, ...]] = [()] * relays
        """What each relay's command line begins with, such as `ip netns exec NAME`; the same for agents and clients."""
        self.agent_prefixes: list[tuple[str, ...]] = [()] * agents
        self.client_prefix: tuple[str, ...] = ()
        self.issuer: Issuer
        self._relays: dict[int, ManagedProcess] = {}
        self._agents: dict[int, ManagedProcess] = {}
        self.relay_pin = ""
        self._clients = 0

    @property
    def relays(self) -> list[ManagedProcess]:
        """The relays in order; each is the process that was started last."""
        return [self._relays[i] for i in range(len(self.relay_listens))]

    @property
    def agents(self) -> list[ManagedProcess]:
        """The agents in order; each is the process that was started last."""
        return [self._agents[i] for i in range(len(self.agent_observes))]

    @property
    def relay(self) -> ManagedProcess:
        """The first relay."""
        return self._relays[0]

    @relay.setter
    def relay(self, process: ManagedProcess) -> None:
        self._relays[0] = process

    @property
    def agent(self) -> ManagedProcess:
        """The first agent."""
        return self._agents[0]

    @agent.setter
    def agent(self, process: ManagedProcess) -> None:
        self._agents[0] = process

    @property
    def relay_port(self) -> int:
        """The first relay's port."""
        return int(self.relay_listens[0].rpartition(":")[2])

    @property
    def relay_url(self) -> str:
        """The first relay as clients are given it."""
        return f"https://{self.client_routes[0]}"

    def config_of(self, role: str, index: int) -> Path:
        """The configuration file of a relay or an agent."""
        return self.directory / (role if index == 0 else f"{role}-{index}") / f"{role}.toml"

    # -- starting ---------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start issuer, relays and agents in this order; each is ready when the next starts."""
        self.start_issuer()
        for index in range(len(self.relay_listens)):
            self.start_relay(index)
        for index in range(len(self.agent_observes)):
            self.start_agent(index)
        return self

    def start_issuer(self) -> None:
        """The organisation's OIDC issuer."""
        self.issuer = Issuer(self.directory / "issuer")

    def start_relay(self, index: int = 0, *, extra: str = "") -> ManagedProcess:
        """A relay on loopback, configured as config/relay.toml documents; again on the same port and data if it was
        there before. It is ready then."""
        config = self.config_of("relay", index)
        directory = config.parent
        directory.mkdir(exist_ok=True)
        if index and not (data := directory / "data").exists():
            data.mkdir(mode=0o700)
            for name in ("ca.key", "ca.crt"):  # as the operator does
                shutil.copy2(self.relay_config.parent / "data" / name, data / name)
        (directory / "authentication.yaml").write_text(self.authentication(RELAY_AUDIENCE))
        (directory / "policy.toml").write_text(self.policy)
        lines = [
            self.relay_settings,
            f'listen = "{self.relay_listens[index]}"',
            f'public_address = "{self.agent_routes[index]}"',
            'data_dir = "data"\nauthentication = "authentication.yaml"\npolicy = "policy.toml"',
            f'[observe]\nlisten = "127.0.0.1:{self.relay_observes[index]}"',
        ]
        config.write_text("\n".join([*lines, extra]))
        argv = [*self.relay_prefixes[index], *arcbridge("--role", "relay", "--config", str(config))]
        self._relays[index] = self._start(_numbered("relay", index), argv)
        self._relays[index].wait_for_url(f"http://127.0.0.1:{self.relay_observes[index]}/readyz", timeout=30)
        return self._relays[index]

    def kill_relay(self, index: int = 0) -> None:
        """Kill a relay (SIGKILL): it tells neither clients nor agents."""
        self._relays[index].kill()

    def stop_relay(self, index: int = 0) -> tuple[int, float]:
        """Stop a relay by SIGTERM alone; return its exit status and the seconds it took. Raises `ProcessFailed`."""
        began = time.monotonic()
        self._relays[index].signal(signal.SIGTERM)
        status = self._relays[index].wait(60)
        return status, time.monotonic() - began

    def join_token(self, cluster: str | None = None) -> tuple[str, str]:
        """Make a join token with the first relay's command; return it and the relay CA's pin."""
        words = ("--role", "relay", "token", "create", "--cluster", cluster or self.cluster)
        command = arcbridge(*words, "--config", str(self.relay_config), "-o", "json")
        done = run([*self.relay_prefixes[0], *command])
        answer = json.loads(done.stdout)
        self.relay_pin = answer["relay_ca_pin"]
        return answer["token"], answer["relay_ca_pin"]

    def start_agent(self, index: int = 0, *, extra: str = "", wait: bool = True) -> ManagedProcess:
        """An agent that enrols with a join token and reaches the API server with a credential of its own. Those after
        the first use what the first has enrolled, as the pods of a DaemonSet do."""
        config = self.config_of("agent", index)
        directory = config.parent
        directory.mkdir(exist_ok=True)
        cluster = self.agent_clusters[index]
        enrols = index == 0 or cluster != self.agent_clusters[0]
        if enrols or not self.relay_pin:
            token, _ = self.join_token(cluster)
            ((directory if enrols else self.agent_config.parent) / "join-token").write_text(token)
        audience = self.cluster_audience.replace("{cluster}", cluster)
        (directory / "authentication.yaml").write_text(self.authentication(audience))
        shared = "" if enrols else f"{self.agent_config.parent}/"
        lines = [
            self.agent_settings,
            f"relays = {json.dumps([f'https://{address}' for address in dict.fromkeys(self.agent_routes)])}",
            f'relay_ca_pin = "{self.relay_pin}"',
            f'join_token_file = "{shared}join-token"\nauthentication = "authentication.yaml"',
            f'[state]\ndirectory = "{shared}state"',
            f'[audit]\nfile = "audit.jsonl"\n{self.agent_audit}',
            f'[observe]\nlisten = "127.0.0.1:{self.agent_observes[index]}"',
            f'[kubernetes]\nserver = "{self.api.url}"',
        ]
        for key in ("ca_file", "token_file", "client_certificate_file", "client_key_file"):
            if (path := getattr(self.api, key)) is not None:
                lines.append(f'{key} = "{path}"')
        for name, (address, groups) in self.targets.items():
            lines += [f"[targets.{name}]", f'address = "{address}"', f"groups = {json.dumps(list(groups))}"]
        config.write_text("\n".join([*lines, extra]))
        argv = [*self.agent_prefixes[index], *arcbridge("--role", "agent", "--config", str(config))]
        self._agents[index] = self._start(_numbered("agent", index), argv)
        if wait:
            self.wait_for_agent(index)
        return self._agents[index]

    def wait_for_agent(self, index: int = 0) -> None:
        """Wait until an agent says that it is ready; where its API server does not listen, until it has a relay."""
        agent = self._agents[index]
        api = urlsplit(self.api.url)
        try:
            socket.create_connection((api.hostname or "", api.port or 443), timeout=5).close()
        except OSError:
            agent.wait_for_line("control connection up", timeout=30)
        else:
            agent.wait_for_url(f"http://127.0.0.1:{self.agent_observes[index]}/readyz", timeout=30)

    # -- people -----------------------------------------------------------------------------------------------------

    def token(self, user: User, audience: str, *, lifetime: int = 3600) -> str:
        """Return a token of the issuer for a person."""
        return self.issuer.mint(
            sub=user.name,
            aud=audience,
            lifetime=lifetime,
            groups=list(user.groups),
            email=user.email,
            email_verified=True,
        )

    def login_files(self, user: User, directory: Path, *, lifetime: int = 3600) -> tuple[Path, Path]:
        """Write files with a person's access token (for the relay) and id token (for the cluster)."""
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
        relays = [word for address in dict.fromkeys(self.client_routes) for word in ("--relay", f"https://{address}")]
        return [
            *("--role", "client", *relays, "--relay-ca-pin", self.relay_pin),
            *("--cluster", self.cluster, "--trust-first-use"),
            *("--access-token-file", str(access), "--id-token-file", str(identity)),
        ]

    def client_environment(self, user: User, directory: Path) -> dict[str, str]:
        """The same in variables, for one relay."""
        access, identity = self.login_files(user, directory)
        return {
            "ARCBRIDGE_RELAY": self.relay_url,
            "ARCBRIDGE_RELAY_CA_PIN": self.relay_pin,
            "ARCBRIDGE_ACCESS_TOKEN_FILE": str(access),
            "ARCBRIDGE_ID_TOKEN_FILE": str(identity),
            "ARCBRIDGE_TRUST_FIRST_USE": "true",
        }

    def login_arguments(self) -> list[str]:
        """The flags of a client whose person logs in at the issuer, by a code on another device."""
        return [
            *("--role", "client", "--relay", self.relay_url, "--relay-ca-pin", self.relay_pin),
            *("--cluster", self.cluster, "--trust-first-use"),
            *("--oidc-issuer-url", self.issuer.url, "--oidc-ca-file", str(self.issuer.ca_file)),
            *("--oidc-client-id", "cli", "--grant-type", "device-code"),
            *("--oidc-audience", RELAY_AUDIENCE, "--cluster-audience", CLUSTER_AUDIENCE),
        ]

    def approve(self, login: ManagedProcess, user: str = "alice") -> None:
        """Let a login by a code on another device end well."""
        self.issuer.approve(login.wait_for_line(r"enter the code (\S+)", timeout=30)[1], user)
        assert login.wait(30) == 0, login.tail()

    def start_client(
        self, user: User = ALICE, *extra: str, ready: bool = True, env: Mapping[str, str] | None = None
    ) -> Client:
        """Start a person's client with a home of its own; it is ready when it printed the line that tools parse."""
        directory = self._new_home(user)
        environment = self.client_env(directory, env)
        kubeconfig = directory / "kubeconfig"
        arguments = [*self.client_arguments(user, directory), "--file", str(kubeconfig), "--port", "0", *extra]
        argv = [*self.client_prefix, *arcbridge(*arguments)]
        process = self._start(f"client-{self._clients}", argv, env=environment)
        client = Client(process, kubeconfig, directory, env=environment)
        if ready:
            client.port = int(process.wait_for_line(r"Proxy is listening on port (\d+)", timeout=30)[1])
            process.wait_for_line(r"Start sending kubectl requests on '(.+)' context", timeout=30)
        return client

    def _new_home(self, user: User) -> Path:
        """Return the directory of a further client."""
        self._clients += 1
        return self.directory / f"client-{self._clients}-{user.name}"

    def client_env(self, directory: Path, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of a person whose home is `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        return {
            "HOME": str(directory),
            "XDG_STATE_HOME": str(directory / "state"),
            "XDG_CACHE_HOME": str(directory / "cache"),
            "XDG_CONFIG_HOME": str(directory / "config"),
            # Not the one of the user who runs the tests: each person has a background process of their own.
            "XDG_RUNTIME_DIR": "",
            "KUBECONFIG": "",
            **(env or {}),
        }

    def start_forward(self, name: str, user: User = ALICE, *extra: str) -> tuple[ManagedProcess, int]:
        """Start a person's `forward` of a TCP target; return the process and the local port."""
        directory = self._new_home(user)
        port = fixed_port()
        arguments = [*self.client_arguments(user, directory), *extra, "forward", name, "--listen", f"127.0.0.1:{port}"]
        argv = [*self.client_prefix, *arcbridge(*arguments)]
        process = self._start(f"forward-{self._clients}", argv, env=self.client_env(directory))
        process.wait_for_line(r"[Ff]orwarding", timeout=30)
        return process, port

    def start_pod_forward(self, *words: str, user: User = ALICE, ports: int = 1) -> tuple[ManagedProcess, list[int]]:
        """Start a person's `forward` of pods; return the process and its local ports."""
        directory = self._new_home(user)
        argv = [*self.client_prefix, *arcbridge(*self.client_arguments(user, directory), "forward", *words)]
        process = self._start(f"forward-{self._clients}", argv, env=self.client_env(directory))
        process.wait_for_line(r"Press Ctrl\+C", timeout=30)
        found = re.findall(r"Forwarding \S+:(\d+) to port", process.output("stdout"))
        assert len(found) == ports, process.tail()
        return process, [int(port) for port in found]

    def run_client(
        self, user: User, *arguments: str, check: bool = False, timeout: float = 30
    ) -> subprocess.CompletedProcess[str]:
        """Run one client command to its end."""
        directory = self._new_home(user)
        done = run(
            [*self.client_prefix, *arcbridge(*self.client_arguments(user, directory), *arguments)],
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
        """The agents' audit records so far of requests that are over.

        A caller has the end of an answer before its record is in the file: `reports.audited` waits for it.
        """
        return [record for record in self.audit_lines() if "outcome" in record]

    def audit_lines(self) -> list[dict[str, object]]:
        """All lines of the agents' audit logs so far, those of the chains included."""
        found: list[dict[str, object]] = []
        for index in range(len(self.agent_observes)):
            log = self.config_of("agent", index).parent / "audit.jsonl"
            text = log.read_bytes() if log.exists() else b""
            found += [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
        return found

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


def _numbered(name: str, index: int) -> str:
    """The first one has no number: its logs keep the name they have where there is only one."""
    return name if index == 0 else f"{name}-{index}"
