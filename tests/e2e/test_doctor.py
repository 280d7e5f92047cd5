"""The client's `doctor` with real processes: each fault has its hop, its code, what was found, and what to do.

One healthy organisation; each test breaks one thing, most of them in the client's own surroundings.
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from arcbridge.client.doctor.codes import CODES
from tests.support.cluster import Cluster
from tests.support.processes import run
from tests.support.reports import agent_again, metrics, until
from tests.support.world import (
    ALICE,
    CLUSTER_AUDIENCE,
    MALLORY,
    RELAY_AUDIENCE,
    ApiServer,
    User,
    World,
    arcbridge,
    fixed_port,
)

WAY = [
    "name resolution", "outbound proxy", "TCP", "TLS", "relay", "relay certificate", "clock", "login", "policy",
    "agent", "session", "API server", "kubeconfig",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(api, directory=tmp_path_factory.mktemp("doctor")) as world:
        yield world.start()


class Patient:
    """A machine whose way to the cluster is looked at."""

    def __init__(self, world: World, directory: Path) -> None:
        self.world = world
        self.directory = directory
        self.relay = world.relay_url
        self.trust = ["--relay-ca-pin", world.relay_pin]
        self.cluster = world.cluster
        self.access, self.identity = world.login_files(ALICE, directory)
        self.env: dict[str, str] = world.client_env(directory)
        self.more = ["--trust-first-use"]

    def line(self, *command: str) -> list[str]:
        tokens = ["--access-token-file", str(self.access), "--id-token-file", str(self.identity)]
        return arcbridge(*command, "--relay", self.relay, *self.trust, *tokens, *self.more)

    def examine(self) -> tuple[int, dict[str, dict[str, str]], str]:
        """Return the exit code, the findings by hop, and the code of the cause."""
        done = run(self.line("doctor", self.cluster, "-o", "json"), env={**os.environ, **self.env}, check=False)
        document = json.loads(done.stdout)
        return done.returncode, {row["hop"]: row for row in document["hops"]}, document["cause"]

    def fails_at(self, hop: str, code: str) -> dict[str, str]:
        """Examine; the first failure is this one, it says what to do, and the exit code is its kind's."""
        returncode, hops, cause = self.examine()
        assert cause == code, json.dumps(hops, indent=1)
        assert list(hops) == [one for one in WAY if one in hops], "in the order of the way"
        finding = hops[hop]
        assert finding["state"] == "failed"
        assert finding["remedy"]
        assert returncode == CODES[code]
        for earlier in list(hops)[: list(hops).index(hop)]:
            assert hops[earlier]["state"] in ("ok", "skipped"), hops[earlier]
        return finding


@pytest.fixture
def patient(world: World, tmp_path: Path) -> Patient:
    return Patient(world, tmp_path)


def test_a_way_that_works(patient: Patient) -> None:
    returncode, hops, cause = patient.examine()
    assert (returncode, cause, list(hops)) == (0, "", WAY), hops
    assert {hop for hop in hops if hops[hop]["state"] != "ok"} == {"outbound proxy", "kubeconfig"}
    assert "alice@example.com" in hops["API server"]["detail"]
    assert f'"{RELAY_AUDIENCE}"' in hops["login"]["detail"]
    done = run(patient.line("doctor", patient.cluster), env={**os.environ, **patient.env})
    head, *rows = done.stdout.decode().splitlines()
    assert head.split() == ["HOP", "STATE", "DETAIL"]
    assert len(rows) == len(WAY)


def test_the_throughput_is_measured_when_it_is_asked_for(patient: Patient) -> None:
    line = patient.line("doctor", patient.cluster, "--throughput", "-o", "json")
    done = run(line, env={**os.environ, **patient.env})
    hops = {row["hop"]: row for row in json.loads(done.stdout)["hops"]}
    assert re.fullmatch(
        r"[\d.]+ [KMG]iB a second from the cluster \(/openapi/v2, \d+ times in \d\.\d s over one stream\)",
        hops["throughput"]["detail"],
    )
    assert re.search(r", [\d.]+ ms to the agent and back \(session ", hops["session"]["detail"])


def test_without_a_cluster_it_looks_as_far_as_the_relay(patient: Patient) -> None:
    patient.cluster = ""
    done = run([word for word in patient.line("doctor", "-o", "json") if word], env={**os.environ, **patient.env})
    hops = [row["hop"] for row in json.loads(done.stdout)["hops"]]
    assert hops == [hop for hop in WAY if hop not in ("agent", "session", "API server")]


# -- the way to the relay ----------------------------------------------------------------------------------------------


def test_a_wrong_host_name(patient: Patient) -> None:
    patient.relay = f"https://no-such-relay.invalid:{patient.world.relay_port}"
    assert "no-such-relay.invalid cannot be resolved" in patient.fails_at("name resolution", "relay_name")["detail"]


def test_a_closed_port(patient: Patient) -> None:
    patient.relay = f"https://127.0.0.1:{fixed_port()}"
    assert "refuses connections" in patient.fails_at("TCP", "relay_port_closed")["detail"]


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A TCP server on loopback that gives each connection to `answer` in a thread of its own."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:

        def serve(sock: socket.socket) -> None:
            with sock:
                try:
                    answer(sock)
                except OSError:
                    return  # the client has hung up

        def accept() -> None:
            while True:
                try:
                    sock, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(sock,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield int(listening.getsockname()[1])
        listening.shutdown(socket.SHUT_RDWR)


def refusing_proxy(status: str) -> Callable[[socket.socket], None]:
    def answer(sock: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (chunk := sock.recv(4096)):
                return
            head += chunk
        sock.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())

    return answer


@pytest.mark.parametrize(
    ("status", "code"), [("403 Forbidden", "proxy_refused"), ("407 Who", "proxy_credentials")], ids=["refused", "asks"]
)
def test_a_proxy_that_refuses(patient: Patient, status: str, code: str) -> None:
    with server(refusing_proxy(status)) as port:
        patient.env |= {"HTTPS_PROXY": f"http://127.0.0.1:{port}", "NO_PROXY": ""}
        patient.fails_at("outbound proxy", code)


def test_a_proxy_that_is_not_there(patient: Patient) -> None:
    patient.env |= {"HTTPS_PROXY": f"http://127.0.0.1:{fixed_port()}", "NO_PROXY": ""}
    patient.fails_at("outbound proxy", "proxy_unreachable")


def test_a_server_that_speaks_no_tls(patient: Patient) -> None:
    with server(lambda sock: sock.sendall(b"220 mail.example.org ESMTP\r\n")) as port:
        patient.relay = f"https://127.0.0.1:{port}"
        patient.fails_at("TLS", "relay_tls")


def test_a_server_that_is_no_relay(patient: Patient) -> None:
    patient.relay = patient.world.issuer.url
    patient.trust = ["--relay-ca-file", str(patient.world.issuer.ca_file)]
    assert "is no arcbridge relay" in patient.fails_at("relay", "relay_other")["detail"]


def test_a_wrong_pin(patient: Patient) -> None:
    patient.trust = ["--relay-ca-pin", f"sha256:{64 * '0'}"]
    detail = patient.fails_at("relay certificate", "relay_pin")["detail"]
    assert patient.world.relay_pin in detail


def test_a_wrong_ca_file(patient: Patient) -> None:
    patient.trust = ["--relay-ca-file", str(patient.world.issuer.ca_file)]
    patient.fails_at("relay certificate", "relay_ca")


def test_another_name_than_the_certificate_s(patient: Patient) -> None:
    patient.relay = f"https://localhost:{patient.world.relay_port}"
    detail = patient.fails_at("relay certificate", "relay_certificate_name")["detail"]
    assert detail == "the certificate is for 127.0.0.1, not for localhost"


def relay_certificate(world: World, *, ends: timedelta) -> tuple[str, str]:
    """A certificate of the relay's own CA for 127.0.0.1, and its key: PEM."""
    data = world.relay_config.parent / "data"
    ca = x509.load_pem_x509_certificate((data / "ca.crt").read_bytes())
    ca_key = serialization.load_pem_private_key((data / "ca.key").read_bytes(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "relay")]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + ends)
        .add_extension(name, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode(), private.decode()


class Front:
    """Stands before the real relay: joins pass as they are, the HTTP API has another certificate or another Date."""

    def __init__(
        self, world: World, directory: Path, *, ends: timedelta, joins_pass: bool, date_off: float | None = None
    ) -> None:
        """`date_off`: seconds by which the Date is ahead of this machine's clock; None: it stays as it is."""
        certificate, key = relay_certificate(world, ends=ends)
        (directory / "front.pem").write_text(certificate + key)
        self._port = world.relay_port
        self._date_off = date_off
        self._joins_pass = joins_pass
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(directory / "front.pem")
        self._context.set_alpn_protocols(["arcbridge-join/1", "http/1.1"])
        self._behind = ssl.create_default_context()
        self._behind.check_hostname, self._behind.verify_mode = False, ssl.CERT_NONE
        self._behind.set_alpn_protocols(["http/1.1"])

    def answer(self, sock: socket.socket) -> None:
        if self._joins_pass and b"arcbridge-join/1" in sock.recv(4096, socket.MSG_PEEK):
            with socket.create_connection(("127.0.0.1", self._port)) as far:
                back = threading.Thread(target=copy, args=(far, sock), daemon=True)
                back.start()
                copy(sock, far)
                back.join()
            return
        with self._context.wrap_socket(sock, server_side=True) as near:
            raw = socket.create_connection(("127.0.0.1", self._port))
            with self._behind.wrap_socket(raw) as far:
                far.sendall(near.recv(65536))
                head = b""
                while b"\r\n\r\n" not in head:
                    if not (data := far.recv(65536)):
                        return
                    head += data
                if self._date_off is not None:
                    lines = head.split(b"\r\n")
                    said = f"Date: {formatdate(time.time() + self._date_off, usegmt=True)}".encode()
                    head = b"\r\n".join(said if line.startswith(b"Date:") else line for line in lines)
                near.sendall(head)
                while data := far.recv(65536):
                    near.sendall(data)
            near.unwrap()


def copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return


def test_an_expired_certificate(patient: Patient) -> None:
    front = Front(patient.world, patient.directory, ends=timedelta(days=-1), joins_pass=False)
    with server(front.answer) as port:
        patient.relay = f"https://127.0.0.1:{port}"
        patient.trust = ["--relay-ca-file", str(patient.world.relay_config.parent / "data" / "ca.crt")]
        assert "has expired" in patient.fails_at("relay certificate", "relay_certificate_expired")["detail"]


@pytest.mark.parametrize("hours", [-1, 1], ids=["ahead", "behind"])
def test_a_wrong_clock(patient: Patient, hours: int) -> None:
    """The relay's Date differs; all else works, so this is the one failure."""
    front = Front(patient.world, patient.directory, ends=timedelta(days=30), joins_pass=True, date_off=hours * 3600)
    with server(front.answer) as port:
        patient.relay = f"https://127.0.0.1:{port}"
        detail = patient.fails_at("clock", "clock")["detail"]
        assert detail == f"this machine is 60 min {'ahead of' if hours < 0 else 'behind'} the relay"


# -- login and policy --------------------------------------------------------------------------------------------------


def test_an_expired_token(patient: Patient) -> None:
    patient.access.write_text(patient.world.token(ALICE, RELAY_AUDIENCE, lifetime=-60))
    assert str(patient.access) in patient.fails_at("login", "token_expired")["detail"]


def test_no_token(patient: Patient) -> None:
    patient.access.unlink()
    patient.fails_at("login", "login_missing")


def test_two_tokens_that_were_swapped(patient: Patient) -> None:
    patient.access, patient.identity = patient.identity, patient.access
    detail = patient.fails_at("policy", "relay_token_audience")["detail"]
    assert detail == f'the token is for "{CLUSTER_AUDIENCE}", and the relay wants one for itself'


def test_a_token_of_another_issuer(patient: Patient) -> None:
    foreign = patient.world.issuer.mint(sub="alice", aud=RELAY_AUDIENCE, claims={"iss": "https://evil.example.org"})
    patient.access.write_text(foreign)
    assert '"https://evil.example.org"' in patient.fails_at("policy", "relay_token_issuer")["detail"]


def test_an_unknown_cluster(patient: Patient) -> None:
    patient.cluster = "no-such-cluster"
    patient.fails_at("policy", "policy")


def test_a_user_whom_the_policy_does_not_allow(patient: Patient) -> None:
    patient.access, patient.identity = patient.world.login_files(MALLORY, patient.directory)
    patient.fails_at("policy", "policy")


# -- agent, session, API server ----------------------------------------------------------------------------------------


def test_an_agent_that_wants_another_audience(patient: Patient) -> None:
    patient.identity.write_text(patient.world.token(ALICE, "another-cluster"))
    detail = patient.fails_at("session", "cluster_token_audience")["detail"]
    assert detail == 'the token is for "another-cluster", and the cluster\'s agent wants one for itself'


def test_an_agent_that_wants_a_claim(patient: Patient) -> None:
    token = patient.world.issuer.mint(
        sub="alice", aud=CLUSTER_AUDIENCE, email="alice@example.com", email_verified=False, groups=["platform"]
    )
    patient.identity.write_text(token)
    patient.fails_at("session", "cluster_token_claim")


def test_a_cluster_that_this_machine_does_not_know(patient: Patient) -> None:
    patient.more = []
    patient.fails_at("session", "cluster_unknown")


def test_another_pin_of_the_cluster(patient: Patient) -> None:
    patient.more = ["--cluster-ca-pin", f"sha256:{64 * '0'}"]
    patient.fails_at("session", "cluster_pin")


@contextmanager
def broken_agent(world: World, settings: Mapping[str, str]) -> Iterator[None]:
    """The agent with other settings, then as it was."""
    config = world.agent_config
    before = config.read_text()
    changed = before
    for old, new in settings.items():
        assert old in changed
        changed = changed.replace(old, new)
    config.write_text(changed)
    world.agent.stop()
    agent_again(world, wait=False)
    try:
        yield
    finally:
        config.write_text(before)
        world.agent.stop()
        agent_again(world)


def connected(patient: Patient) -> None:
    """Wait until the agent that was started last is connected, and the relay lists one."""
    patient.world.agent.wait_for_line("control connection up", timeout=30)

    def look() -> bool:
        listed = json.loads(run(patient.line("clusters", "-o", "json"), env={**os.environ, **patient.env}).stdout)
        return any(row["agents"] for row in listed)

    until(look, "an agent is connected", timeout=30)


def test_an_api_server_that_is_down(patient: Patient) -> None:
    with broken_agent(patient.world, {patient.world.api.url: f"https://127.0.0.1:{fixed_port()}"}):
        connected(patient)
        patient.fails_at("API server", "api_server")


def test_an_agent_whose_own_credential_is_refused(patient: Patient) -> None:
    token = patient.directory / "agent-token"
    token.write_text("not.a.token")
    with broken_agent(patient.world, {str(patient.world.api.token_file): str(token)}):
        connected(patient)
        patient.fails_at("API server", "agent_credential")


def test_an_agent_that_may_not_impersonate(patient: Patient, cluster: Cluster) -> None:
    token = patient.directory / "agent-token"
    token.write_text(cluster.service_account_token("arcbridge", "without-rights"))
    with broken_agent(patient.world, {str(patient.world.api.token_file): str(token)}):
        connected(patient)
        patient.fails_at("API server", "agent_impersonation")


def test_no_agent(patient: Patient) -> None:
    patient.world.agent.stop()
    until(lambda: metrics(patient.world.relay_observe)["arcbridge_relay_agents"] == 0, "the relay has noticed")
    try:
        patient.fails_at("agent", "agent_missing")
    finally:
        agent_again(patient.world)


# -- this machine ------------------------------------------------------------------------------------------------------


def serve(patient: Patient, user: User = ALICE) -> Any:
    """Serve the cluster from this machine, with the kubeconfig that the doctor looks at.

    At a port that no other process gets when the client is gone.
    """
    client = patient.world.start_client(user, "--port", str(fixed_port()), env=patient.env)
    patient.env |= {"KUBECONFIG": str(client.kubeconfig)}
    return client


def test_a_context_at_which_nothing_listens(patient: Patient) -> None:
    client = serve(patient)
    _, hops, _ = patient.examine()
    assert hops["kubeconfig"]["state"] == "ok"
    client.process.kill()
    finding = patient.fails_at("kubeconfig", "kubeconfig_dead")
    assert finding["detail"].endswith(f'"{patient.world.cluster}" (the current one)')


def test_a_port_that_another_program_took(patient: Patient) -> None:
    client = serve(patient)
    client.process.kill()
    with closing(socket.create_server(("127.0.0.1", client.port))):
        detail = patient.fails_at("kubeconfig", "port_taken")["detail"]
    assert f"port {client.port}" in detail


def test_settings_that_cannot_be(patient: Patient) -> None:
    done = run(arcbridge("doctor", "-o", "json"), env={**os.environ, **patient.env}, check=False)
    assert done.returncode == 2
    (hop,) = json.loads(done.stdout)["hops"]
    assert (hop["hop"], hop["code"]) == ("settings", "settings")
    assert "relays: none is set" in hop["detail"]


def test_one_of_two_relays_is_down(patient: Patient) -> None:
    patient.trust += ["--relay", f"https://127.0.0.1:{fixed_port()}"]
    returncode, hops, cause = patient.examine()
    assert (returncode, cause) == (0, "")
    (tcp,) = [row for hop, row in hops.items() if hop.startswith("TCP (") and row["state"] != "ok"]
    assert (tcp["state"], tcp["code"]) == ("warning", "relay_port_closed")
