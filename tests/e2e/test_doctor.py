"""The client's `doctor` with real processes: each fault has its hop, its code, what was found, and what to do.

One healthy organisation; each test breaks one thing, most of them in the client's own surroundings.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.doctor.codes import CODES
from arcbridge.client.kubeconfig.entries import Entry, render
from arcbridge.installation import own_path
from tests.support import citations
from tests.support.cluster import Cluster
from tests.support.processes import require_or_skip, run
from tests.support.reports import agent_again, metrics, until
from tests.support.world import ALICE, MALLORY, RELAY_AUDIENCE, ApiServer, User, World, arcbridge, fixed_port

WAY = [
    "state directory", "name resolution", "outbound proxy", "TCP", "TLS", "relay", "relay certificate", "clock",
    "login", "policy", "agent", "session", "API server", "background process", "kubeconfig",
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
        self.prefix: tuple[str, ...] = ()

    def line(self, *command: str) -> list[str]:
        tokens = ["--access-token-file", str(self.access), "--id-token-file", str(self.identity)]
        return arcbridge(*command, "--relay", self.relay, *self.trust, *tokens, *self.more)

    def examine(self) -> tuple[int, dict[str, dict[str, str]], str]:
        """Return the exit code, the findings by hop, and the code of the cause."""
        line = [*self.prefix, *self.line("doctor", self.cluster, "-o", "json")]
        done = run(line, env={**os.environ, **self.env}, check=False)
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
    assert {hop for hop in hops if hops[hop]["state"] != "ok"} == {"outbound proxy", "background process", "kubeconfig"}
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


NAMED: dict[str, tuple[str, str, str]] = {
    "1": ("the relay's name is wrong", "relay_name", ""),
    "2": ("the relay's port is closed", "relay_port_closed", ""),
    "3": (
        "something listens there that says nothing",
        "relay_tls",
        "`tests/client/doctor/test_relay_hops.py::test_what_a_server_is`",
    ),
    "4": ("another TLS server listens there", "relay_other", ""),
    "5": ("the proxy of the environment is dead", "proxy_unreachable", ""),
    "6": (
        "the proxy wants credentials, or refuses them",
        "proxy_credentials",
        "`tests/client/doctor/test_relay_hops.py::test_proxies`",
    ),
    "7": ("the policy lets this user not reach the cluster", "policy", ""),
    "8": ("the kubeconfig is damaged", "kubeconfig", ""),
    "9": ("the program that the kubeconfig names is gone", "plugin_missing", ""),
    "10": (
        "another program has the cluster's port",
        "port_taken",
        "`tests/client/doctor/test_kubeconfig_hop.py::test_the_kept_port`, "
        "`tests/client/background/test_process.py::test_a_port_that_was_taken_meanwhile_moves_and_the_context_says_so`",
    ),
    "11": (
        "the server in the kubeconfig was edited by hand",
        "kubeconfig_edited",
        "`tests/client/doctor/test_kubeconfig_hop.py::test_a_server_that_was_changed`, "
        "`tests/client/background/test_clusters.py::test_what_to_do_where_the_entry_is_not_ours_to_change`",
    ),
    "12": ("the pin of the cluster is another one", "cluster_pin", ""),
    "13": ("a word of `client.toml` is mistyped", "settings", ""),
    "14": (
        "this machine's clock is wrong by an hour",
        "clock",
        "`tests/client/doctor/test_relay_hops.py::test_the_clock`",
    ),
    "15": ("the login has ended", "token_expired", ""),
    "16": ("the place of the state directory is a file", "state_directory", ""),
    "17": ("the disk is full", "disk_full", ""),
    "18": ("no agent of the cluster is connected", "agent_missing", "`tests/e2e/test_doctor.py::test_no_agent`"),
    "19": ("the relay is down", "relay_port_closed", "row 2: both are a port that refuses"),
    "20": (
        "the API server fails, or does not answer",
        "api_server",
        "`tests/e2e/test_doctor.py::test_an_api_server_that_is_down`",
    ),
    "21": (
        "the background process hangs",
        "background_silent",
        "`tests/e2e/test_background.py::test_a_process_that_hangs_is_named_and_ended`",
    ),
}
"""What goes wrong on a user's machine and on the way, by which code the doctor names it, and what is held by another
test, which looks for the code."""


def tls_server(patient: Patient) -> None:
    patient.relay = patient.world.issuer.url


def dead_proxy(patient: Patient) -> None:
    # A relay in loopback is asked through no proxy.
    patient.relay = "https://relay.invalid"
    patient.env |= {
        "HTTPS_PROXY": f"http://127.0.0.1:{fixed_port()}",
        "https_proxy": "",
        "NO_PROXY": "",
        "no_proxy": "",
    }


def refused_by_policy(patient: Patient) -> None:
    patient.access, patient.identity = patient.world.login_files(MALLORY, patient.directory / "mallory")


def kubeconfig(patient: Patient, text: str) -> None:
    file = patient.directory / "kubeconfig"
    file.write_text(text)
    # The first one of the list is right, and kubectl reads both.
    patient.env["KUBECONFIG"] = f"{patient.directory / 'absent'}:{file}"


def lost_plugin(patient: Patient) -> None:
    words = ("--cluster", patient.cluster)
    address = f"https://127.0.0.1:{fixed_port()}"
    entry = Entry(patient.cluster, patient.cluster, address, "CA", "CERT", "KEY", arguments=words, plugin=True)
    kubeconfig(patient, render(entry).replace(own_path(), "/opt/former/bin/arcbridge"))


def mistyped_setting(patient: Patient) -> None:
    file = Path(patient.env["XDG_CONFIG_HOME"]) / "arcbridge" / "client.toml"
    file.parent.mkdir(parents=True)
    file.write_text('clutser = "prod"\n')


def ended_login(patient: Patient) -> None:
    patient.access, patient.identity = patient.world.login_files(ALICE, patient.directory / "former", lifetime=-60)


def state_in_a_file(patient: Patient) -> None:
    state = Path(patient.env["XDG_STATE_HOME"])
    state.mkdir()
    (state / "arcbridge").write_text("")


def full_disk(patient: Patient) -> None:
    state = Path(patient.env["XDG_STATE_HOME"])
    state.mkdir()
    own = ("unshare", "-m") if os.geteuid() == 0 else ("unshare", "-Urm")
    mount = f"mount -t tmpfs -o size=32k none {state}"
    if shutil.which("unshare") is None or run([*own, "sh", "-c", mount], check=False).returncode:
        require_or_skip("mount", "this user can mount nothing here")
    patient.prefix = (*own, "sh", "-c", f'{mount} && exec "$@"', "sh")


FAULTS: dict[str, Callable[[Patient], None]] = {
    "1": lambda patient: setattr(patient, "relay", "https://no-such-relay.invalid"),
    "2": lambda patient: setattr(patient, "relay", f"https://127.0.0.1:{fixed_port()}"),
    "4": tls_server,
    "5": dead_proxy,
    "7": refused_by_policy,
    "8": lambda patient: kubeconfig(patient, "clusters: ["),
    "9": lost_plugin,
    "12": lambda patient: setattr(patient, "more", ["--cluster-ca-pin", f"sha256:{64 * '0'}"]),
    "13": mistyped_setting,
    "15": ended_login,
    "16": state_in_a_file,
    "17": full_disk,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_users_fault_is_named_at_the_first_look(patient: Patient, name: str) -> None:
    code = NAMED[name][1]
    FAULTS[name](patient)
    returncode, hops, cause = patient.examine()
    assert cause == code, json.dumps(hops, indent=1)
    assert returncode == CODES[code]
    finding = next(one for one in hops.values() if one["code"] == code)
    assert finding["remedy"]


def test_each_of_the_users_faults_is_made_here_or_held_by_another_test() -> None:
    assert list(NAMED) == [str(number) for number in range(1, 22)]
    for name, (_, code, held) in NAMED.items():
        assert code in CODES
        assert citations.missing(held) == []
        sources = [citations.source(path, test) for path, test in citations.tests(held)]
        shown = any(f'"{code}"' in source for source in sources)
        assert name in FAULTS or shown or name == "19", name


def test_a_wrong_pin(patient: Patient) -> None:
    patient.trust = ["--relay-ca-pin", f"sha256:{64 * '0'}"]
    detail = patient.fails_at("relay certificate", "relay_pin")["detail"]
    assert patient.world.relay_pin in detail


# -- login and policy --------------------------------------------------------------------------------------------------


def test_an_unknown_cluster(patient: Patient) -> None:
    patient.cluster = "no-such-cluster"
    patient.fails_at("policy", "policy")


# -- agent, session, API server ----------------------------------------------------------------------------------------


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
