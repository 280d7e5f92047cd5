"""An operator's bad day: eleven things are broken one by one on real processes, and each is found at the first look.

The table of docs/broken.md#eleven-faults says how: by one log line, by one metric, and by `doctor` alone in one
command. The test reads that table, so a row that promises too much fails. Each fault is repaired before the next one,
and at the end nothing is found any more.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import urllib.error
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from arcbridge.errors import ExitCode
from tests.support import pages
from tests.support.cluster import Cluster
from tests.support.issuer import Issuer
from tests.support.processes import START, ManagedProcess, ProcessFailed, run
from tests.support.reports import agent_again, metrics, page, until
from tests.support.targets import EchoServer
from tests.support.world import ALICE, BOB, CLUSTER_AUDIENCE, ApiServer, Client, User, World, arcbridge, fixed_port

BROKEN = Path(__file__).resolve().parents[2] / "docs" / "broken.md"


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    log_role: str
    log: str
    """What the log line contains."""
    metric: str
    value: float
    """Of the metric; -1: at least one; for `up` 0, nothing answers the scrape."""
    doctor: str
    """Whose doctor."""
    code: str


def rows() -> list[Row]:
    """The table. Raises where a row is not as this test can read it."""
    text = pages.read(BROKEN).partition('<a id="eleven-faults"></a>')[2]
    found = []
    for line in text.splitlines():
        if not line.startswith('| <a id="fault-'):
            if found and not line.startswith("|"):
                break
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        name = re.match(r'<a id="fault-([a-z-]+)"></a>', cells[0])
        log = re.match(r"(agent|relay): `(.+?)`", cells[1])
        metric = re.match(r"`(.+?)` (?:is (\d+)|(rises))", cells[2])
        doctor = re.match(r"(agent|relay): `([a-z_]+)`", cells[3])
        if name is None or log is None or metric is None or doctor is None:
            raise AssertionError(f"this row cannot be read: {line}")
        value = -1.0 if metric[3] else float(metric[2])
        found.append(Row(name[1], log[1], log[2], metric[1], value, doctor[1], doctor[2]))
    return found


# --- the organisation -----------------------------------------------------------------------------------------------


class Day:
    """The organisation, and what is done to it."""

    def __init__(self, world: World, cluster: Cluster, directory: Path) -> None:
        self.world = world
        self.cluster = cluster
        self.directory = directory
        self.settings = ""
        """The agent's settings file as it was."""
        self.authentication = ""
        self.token = ""

    @property
    def agent_directory(self) -> Path:
        return self.world.agent_config.parent

    @property
    def token_file(self) -> Path:
        assert self.world.api.token_file is not None
        return self.world.api.token_file

    def remember(self) -> None:
        self.settings = self.world.agent_config.read_text()
        self.authentication = (self.agent_directory / "authentication.yaml").read_text()
        self.token = self.token_file.read_text()

    def restart_agent(self, *changes: tuple[str, str]) -> None:
        """Start the agent with changed settings; it is not expected to become ready."""
        self.stop_agent()
        text = self.settings
        for before, after in changes:
            assert re.search(before, text, re.M), before
            text = re.sub(before, after, text, count=1, flags=re.M)
        self.world.agent_config.write_text(text)
        agent_again(self.world, wait=False)

    def stop_agent(self) -> None:
        self.world.agent.kill()

    def repair(self) -> None:
        """Make everything as it was."""
        self.stop_agent()
        self.world.agent_config.write_text(self.settings)
        (self.agent_directory / "authentication.yaml").write_text(self.authentication)
        self.token_file.write_text(self.token)
        agent_again(self.world)

    def change_authentication(self, change: Callable[[dict[str, Any]], None], *changes: tuple[str, str]) -> None:
        document = json.loads(self.authentication)
        change(document["jwt"][0])
        (self.agent_directory / "authentication.yaml").write_text(json.dumps(document))
        self.restart_agent(*changes)

    def another_ca(self) -> Path:
        path = self.directory / "another-ca.crt"
        trustme.CA().cert_pem.write_to_path(str(path))
        return path

    def kubectl(self, user: User = ALICE) -> str:
        """Ask for pods as a user, which has to fail; what kubectl said."""
        client = self.world.start_client(user)
        try:
            done = self.cluster.kubectl("get", "pods", f"--kubeconfig={client.kubeconfig}", check=False)
            assert done.returncode != 0, done.stdout
            return str(done.stderr)
        finally:
            client.process.stop()

    def refused(self, code: ExitCode = ExitCode.LOGIN) -> str:
        """Start a client whose token is refused; what it said."""
        client = self.world.start_client(ALICE, ready=False)
        assert client.process.wait(30) == code
        return str(client.process.output())

    def examine(self) -> str:
        """The first failure that the doctor of a user's client finds."""
        done = self.world.run_client(ALICE, "doctor", self.world.cluster, "-o", "json", timeout=60)
        document = json.loads(done.stdout)
        assert (done.returncode == 0) == document["ok"], document
        failed = [hop for hop in document["hops"] if hop["state"] == "failed"]
        assert all(hop["remedy"] for hop in failed), document
        return str(document["cause"])

    def doctor(self, role: str) -> dict[str, Any]:
        config = self.world.relay_config if role == "relay" else self.world.agent_config
        done = run(arcbridge("--role", role, "doctor", "--config", str(config), "-o", "json"), check=False, timeout=60)
        document: dict[str, Any] = json.loads(done.stdout)
        assert (done.returncode == 0) == document["ok"]
        return document


# --- the faults: how each is made, and what makes it show ------------------------------------------------------------


def api_port(day: Day) -> None:
    day.restart_agent((r'^server = ".*"$', f'server = "https://127.0.0.1:{fixed_port()}"'))
    day.world.agent.wait_for_line("control connection up", timeout=30)


def api_ca(day: Day) -> None:
    day.restart_agent((r'^ca_file = ".*"$', f'ca_file = "{day.another_ca()}"'))
    day.world.agent.wait_for_line("control connection up", timeout=30)


def relay_pin(day: Day) -> None:
    day.restart_agent((r'^relay_ca_pin = ".*"$', f'relay_ca_pin = "sha256:{"01" * 32}"'))


def join_token(day: Day) -> None:
    """A new agent with the token that the first one has used."""
    shutil.rmtree(day.directory / "another-state", ignore_errors=True)
    day.restart_agent((r'^directory = "state"$', f'directory = "{day.directory / "another-state"}"'))


def public_address(day: Day) -> None:
    day.world.relay.signal(signal.SIGTERM)
    day.world.relay.wait(60)
    day.world.agent_routes[0] = f"127.0.0.1:{fixed_port()}"
    day.world.start_relay()
    # The agent's delay between two attempts has grown meanwhile.
    until(lambda: metrics(day.world.relay_observe)["arcbridge_relay_agents"] > 0, "the agent is connected", timeout=40)


def audit(day: Day) -> None:
    """The name of the log is taken by something else, as after a rotation that went wrong."""
    log = day.world.audit_log
    log.rename(log.with_suffix(".old"))
    log.mkdir()
    client = day.world.start_client(ALICE)
    try:
        # The log's name is looked at once a second at most, when there is something to write.
        until(lambda: _asked_in_vain(day, client), "the audit log fails", timeout=30)
    finally:
        client.process.stop()


def _asked_in_vain(day: Day, client: Client) -> bool:
    day.cluster.kubectl("get", "pods", f"--kubeconfig={client.kubeconfig}", check=False)
    return "audit log cannot be written" in day.world.agent.output()


class TwoIssuers:
    """Gives tokens for the cluster from another issuer than those for the relay."""

    def __init__(self, relay: Issuer, cluster: Issuer) -> None:
        self._relay, self._cluster = relay, cluster

    def mint(self, **claims: Any) -> str:
        return (self._cluster if claims["aud"] == CLUSTER_AUDIENCE else self._relay).mint(**claims)


def foreign_issuer(day: Day) -> None:
    own = day.world.issuer
    with Issuer(day.directory / "foreign") as issuer:
        day.world.issuer = TwoIssuers(own, issuer)
        try:
            said = day.refused()
            assert day.examine() == FAULTS["foreign-issuer"].users_see
        finally:
            day.world.issuer = own
        assert f'comes from the issuer "{issuer.url}", which its agent does not accept' in said
        assert re.search(r"\(session [0-9a-f]{16}\)", said)


def missing_claim(day: Day) -> None:
    def require(jwt: dict[str, Any]) -> None:
        jwt["claimValidationRules"] = [{"claim": "hd", "requiredValue": "example.com"}]

    day.change_authentication(require)
    day.world.wait_for_agent()
    said = day.refused()
    assert 'its agent requires the claim "hd", which' in said
    assert re.search(r"\(session [0-9a-f]{16}\)", said)


def issuer_ca(day: Day) -> None:
    pem = day.another_ca().read_text()
    # With token mode, whose users need no issuer, the agent would go on to be ready.
    token_mode = (r"^relays = ", "token_mode = false\nrelays = ")
    day.change_authentication(lambda jwt: jwt["issuer"].update(certificateAuthority=pem), token_mode)
    day.world.agent.wait_for_line("control connection up", timeout=30)
    said = day.refused(ExitCode.UNREACHABLE)
    assert "cannot fetch the keys of your login's issuer, so it cannot verify you" in said


def agent_token(day: Day) -> None:
    day.token_file.write_text("garbage")
    day.restart_agent()
    day.world.agent.wait_for_line("control connection up", timeout=30)
    said = day.kubectl()
    assert "the API server refuses the credential of this cluster's agent" in said
    assert "You must be logged in" not in said


def impersonation(day: Day) -> None:
    day.token_file.write_text(day.cluster.service_account_token("arcbridge", "without-rights"))
    day.restart_agent()
    day.world.agent.wait_for_line("control connection up", timeout=30)
    said = day.kubectl()
    assert "may not act as you: its account system:serviceaccount:arcbridge:without-rights lacks the right" in said
    assert "Forbidden" not in said


def mend_public_address(day: Day) -> None:
    day.world.relay.signal(signal.SIGTERM)
    day.world.relay.wait(60)
    day.world.agent_routes[0] = day.world.relay_listens[0]
    day.world.start_relay()
    day.repair()


def mend_audit(day: Day) -> None:
    day.world.audit_log.rmdir()
    day.repair()


@dataclass(frozen=True)
class Fault:
    """How a fault is made and mended, and what shows it besides the table's row."""

    make: Callable[[Day], None]
    users_see: str
    """What `arcbridge doctor` of a user finds: the hop behind which only the operator sees more."""
    unready: str = ""
    """The check that makes the agent unready."""
    mend: Callable[[Day], None] = Day.repair


FAULTS = {
    "api-port": Fault(api_port, "api_server", "api_server"),
    "api-ca": Fault(api_ca, "api_server", "api_server"),
    "relay-pin": Fault(relay_pin, "agent_missing"),
    "join-token": Fault(join_token, "agent_missing"),
    "public-address": Fault(public_address, "agent_refused", mend=mend_public_address),
    # An agent without its audit log serves users, unless `audit.on_failure` says otherwise.
    "audit": Fault(audit, "", mend=mend_audit),
    "foreign-issuer": Fault(foreign_issuer, "cluster_token_issuer"),
    "missing-claim": Fault(missing_claim, "cluster_token_claim"),
    "issuer-ca": Fault(issuer_ca, "agent_unavailable", "issuers"),
    "agent-token": Fault(agent_token, "agent_credential", "credential"),
    "impersonation": Fault(impersonation, "agent_impersonation", "impersonation"),
}


def readiness(day: Day) -> str:
    try:
        return page(day.world.agent_observe, "/readyz")
    except urllib.error.HTTPError as error:
        return error.read().decode()


# --- the day --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def day(cluster: Cluster, echo: EchoServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Day]:
    directory = tmp_path_factory.mktemp("day")
    token = directory / "token"
    token.write_text(cluster.service_account_token("arcbridge", "arcbridge-agent"))
    api = ApiServer(cluster.api_url, Path(cluster.ca_file), token)
    with World(api, directory=directory / "world") as world:
        world.targets["echo"] = (echo.address, (*ALICE.groups, *BOB.groups))
        world.start()
        day = Day(world, cluster, directory)
        day.remember()
        yield day


def test_the_table_has_all_eleven() -> None:
    assert [row.name for row in rows()] == list(FAULTS)


def process_of(day: Day, role: str) -> ManagedProcess:
    return day.world.relay if role == "relay" else day.world.agent


def sample(day: Day, name: str) -> float:
    port = day.world.relay_observe if name.startswith("arcbridge_relay") else day.world.agent_observe
    try:
        return metrics(port).get(name, 0.0)
    except (OSError, urllib.error.URLError):
        return 0.0


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_at_the_first_look(day: Day, name: str) -> None:
    fault, row = FAULTS[name], next(row for row in rows() if row.name == name)
    before = sample(day, row.metric) if row.value < 0 else 0.0
    former = process_of(day, row.log_role)
    mark = former.mark()
    try:
        fault.make(day)
        process = process_of(day, row.log_role)
        process.wait_for_line(re.escape(row.log), timeout=30, after=mark if process is former else START)
        if row.metric == "up":
            process.wait(30)
        elif row.value < 0:
            until(lambda: sample(day, row.metric) > before, row.metric)
        else:
            until(lambda: sample(day, row.metric) == row.value, row.metric)
        if name != "foreign-issuer":
            assert day.examine() == fault.users_see
        if fault.unready:
            until(lambda: f"[-] {fault.unready}: " in readiness(day), "the agent is not ready")
        document = day.doctor(row.doctor)
        found = {hop["code"]: hop for hop in document["hops"] if hop["state"] in ("failed", "warning")}
        assert row.code in found, document
        assert found[row.code]["remedy"]
        if document["cause"]:
            assert document["cause"] == row.code, "the first failure is the cause"
    except ProcessFailed as error:
        raise AssertionError(f"{name}: {error}") from None
    finally:
        fault.mend(day)


def test_when_all_is_repaired_nothing_is_found(day: Day) -> None:
    for role in ("agent", "relay"):
        document = day.doctor(role)
        assert document["ok"], document
        assert not [hop for hop in document["hops"] if hop["state"] == "failed"]
