"""An operator's faults: each is named at first look by a log line, a metric, and one command.

The table of docs/broken.md#operator-faults says how, and the test reads it. A row names the alert that its metric
raises, or why there is none. Rows that other tests hold name those. What a start refuses is refused by `config check`
in the same words. The world is that of `test_faults.py`, and each fault is repaired before the next one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from arcbridge.pki.authority import Authority
from tests.support import pages
from tests.support.issuer import Issuer
from tests.support.processes import ManagedProcess, ProcessFailed, require_or_skip, run
from tests.support.reports import metrics, until
from tests.support.world import ALICE, arcbridge, fixed_port

from .test_faults import BROKEN, Day
from .test_faults import day as day

ROOT = BROKEN.parents[1]


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    log: str
    metric: str
    alert: str
    command: str
    finding: str
    held: str


def rows() -> dict[str, Row]:
    """The table. Raises where a row is not as this test can read it."""
    text = BROKEN.read_text().partition('<a id="operator-faults"></a>')[2].partition("\n#")[0]
    found = {}
    for part in re.split(r'\n\* <a id="operator-fault-', text)[1:]:
        name, words = part.partition('"')[0], " ".join(part.split())
        cells = dict(re.findall(r"\* \*([A-Z][a-z ]+):\* (.*?)(?= \* \*|$)", words))
        command = re.match(r"`([a-z ]+)`: `(.+?)`", cells.get("Command", ""))
        if not {"Log line", "Metric", "Alert"} <= set(cells) or (command is None and "Held by" not in cells):
            raise AssertionError(f"this row cannot be read: {part}")
        log, metric = re.match(r"`(.+?)`", cells["Log line"]), re.match(r"`(.+?)`", cells["Metric"])
        found[name] = Row(
            name,
            log[1] if log else "",
            metric[1] if metric else "",
            cells["Alert"],
            command[1] if command else "",
            command[2] if command else "",
            cells.get("Held by", ""),
        )
    return found


# -- looking -----------------------------------------------------------------------------------------------------------


def examined(day: Day, row: Row) -> None:
    """Run the row's command: what it prints has the finding, as a code or as words."""
    role, _, what = row.command.partition(" ")
    if role == "client":
        done = day.world.run_client(ALICE, "doctor", day.world.cluster, "-o", "json", timeout=60)
        assert f'"code": "{row.finding}"' in done.stdout, done.stdout
        return
    config = day.world.relay_config if role == "relay" else day.world.agent_config
    done = run(arcbridge("--role", role, *what.split(), "--config", str(config), "-o", "json"), check=False, timeout=60)
    said = json.loads(done.stdout)
    if what == "doctor":
        found = {hop["code"] for hop in said["hops"] if hop["state"] in ("failed", "warning")}
        assert row.finding in found, said
    else:
        messages = [one["message"] for one in said["problems"] if one["severity"] == "error"]
        assert any(row.finding in one for one in messages), said
        assert done.returncode == 2


def log_and_metric(day: Day, row: Row, process: ManagedProcess, **options: Any) -> None:
    """Wait for the row's log line and metric."""
    process.wait_for_line(re.escape(row.log), timeout=30, **options)
    if row.metric:
        name, _, value = row.metric.partition(" ")
        port = day.world.relay_observe if name.startswith("arcbridge_relay") else day.world.agent_observe
        until(
            lambda: metrics(port).get(name, 0.0) == float(value) if value else metrics(port).get(name, 0.0) > 0,
            row.metric,
        )


# -- faults of the agent and of tokens ---------------------------------------------------------------------------------


def uids(day: Day) -> None:
    cluster = day.cluster
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "by-hand"}}
    rules = [{"apiGroups": [""], "resources": ["users", "groups"], "verbs": ["impersonate"]}]
    cluster.apply({**role, "rules": rules})
    token = cluster.service_account_token("arcbridge", "by-hand")
    cluster.grant("by-hand", service_account=("arcbridge", "by-hand"))
    day.token_file.write_text(token)
    day.change_authentication(lambda jwt: jwt["claimMappings"].update(uid={"claim": "sub"}))
    day.world.agent.wait_for_line("impersonation_attributes", timeout=30)
    said = day.kubectl()
    assert re.search(r'may not act as you: .* lacks the right .{1,4}impersonate.{1,4} for "?uids', said)
    assert "user-info" not in said


def relays(day: Day, *further: str) -> None:
    listed = json.dumps([*further, day.world.relay_url])
    day.restart_agent((r"^relays = .*$", f"relays = {listed}"))


def audience(day: Day) -> None:
    day.change_authentication(lambda jwt: jwt["issuer"].update(audiences=["another"]))
    day.world.wait_for_agent()
    assert "arcbridge-cluster" in day.refused()


def trailing_slash(day: Day) -> None:
    day.change_authentication(
        lambda jwt: jwt["issuer"].update(url=f"{jwt['issuer']['url']}/"),
        (r"^relays = ", "token_mode = false\nrelays = "),
    )


def username(day: Day) -> None:
    day.change_authentication(lambda jwt: jwt["claimMappings"].update(username={"claim": "upn", "prefix": ""}))
    day.world.wait_for_agent()
    day.refused()


class OtherClaims:
    """An issuer that puts further claims into tokens."""

    def __init__(self, issuer: Issuer, claims: dict[str, int]) -> None:
        self._issuer, self._claims = issuer, claims

    def mint(self, **claims: Any) -> str:
        return self._issuer.mint(**claims, claims=self._claims)


@contextmanager
def minted(day: Day, **claims: int) -> Iterator[None]:
    """Tokens with other claims."""
    own = day.world.issuer
    day.world.issuer = OtherClaims(own, claims)
    try:
        yield
    finally:
        day.world.issuer = own


AGENT: dict[str, Callable[[Day], None]] = {
    "3": uids,
    "8": lambda day: relays(day, "https://no-such-relay.invalid"),
    "9": lambda day: relays(day, f"https://127.0.0.1:{fixed_port()}"),
    "11": audience,
    "12": trailing_slash,
    "13": username,
}


@pytest.mark.parametrize("name", AGENT)
def test_a_fault_of_the_agents_settings(day: Day, name: str) -> None:
    row = rows()[name]
    try:
        AGENT[name](day)
        log_and_metric(day, row, day.world.agent)
        examined(day, row)
    except ProcessFailed as error:
        raise AssertionError(f"{name}: {error}") from None
    finally:
        day.repair()


def test_two_clusters_with_one_name(day: Day) -> None:
    """The one that comes second is refused, and all of the remedy is there."""
    row, mark = rows()["19"], day.world.relay.mark()
    try:
        (day.agent_directory / "join-token").write_text(day.world.join_token()[0])
        shutil.rmtree(day.directory / "second-state", ignore_errors=True)
        day.restart_agent((r'^directory = "state"$', f'directory = "{day.directory / "second-state"}"'))
        day.world.agent.wait_for_line("or have the operator make a join token with --rebind", timeout=30)
        log_and_metric(day, row, day.world.relay, after=mark)
        examined(day, row)
    finally:
        day.repair()


def test_clocks_that_differ(day: Day) -> None:
    row, mark, issued = rows()["15"], day.world.relay.mark(), int(time.time()) + 600
    with minted(day, iat=issued, nbf=issued, exp=issued + 3600):
        day.world.start_client(ALICE, ready=False).process.wait(60)
        log_and_metric(day, row, day.world.relay, after=mark)
    examined(day, row)


def test_an_expired_token(day: Day) -> None:
    """It is not sent: the client's machine has all of it."""
    row, issued = rows()["16"], int(time.time()) - 7200
    with minted(day, iat=issued, nbf=issued, exp=issued + 3600):
        assert row.log in day.world.run_client(ALICE, "clusters").stderr
        examined(day, row)


# -- faults of the relay: what a start refuses -------------------------------------------------------------------------


class Relay:
    """A second relay's files, which are good until a test breaks them."""

    def __init__(self, day: Day, directory: Path) -> None:
        self.directory = directory
        for name in ("authentication.yaml", "policy.toml"):
            shutil.copy2(day.world.relay_config.parent / name, directory / name)
        self.config = directory / "relay.toml"
        self.settings = {
            "listen": f"127.0.0.1:{fixed_port()}",
            "public_address": "relay.test:443",
            "data_dir": "data",
            "authentication": "authentication.yaml",
            "policy": "policy.toml",
        }
        self.tables = f'[observe]\nlisten = "127.0.0.1:{fixed_port()}"\n'

    def command(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        lines = [f'{name} = "{value}"' for name, value in self.settings.items()]
        self.config.write_text("\n".join([*lines, self.tables]))
        return run(arcbridge("--role", "relay", "--config", str(self.config), *words), check=False, timeout=60)


@pytest.fixture
def relay(day: Day, tmp_path: Path) -> Relay:
    made = Relay(day, tmp_path)
    assert made.command("config", "check").returncode == 0
    return made


@contextmanager
def port_taken(relay: Relay, day: Day) -> Iterator[None]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        relay.settings["listen"] = f"127.0.0.1:{taken.getsockname()[1]}"
        yield


@contextmanager
def observe_taken(relay: Relay, day: Day) -> Iterator[None]:
    relay.tables = f'[observe]\nlisten = "127.0.0.1:{day.world.relay_observe}"\n'
    yield


@contextmanager
def one_data_dir(relay: Relay, day: Day) -> Iterator[None]:
    if os.geteuid():
        require_or_skip("uid", "only root sees which relay has a data directory; to others it is a warning")
    relay.settings["data_dir"] = str(day.world.relay_config.parent / "data")
    yield


@contextmanager
def full_disk(relay: Relay, day: Day) -> Iterator[None]:
    data = relay.directory / "data"
    data.mkdir()
    if run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "none", str(data)], check=False).returncode:
        require_or_skip("mount", "this user may mount nothing")
    try:
        yield
    finally:
        run(["umount", str(data)])


@contextmanager
def open_key(relay: Relay, day: Day) -> Iterator[None]:
    assert relay.command("token", "create", "--cluster", "a").returncode == 0
    (relay.directory / "data" / "ca.key").chmod(0o644)
    yield


@contextmanager
def no_key(relay: Relay, day: Day) -> Iterator[None]:
    assert relay.command("token", "create", "--cluster", "a").returncode == 0
    (relay.directory / "data" / "ca.key").unlink()
    yield


def tls(relay: Relay, *, days: float, fits: bool) -> None:
    authority = Authority.create("x", clock=lambda: time.time() - days * 86400)
    first, second = (authority.issue_server(["relay.test"]) for _ in range(2))
    (relay.directory / "tls.crt").write_text(first.certificate_pem)
    (relay.directory / "tls.key").write_text((first if fits else second).key_pem)
    (relay.directory / "tls.key").chmod(0o600)
    relay.tables += '[tls]\ncertificate = "tls.crt"\nkey = "tls.key"\n'


@contextmanager
def expired(relay: Relay, day: Day) -> Iterator[None]:
    tls(relay, days=100, fits=True)
    yield


@contextmanager
def other_key(relay: Relay, day: Day) -> Iterator[None]:
    tls(relay, days=0, fits=False)
    yield


STARTS = {
    "20-listen": port_taken,
    "20-observe": observe_taken,
    "20-data": one_data_dir,
    "21-disk": full_disk,
    "21-mode": open_key,
    "21-key": no_key,
    "22-expired": expired,
    "22-pair": other_key,
}


@pytest.mark.parametrize("name", STARTS)
def test_what_a_start_refuses_is_refused_by_the_check_in_the_same_words(day: Day, relay: Relay, name: str) -> None:
    row = rows()[name]
    with STARTS[name](relay, day):
        check = relay.command("config", "check")
        start = relay.command()
    assert (check.returncode != 0, start.returncode != 0) == (True, True), (check.stderr, start.stderr)
    first = check.stderr.decode().splitlines()[0]
    # The log goes there, too, by a thread of its own.
    last = [line for line in start.stderr.decode().splitlines() if not line.startswith("{")][-1]
    assert row.finding in first
    assert row.log in last
    said = last.removeprefix("error: ")
    assert first.endswith(said.partition(": ")[2] if said.startswith(str(relay.config)) else said)


def test_a_certificate_with_a_day_left_is_a_warning_and_a_relay_that_runs_is_in_no_way(day: Day, relay: Relay) -> None:
    tls(relay, days=89.5, fits=True)
    check = relay.command("config", "check")
    assert check.returncode == 0
    assert "expires in 12.0 h: replace it now" in check.stderr.decode()
    line = arcbridge("--role", "relay", "--config", str(day.world.relay_config), "config", "check")
    assert run(line, check=False).returncode == 0, "before a reload"


def test_few_descriptors(day: Day, tmp_path: Path) -> None:
    row = rows()["23"]
    day.world.relay.signal(signal.SIGTERM)
    day.world.relay.wait(60)
    day.world.relay_prefixes[0] = ("prlimit", "--nofile=256:256")
    with ExitStack() as stack:
        stack.callback(mend_descriptors, day)
        log_and_metric(day, row, day.world.start_relay())
        examined(day, row)


def mend_descriptors(day: Day) -> None:
    day.world.relay.signal(signal.SIGTERM)
    day.world.relay.wait(60)
    day.world.relay_prefixes[0] = ()
    day.world.start_relay()
    day.repair()


def test_a_policy_that_cannot_be_read(day: Day) -> None:
    row, file, mark = rows()["4"], day.world.relay_config.parent / "policy.toml", day.world.relay.mark()
    before = file.read_text()
    try:
        file.write_text(before.replace("clusters", "clustres"))
        log_and_metric(day, row, day.world.relay, after=mark)
        examined(day, row)
    finally:
        file.write_text(before)
    until(lambda: metrics(day.world.relay_observe)['arcbridge_relay_check_ok{check="policy"}'] == 1, "it is mended")


# -- the table ---------------------------------------------------------------------------------------------------------


def is_read(series: str, expression: str) -> bool:
    """Return whether a rule's expression has a series by its whole name, or by a pattern of names."""
    patterns = re.findall(r'__name__=~"([^"]*)"', expression)
    words = re.findall(r"[\w:]+", re.sub(r'"[^"]*"', "", expression))
    return series in words or any(re.fullmatch(pattern, series) for pattern in patterns)


def test_the_table_is_whole_and_true() -> None:
    """Each fault has a row; an alert is one of the rules, and reads the row's metric; a test that is cited exists."""
    table = rows()
    assert {name.partition("-")[0] for name in table} == {str(number) for number in range(1, 26)}
    tried = {*AGENT, *STARTS, "4", "15", "16", "19", "23"}
    rules = yaml.safe_load((ROOT / "config" / "prometheus" / "rules.yaml").read_text())
    alerts = {rule["alert"]: rule["expr"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    for row in table.values():
        assert (row.name in tried) != bool(row.held), row
        alert = re.match(r"`(Arcbridge\w+)`", row.alert)
        assert alert or row.alert.startswith("none: "), row
        if alert:
            series = re.match(r"\w+", row.metric)
            assert series is not None
            assert is_read(series[0], alerts[alert[1]]), row
        for path, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)", row.held):
            assert f"def {test}(" in (ROOT / path).read_text(), row
        for anchor in re.findall(r"#(fault-[a-z-]+)", row.held):
            assert f'id="{anchor}"' in pages.read(BROKEN), row
