"""docs/threats.md#O1: secrets come out nowhere. One run of all roles, in which each secret is known to the test.

`Run` drives the roles through success and through every kind of failure, at log level debug, with asyncio's debug mode
and with faulthandler, and ends them by SIGTERM, SIGABRT and SIGSEGV. What came out is collected under a name each: the
output of every process and command, metrics and health pages, what /proc shows to all, and every file that was written.
Then it is searched for every secret, whole or in pieces of 16 characters, as it is or encoded. `WRITTEN` is the list of
all files that a role writes, and of what may be in each; a file that is not on the list fails the test.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import signal
import socket
import ssl
import stat
import tarfile
import threading
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from arcbridge.pki.chain import load_chain
from tests.support.canaries import Canaries, install_recorder
from tests.support.cluster import KUBECTL_MINORS, Cluster
from tests.support.processes import ManagedProcess
from tests.support.reports import page, until
from tests.support.world import (
    ALICE,
    CLUSTER_AUDIENCE,
    RELAY_AUDIENCE,
    ApiServer,
    World,
    arcbridge,
    fixed_port,
    login_ports,
)

# The run comes before the first test: a hundred processes, one after the other on a small machine.
pytestmark = pytest.mark.timeout(400)

NAMESPACE = "canaries"

WRITTEN: dict[str, tuple[str, ...]] = {
    # The relay.
    r"relay/data/ca\.key": ("key",),
    r"relay/data/(ca\.crt|server\.crt|\.?lock|.*\.lock|[a-z]+\.lock)": (),
    r"relay/data/(server\.key|tls\.key)": ("key",),
    r"relay/data/audit\.jsonl": (),
    r"relay/data/registry\.(db|sqlite)(-wal|-shm)?": (),
    # The agent: its certificate's key, the cluster's CA key; all that it records.
    r"agent/state/[a-z.-]+\.json": ("key",),
    r"agent/state/\.?[a-z.-]*lock": (),
    r"agent/audit\.jsonl": (),
    # The client: its kubeconfig has its own key, and the bearer that it was given for that.
    r"[a-z0-9-]+/kubeconfig": ("key", "bearer"),
    r"[a-z0-9-]+/kubeconfig\.(lock|before-arcbridge)": (),
    r"[a-z0-9-]+/state/arcbridge/local-ca/ca\.key": ("key",),
    r"[a-z0-9-]+/state/arcbridge/clusters/[a-z-]+@[0-9a-f]+\.json": ("key",),
    r"[a-z0-9-]+/state/arcbridge/(local-ca/ca\.crt|pins\.toml|ports\.json|.*\.?lock)": (),
    r"[a-z0-9-]+/state/arcbridge/(kubeconfigs\.json|running/[0-9a-f-]+)": (),
    r"[a-z0-9-]+/cache/arcbridge/tokens/[0-9a-f]+\.json": ("login",),
    r"[a-z0-9-]+/cache/arcbridge/tokens/[0-9a-f]+\.key": ("proof-key",),
    r"[a-z0-9-]+/cache/arcbridge/(tokens/[0-9a-f]+\.lock|clusters|.*\.lock)": (),
}
"""Every file that a role writes, by its path in the run's directory, and the kinds of secrets that belong there."""

GIVEN = re.compile(
    r"(issuer/.*|inputs/.*|recorder/.*|records/.*|logs/.*|.*/join-token|(relay|agent)/[a-z]+\.(toml|yaml)"
    r"|[a-z0-9-]+/(access|id)-token|kubectl/.*)"
)
"""Files that the test has made; `logs` is looked at as output."""


class Run:
    """The run: what it used (`canaries`), and all that came out (`outputs`)."""

    def __init__(self, directory: Path, cluster: Cluster, api: ApiServer) -> None:
        self.directory = directory
        self.cluster = cluster
        self.world = World(api, directory=directory)
        self.canaries = Canaries()
        self.outputs: dict[str, bytes] = {}
        self.inputs = directory / "inputs"
        self.inputs.mkdir()
        self.working = directory / "cwd"
        """The directory in which every process begins, and leaves what it leaves."""
        self.working.mkdir()
        self.temporary = directory / "temporary"
        self.temporary.mkdir()

    def secret(self, name: str) -> str:
        """A secret that looks like nothing: no pattern would redact it."""
        value = secrets.token_hex(16)
        self.canaries.add(name, value)
        return value

    def token(self, name: str, audience: str, **claims: Any) -> str:
        value = self.world.issuer.mint(
            sub="alice", aud=audience, email=ALICE.email, email_verified=True, groups=["platform"], **claims
        )
        self.canaries.add(name, value)
        return value

    def file(self, name: str, text: str) -> Path:
        path = self.inputs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def command(self, name: str, *words: str, env: dict[str, str] | None = None, input: bytes | None = None) -> None:
        """Run a command of a role to its end and keep what it wrote. One that serves is ended by SIGTERM."""
        home = self.directory / f"home-{name}"
        # asyncio's debug mode is for the processes that serve: it doubles the time of a start.
        environment = {**self.world.client_env(home), "PYTHONASYNCIODEBUG": "", **(env or {})}
        with ManagedProcess(
            arcbridge(*words),
            log_dir=self.world.logs,
            name=f"command-{name}",
            env=environment,
            cwd=self.working,
            stdin=input is not None,
        ) as process:
            if input is not None:
                process.send(input)
                process.close_stdin()
            until(lambda: not process.running or "Press Ctrl" in process.output(), f"{name} ends or serves", timeout=60)
        self.outputs[f"command {name}"] = process.output().encode()

    def client(self, name: str, *words: str, **options: Any) -> None:
        """Run a client's command with Alice's login, which further flags may replace."""
        arguments = self.world.client_arguments(ALICE, self.directory / f"home-{name}")
        self.command(name, *arguments, *words, **options)

    # -- what is done -------------------------------------------------------------------------------------------------

    def honest(self) -> None:
        """Requests that work: Secrets, a command in a pod, a token in a query."""
        world, observe = self.world, fixed_port()
        self.observe = observe
        self.alice = world.start_client(ALICE, "--observe-listen", f"127.0.0.1:{observe}")
        self.alice.process.wait_for_line("Press Ctrl")
        kubectl = self.cluster.kubectl_for(KUBECTL_MINORS[0], self.alice.kubeconfig)
        self.cluster.ensure_namespace(NAMESPACE)
        until(lambda: kubectl.run("get", "--raw", "/version", check=False).returncode == 0, "kubectl works", timeout=40)
        body = self.secret("body/secret")
        kubectl.run("-n", NAMESPACE, "create", "secret", "generic", "canary", f"--from-literal=key={body}")
        kubectl.run("-n", NAMESPACE, "get", "secret", "canary", "-o", "yaml")
        kubectl.run("-n", NAMESPACE, "delete", "secret", "canary")
        kubectl.run("get", "--raw", f"/api/v1/namespaces?token={self.secret('query/token')}", check=False)
        kubectl.run("get", "--raw", f"/{self.secret('query/path')}?a={self.secret('query/value')}", check=False)
        self.cluster.add_pod("canary", NAMESPACE)
        told = self.secret("command/exec")
        done = kubectl.run("-n", NAMESPACE, "exec", "canary", "--", "sh", "-c", f"echo begins; test {told}; echo ends")
        assert "begins" in done.stdout
        kubectl.run("-n", NAMESPACE, "exec", "canary", "--", self.secret("command/no-such-program"), check=False)
        kubectl.run("-n", NAMESPACE, "exec", "no-such-pod", "--", self.secret("command/no-such-pod"), check=False)

    def bearers(self) -> None:
        """A ServiceAccount's token in each way to give one."""
        for name in ("file", "stdin", "environment", "argument"):
            bearer = self.cluster.service_account_token(NAMESPACE, f"canary-{name}")
            self.canaries.add(f"bearer/{name}", bearer)
            if name == "file":
                path = self.file("bearer", bearer)
                self.robot = self.world.start_client(ALICE, "--token-file", str(path))
                self.robot.process.wait_for_line("Press Ctrl")
                self.cluster.kubectl_for(KUBECTL_MINORS[0], self.robot.kubeconfig).run("auth", "whoami", check=False)
            elif name == "stdin":
                self.client("bearer-stdin", "--token", "-", "doctor", input=bearer.encode() + b"\n")
            elif name == "environment":
                self.holder = self.world.start_client(ALICE, env={"ARCBRIDGE_TOKEN": bearer})
                self.holder.process.wait_for_line("Press Ctrl")
            else:
                self.client("bearer-argument", "--token", bearer, "doctor")

    def logins(self) -> None:
        """Both grants, a refresh, and the token's use."""
        world = self.world
        world.issuer.settings(auto_login=ALICE.name)
        ca_file = str(self.file("issuer.pem", Path(world.issuer.ca_file).read_text()))
        for grant in ("device-code", "authcode"):
            home = self.directory / f"home-{grant}"
            arguments = [
                *("--role", "client", "--relay", world.relay_url, "--relay-ca-pin", world.relay_pin),
                *("--oidc-issuer-url", world.issuer.url, "--oidc-client-id", "cli", "--oidc-ca-file", ca_file),
                *("--grant-type", grant),
            ]
            env = {**world.client_env(home), "BROWSER": "/bin/false", "DISPLAY": None}
            with (
                login_ports(),
                ManagedProcess(
                    arcbridge(*arguments, "login", "--wait", "100s"),
                    log_dir=world.logs,
                    name=f"login-{grant}",
                    env=env,
                    cwd=self.working,
                ) as login,
            ):
                if grant == "device-code":
                    world.issuer.approve(login.wait_for_line(r"enter the code (\S+)", timeout=30)[1])
                else:
                    url = login.wait_for_line(r"To log in, open (\S+)", timeout=30)[1]
                    _, location = world.issuer.request("GET", url.partition(world.issuer.url)[2])
                    code = re.search(r"code=([^&]+)", location)
                    port = re.search(r":(\d+)/?\?", location)
                    assert code is not None
                    assert port is not None
                    self.canaries.add("login/code", code[1])
                    with socket.create_connection(("127.0.0.1", int(port[1]))) as browser:
                        browser.sendall(f"GET /?{location.partition('?')[2]} HTTP/1.1\r\n\r\n".encode())
                        browser.recv(1000)
                assert login.wait(30) == 0, login.tail()
            (kept,) = (home / "cache/arcbridge/tokens").glob("*.json")
            for name, token in json.loads(kept.read_text()).items():
                if name.endswith("_token") and isinstance(token, str) and token:
                    self.canaries.add(f"login/{grant}-{name}", token)
            for path in (home / "cache/arcbridge/tokens").glob("*.key"):
                self.canaries.add(f"proof-key/{grant}", json.loads(path.read_text())["d"])
            self.command(f"{grant}", *arguments, "clusters", env={"BROWSER": "/bin/false"})
        world.issuer.settings(auto_login="")

    def bad_tokens(self) -> list[Callable[[], object]]:
        """Tokens that are refused, and texts that are none."""
        texts = {
            "foreign": self.token("token/foreign", RELAY_AUDIENCE, foreign=True),
            "expired": self.token("token/expired", RELAY_AUDIENCE, lifetime=-600),
            "audience": self.token("token/audience", "another-audience"),
            "garbage": self.secret("token/garbage"),
            "spaces": f"{self.secret('token/first')} {self.secret('token/second')}",
            "huge": self.secret("token/huge") * 3000,
            "dots": f"{self.secret('token/a')}.{self.secret('token/b')}.{self.secret('token/c')}",
            "header": base64.urlsafe_b64encode(json.dumps({"alg": self.secret("token/alg")}).encode()).decode()
            + ".e30.x",
            "unicode": self.secret("token/unicode") + "\N{SNOWMAN}",
        }
        for_cluster = {
            "foreign": self.token("token/foreign-id", CLUSTER_AUDIENCE, foreign=True),
            "expired": self.token("token/expired-id", CLUSTER_AUDIENCE, lifetime=-600),
            "garbage": self.secret("token/garbage-id"),
            "bearer": self.secret("token/garbage-bearer"),
        }
        attempts: list[Callable[[], object]] = []
        for name, text in texts.items():
            path = str(self.file(f"access-{name}", text))
            attempts.append(lambda n=name, p=path: self.client(f"access-{n}", "--access-token-file", p, "doctor"))
        for name, text in for_cluster.items():
            path = str(self.file(f"id-{name}", text))
            flag = "--token-file" if name == "bearer" else "--id-token-file"
            attempts.append(lambda n=name, f=flag, p=path: self.client(f"id-{n}", f, p, "doctor"))
        return attempts

    def bad_settings(self) -> list[Callable[[], object]]:
        """Secrets in places where settings are expected, files of the wrong kind, and broken ones."""
        attempts: list[Callable[[], object]] = []
        pieces = {
            "syntax": 'relay = "https://127.0.0.1:1"\ntoken = "{}\n',
            "unknown": 'token = "{}"\n',
            "nested": '[login]\npassword = "{}"\n',
            "type": 'port = "{}"\n',
            "list": 'relays = "{}"\n',
            "duplicate": 'relay = "{0}"\nrelay = "{0}"\n',
        }
        for role in ("client", "relay", "agent"):
            for name, text in pieces.items():
                path = self.file(f"{role}-{name}.toml", text.format(self.secret(f"setting/{role}-{name}")))
                every = (("config", "check"), ("--verbose", "config", "print"))
                for words in every if role == "client" else every[1:]:
                    label = f"settings-{role}-{name}-{len(words)}"
                    attempts.append(
                        lambda r=role, p=path, w=words, n=label: self.command(n, "--role", r, "--config", str(p), *w)
                    )
        broken = {
            "authentication": "jwt:\n- issuer:\n    url: [{}\n",
            "policy": 'allow = "{}\n',
            "key": "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n",
        }
        for name, text in broken.items():
            directory = self.inputs / f"relay-{name}"
            (directory / "data").mkdir(parents=True)
            value = text.format(self.secret(f"setting/{name}"))
            files = {"authentication": self.world.authentication(RELAY_AUDIENCE), "policy": self.world.policy} | {
                name: value
            }
            for file, content in files.items():
                where = directory / ("data/ca.key" if file == "key" else file)
                where.write_text(content)
                where.chmod(0o600)
            words = (
                *("--role", "relay", "--listen", f"127.0.0.1:{fixed_port()}", "--public-address", "127.0.0.1:1"),
                *("--data-dir", str(directory / "data"), "--policy", str(directory / "policy")),
                *("--authentication", str(directory / "authentication")),
            )
            attempts.append(lambda n=name, w=words: self.command(f"relay-{n}", *w))
        for number, text in enumerate(("{}", "abcdef.{}", "abcdef0123456789.{}{{}}", "a.b.{}")):
            path = self.file(f"join-{number}", text.format(self.secret(f"join/bad-{number}")))
            words = (
                *("--role", "agent", "--relay", self.world.relay_url, "--relay-ca-pin", self.world.relay_pin),
                *("--join-token-file", str(path), "--state-dir", str(self.inputs / f"agent-{number}")),
                "enroll",
            )
            attempts.append(lambda n=number, w=words: self.command(f"enrol-{n}", *w))
        return attempts

    def bad_states(self) -> list[Callable[[], object]]:
        """Files that the client keeps, damaged; a kubeconfig that is no YAML; login programs that fail."""
        attempts: list[Callable[[], object]] = []
        organisation = f"arcbridge://organisation/{quote(self.world.relay_pin, safe='')}"
        cluster = f"berlin-factory@{hashlib.sha256(organisation.encode()).hexdigest()[:16]}"
        for name, text in {
            "state/arcbridge/pins.toml": 'x = "{}\n',
            "state/arcbridge/ports.json": '{{"{}"',
            f"state/arcbridge/clusters/{cluster}.json": "{}",
            "cache/arcbridge/clusters": "{}\n",
            "kubeconfig": "users:\n- user: {{token: {}\n",
        }.items():
            label = re.sub(r"[^a-z]+", "-", name)
            path = self.directory / f"home-{label}" / name
            path.parent.mkdir(parents=True)
            path.write_text(text.format(self.secret(f"damaged/{label}")))
            path.chmod(0o600)
            kubeconfig = str(self.directory / f"home-{label}" / "kubeconfig")
            attempts.append(lambda n=label, k=kubeconfig: self.client(n, "--file", k, "--port", "0"))
        for name, script in {
            "text": "echo {}",
            "json": 'echo \'{{"token": "{}"}}\'',
            "fails": "echo {}; exit 3",
            "list": "echo '[\"{}\"]'",
        }.items():
            program = self.file(f"program-{name}", "#!/bin/sh\n" + script.format(self.secret(f"program/{name}")) + "\n")
            program.chmod(0o700)
            config = self.file(f"program-{name}.toml", f'[login]\ncommand = ["{program}"]\n')
            words = (
                *("--role", "client", "--config", str(config), "--relay", self.world.relay_url, "--trust-first-use"),
                *("--relay-ca-pin", self.world.relay_pin, "--cluster", self.world.cluster, "doctor"),
            )
            attempts.append(lambda n=name, w=words: self.command(f"program-{n}", *w))
        return attempts

    def bad_clients(self) -> list[Callable[[], object]]:
        """Secrets, keys and assertions of a confidential client, which the issuer refuses or no one can read."""
        attempts: list[Callable[[], object]] = []
        issuer = f'issuer = "{self.world.issuer.url}"\nclient_id = "ci"\nca_file = "{self.inputs}/issuer.pem"\n'
        for name, (setting, text) in {
            "wrong": ("client_secret_file", "{}"),
            "lines": ("client_secret_file", "{}\n{}"),
            "key": ("client_key_file", "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n"),
            "assertion": ("client_assertion_file", "{}"),
        }.items():
            value = self.secret(f"client/{name}")
            path = self.file(f"client-{name}", text.format(value, value))
            grant = 'grant_type = "device-code"\n'
            config = self.file(f"client-{name}.toml", f'[login]\n{issuer}{grant}{setting} = "{path}"\n')
            words = (
                "--role",
                "client",
                "--config",
                str(config),
                "--relay",
                self.world.relay_url,
                "login",
                "--wait",
                "100s",
            )
            attempts.append(lambda n=name, w=words: self.command(f"client-{n}", *w))
        return attempts

    def bad_networks(self) -> list[Callable[[], object]]:
        """Credentials of proxies, and in the addresses of relays."""
        attempts: list[Callable[[], object]] = []
        for name, url in {
            "refused": "http://user:{}@127.0.0.1:1",
            "port": "http://user:{}@127.0.0.1:port",
            "scheme": "socks5://user:{}@127.0.0.1:1",
            "bracket": "http://user:{}@[::1",
            "407": f"http://user:{{}}@127.0.0.1:{self.unwilling}",
        }.items():
            env = {"HTTPS_PROXY": url.format(self.secret(f"proxy/{name}")), "NO_PROXY": ""}
            attempts.append(lambda n=name, e=env: self.client(f"proxy-{n}", "doctor", env=e))
        for name, url in {"userinfo": "https://user:{}@127.0.0.1:1", "query": "https://127.0.0.1:1/?token={}"}.items():
            words = (
                "--role",
                "client",
                "--relay",
                url.format(self.secret(f"address/{name}")),
                "--cluster",
                "x",
                "doctor",
            )
            attempts.append(lambda n=name, w=words: self.command(f"address-{n}", *w))
        for name, url in {"userinfo": "https://user:{}@127.0.0.1:1", "query": "https://127.0.0.1:1/?x={}"}.items():
            words = (
                *("--role", "client", "--relay", self.world.relay_url, "--oidc-client-id", "cli"),
                *("--oidc-issuer-url", url.format(self.secret(f"address/issuer-{name}")), "login"),
            )
            attempts.append(lambda n=name, w=words: self.command(f"issuer-{n}", *w))
        workload = self.file("workload.toml", '[login]\nworkload = "github-actions"\n')
        for name, url in {"refused": "https://127.0.0.1:1/?a=b", "none": "x", "issuer": self.world.issuer.url}.items():
            env = {
                "ACTIONS_ID_TOKEN_REQUEST_URL": url,
                "ACTIONS_ID_TOKEN_REQUEST_TOKEN": self.secret(f"workload/{name}"),
                "SSL_CERT_FILE": str(self.inputs / "issuer.pem"),
            }
            words = (
                *("--role", "client", "--config", str(workload), "--relay", self.world.relay_url),
                *(
                    "--relay-ca-pin",
                    self.world.relay_pin,
                    "--cluster",
                    self.world.cluster,
                    "--trust-first-use",
                    "doctor",
                ),
            )
            attempts.append(lambda n=name, w=words, e=env: self.command(f"workload-{n}", *w, env=e))
        return attempts

    def malformed(self) -> None:
        """HTTP that no parser takes, with credentials in it, at the relay's API and at the agent through the client."""
        heads = (
            "GET /v1/clusters HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\n\r\n",
            "GET /v1/clusters HTTP/1.1\r\nHost: x\r\nAuthorization : Bearer {}\r\n\r\n",
            "GET /v1/clusters HTTP/1.1\r\nAuthorization: Bearer {}\0\r\n\r\n",
            "GET /{} HTTP/9.9\r\n\r\n",
            "{} /v1/ca HTTP/1.1\r\nHost: x\r\n\r\n",
            'POST /v1/enrol HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n\r\n{{"join_token": "{}',
            "GET /api HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nImpersonate-User: {}\r\nX: \x01\r\n\r\n",
            "GET /api/v1/pods?command={}&x=%zz HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {}\r\n\r\n",
            "POST /api/v1/secrets HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{}\r\n",
        )
        relay = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        relay.check_hostname, relay.verify_mode = False, ssl.CERT_NONE
        near = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        near.check_hostname, near.verify_mode = False, ssl.CERT_NONE
        (certificate,) = (self.alice.directory / "state/arcbridge/clusters").glob(f"{self.world.cluster}@*.json")
        known = json.loads(certificate.read_text())
        load_chain(near, known["client_certificate_pem"], known["client_key_pem"])
        for name, context, port in (("relay", relay, self.world.relay_port), ("agent", near, self.alice.port)):
            for number, head in enumerate(heads):
                value = self.secret(f"malformed/{name}-{number}")
                try:
                    with context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=5)) as sock:
                        sock.sendall(head.format(value, value).encode("latin-1"))
                        sock.settimeout(2)
                        self.outputs[f"answer of the {name} to {number}"] = sock.recv(65536)
                except OSError:
                    pass  # closed without an answer

    def pages(self) -> None:
        ports = {"relay": self.world.relay_observe, "agent": self.world.agent_observe, "client": self.observe}
        for role, port in ports.items():
            for path in ("/metrics", "/readyz?verbose", "/livez"):
                try:
                    self.outputs[f"{path} of the {role}"] = page(port, path).encode()
                except urllib.error.HTTPError as error:
                    self.outputs[f"{path} of the {role}"] = error.read()
                    error.close()

    def bundles(self) -> list[Callable[[], object]]:
        """Files for a report, of each role while it runs, with and without names."""
        world = self.world
        alice = world.client_arguments(ALICE, self.alice.directory)
        words = {
            "relay": ("--role", "relay", "--config", str(world.config_of("relay", 0))),
            "agent": ("--role", "agent", "--config", str(world.config_of("agent", 0))),
            "client": (*alice, "--observe-listen", f"127.0.0.1:{self.observe}"),
        }
        logs = {"relay": "relay", "agent": "agent", "client": "client-1"}
        env = {
            **{name: value for name, value in self.alice.env.items() if value},
            "HTTPS_PROXY": f"http://user:{self.secret('proxy/bundle')}@127.0.0.1:1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        attempts: list[Callable[[], object]] = []
        for role, flags in words.items():
            log = str(world.logs / f"{logs[role]}.stderr.log")
            for name, more in ((f"bundle-{role}", ()), (f"nameless-{role}", ("--without-names",))):
                line = (*flags, "bundle", "--log", log, *more, str(self.inputs / f"{name}.tar.gz"))
                attempts.append(lambda n=name, w=line: self.command(n, *w, env=env))
        return attempts

    def processes(self) -> None:
        """What every user of the machine can read of a process."""
        for process in self.world.processes:
            if process.running:
                for name in ("cmdline", "comm", "status", "limits", "stat"):
                    shown = Path(f"/proc/{process.pid}/{name}").read_bytes()
                    self.outputs[f"{name} of {process.name}"] = shown
                    if name == "limits":
                        (core,) = [
                            line for line in shown.decode().splitlines() if line.startswith("Max core file size")
                        ]
                        assert core.split()[4] == "0", f"{process.name}: {core}"

    def ends(self) -> None:
        """Signals: a switch of the log's level, a crash with faulthandler, an end in order."""
        world = self.world
        for process in (world.relay, world.agent, self.alice.process):
            process.signal(signal.SIGUSR1)
        for process, number in (
            (self.holder.process, signal.SIGSEGV),
            (self.robot.process, signal.SIGABRT),
            (self.alice.process, signal.SIGTERM),
            (world.agent, signal.SIGABRT),
            (world.relay, signal.SIGTERM),
        ):
            process.signal(number)
            status = process.wait(60)
            assert status == (0 if number == signal.SIGTERM else -number)
            if number != signal.SIGTERM:
                process.wait_for_line("Fatal Python error")  # faulthandler's dump

    @property
    def unwilling(self) -> int:
        """The port of a proxy that wants other credentials."""
        server = socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            sock, _ = server.accept()
            with sock, server:
                head = sock.recv(65536)
                reason = head.partition(b"Basic ")[2].split(b"\r")[0]
                sock.sendall(
                    b"HTTP/1.1 407 No " + reason + b"\r\nX-Given: " + reason + b"\r\nContent-Length: 0\r\n\r\n"
                )

        threading.Thread(target=serve, daemon=True).start()
        return int(server.getsockname()[1])

    # -- what came of it ----------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Learn the secrets that the run has made for itself, and take in what the processes wrote."""
        world = self.world
        for name, path in {
            "agent/account": world.api.token_file,
            "join/used": world.agent_config.parent / "join-token",
        }.items():
            text = (path or Path()).read_text().strip()
            self.canaries.add(name, text.partition(".")[2] if name.startswith("join") else text)
        for path in self.files():
            if re.fullmatch(r"(access|id)-token", path.name):
                self.canaries.add(f"token/{path.parent.name}-{path.name}", path.read_text())
            else:
                self.canaries.add_keys(f"key/{path.relative_to(self.directory)}", path.read_bytes())
        self.canaries.add_recorded(self.directory / "records")
        for path in self.inputs.glob("*.tar.gz"):
            with tarfile.open(path) as archive:
                for one in archive:
                    file = archive.extractfile(one)
                    self.outputs[f"{path.name}: {Path(one.name).name}"] = b"" if file is None else file.read()
        for path in world.logs.iterdir():
            self.outputs[path.name] = path.read_bytes()

    def files(self) -> Iterator[Path]:
        yield from (path for path in sorted(self.directory.rglob("*")) if path.is_file() and not path.is_symlink())


@pytest.fixture(scope="module")
def done(cluster: Cluster, api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The whole run, once; the tests look at what came of it."""
    directory = tmp_path_factory.mktemp("canaries")
    with pytest.MonkeyPatch.context() as environment:
        this = Run(directory, cluster, api)
        for name, value in install_recorder(directory).items():
            environment.setenv(name, value)
        environment.setenv("ARCBRIDGE_LOG_LEVEL", "debug")
        environment.setenv("ARCBRIDGE_LOG_FORMAT", "json")
        environment.setenv("PYTHONFAULTHANDLER", "1")
        environment.setenv("PYTHONASYNCIODEBUG", "1")
        environment.setenv("TMPDIR", str(this.temporary))
        environment.setenv("ARCBRIDGE_TEST_TLS_KEYS", str(this.working / "tls-keys"))
        environment.chdir(this.working)
        this.world.agent_audit = "commands = false"
        with this.world:
            this.world.start()
            this.honest()
            this.bearers()
            this.logins()
            with ThreadPoolExecutor(3) as pool:
                attempts = [*this.bad_tokens(), *this.bad_settings(), *this.bad_states(), *this.bad_clients()]
                attempts += this.bad_networks()
                for result in [pool.submit(attempt) for attempt in attempts]:
                    result.result()
            this.malformed()
            this.pages()
            with ThreadPoolExecutor(2) as pool:
                for result in [pool.submit(attempt) for attempt in this.bundles()]:
                    result.result()
            this.processes()
            this.ends()
            this.collect()
            yield this


def test_the_search_finds_what_is_there(done: Run) -> None:
    """The control: a piece of each secret, in each form, is found again."""
    kinds = {name.partition("/")[0] for name in done.canaries.names}
    assert kinds >= {
        *("token", "bearer", "login", "proof-key", "key", "join", "agent", "body", "query", "command", "proxy"),
        *("resume-secret", "dial-token", "pkce-verifier", "setting", "damaged", "program", "malformed", "address"),
    }
    assert len(done.canaries.names) > 150
    value = secrets.token_hex(16)
    own = Canaries()
    own.add("x", value)
    own.add("y", "eyJhbGciOiJub25lIn0." + "c2lnbmVkIGNsYWltcyBvZiBhIHRva2Vu" + ".c2lnbmF0dXJlIG9mIGEgdG9rZW4")
    for form in (
        value.encode(),
        b"line: " + value[5:25].encode(),
        base64.b64encode(b"ab" + value.encode()),
        base64.b64encode(b"x" * 90 + value.encode()),
        value.encode().hex().encode(),
    ):
        assert own.find(b"before " + form + b" behind") == {"x"}, form
    assert own.find(b"token c2lnbmF0dXJlIG9m was refused") == {"y"}
    assert own.find(value[:15].encode()) == set()


def test_what_was_driven_has_happened(done: Run) -> None:
    """Each failure was one: the search would be worth nothing after a run that did nothing."""
    assert len(done.outputs) > 100
    said = {name: text.decode(errors="replace") for name, text in done.outputs.items()}
    for name in (
        "access-garbage",
        "access-huge",
        "id-foreign",
        "program-json",
        "proxy-407",
        "enrol-1",
        "address-query",
    ):
        assert "error" in said[f"command {name}"] or "failed" in said[f"command {name}"], said[f"command {name}"]
    for role in ("client", "relay", "agent"):
        assert f"error: {done.inputs}/{role}-unknown.toml" in said[f"command settings-{role}-unknown-3"]
    for name in ("relay", "agent", "client-1"):
        assert '"level":"debug"' in said[f"{name}.stderr.log"].replace(" ", "")
    assert any(record.get("resource") == "pods" for record in done.world.audit_records())


def test_no_output_holds_a_secret(done: Run) -> None:
    """Logs, answers, metrics, health, what /proc shows: of every process and every command."""
    found = {name: hits for name, text in done.outputs.items() if (hits := done.canaries.find(text))}
    assert found == {}


def test_a_bundle_has_its_files_and_without_names_none_of_them(done: Run) -> None:
    """docs/threats.md#O9: of roles that run, with all that they know of users and clusters."""
    commands = {
        "relay": ("config-check", "ca-status", "cluster-list", "session-list", "policy-list", "doctor"),
        "agent": ("config-check", "ca-status", "doctor"),
        "client": ("config-check", "status", "doctor"),
    }
    names = (ALICE.name, ALICE.email, done.world.cluster, done.directory.name)
    for role, words in commands.items():
        for kind in ("bundle", "nameless"):
            archive = f"{kind}-{role}.tar.gz: "
            files = {
                name.removeprefix(archive): data for name, data in done.outputs.items() if name.startswith(archive)
            }
            assert json.loads(files["manifest.json"])["missing"] == {}, done.outputs[f"command {kind}-{role}"]
            own = ("versions.json", "settings.json", "state.json", "metrics.txt", "log.jsonl", "manifest.json")
            assert set(files) == {*own, *(f"{word}.json" for word in words)}
            assert f"arcbridge_{role}_".encode() in files["metrics.txt"]
            assert len(files["log.jsonl"].splitlines()) > 10
            assert len(json.loads(files["doctor.json"])["hops"]) > 5
            text = b"".join(files.values())
            within = {name for name in names if name.encode() in text}
            assert within == set() if kind == "nameless" else within >= set(names[2:])
    sessions = json.loads(done.outputs["nameless-relay.tar.gz: session-list.json"])
    clusters = json.loads(done.outputs["nameless-relay.tar.gz: cluster-list.json"])
    assert {one["cluster"] for one in sessions} <= {one["name"] for one in clusters}


def test_every_file_is_on_the_list_and_holds_what_belongs_there(done: Run) -> None:
    strange, wrong, open_to_others = [], [], []
    seen = set()
    for path in done.files():
        place = path.relative_to(done.directory).as_posix()
        if GIVEN.fullmatch(place):
            continue
        patterns = [pattern for pattern in WRITTEN if re.fullmatch(pattern, place)]
        if not patterns:
            strange.append(place)
            continue
        seen |= set(patterns)
        hits = done.canaries.find(path.read_bytes())
        allowed = {kind for pattern in patterns for kind in WRITTEN[pattern]}
        # What the test itself has damaged is left as it was.
        wrong += [(place, hit) for hit in hits if hit.partition("/")[0] not in allowed | {"damaged"}]
        if hits and stat.S_IMODE(path.stat().st_mode) & 0o077:
            open_to_others.append(place)
    assert strange == [], "a file that is not on the list WRITTEN"
    assert wrong == []
    assert open_to_others == []
    assert len(seen) > 8


def test_no_crash_leaves_a_core(done: Run) -> None:
    assert list(done.working.rglob("*")) == []
    assert [path for path in done.temporary.rglob("*") if path.is_file()] == []
    assert not [path for path in done.files() if path.name.startswith("core")]


def test_the_audit_has_no_command_line(done: Run) -> None:
    records = [record for record in done.world.audit_records() if record.get("subresource") == "exec"]
    assert records, "exec is recorded"
    assert not [record for record in records if "command" in record]
    assert done.canaries.find(done.world.audit_log.read_bytes()) == set()
