"""What each command prints in typical, empty and failing states, for `test_snapshots`: command lines, and what the
parts that they ask reply. The command lines run whole, from the parser to the printed text; no process, socket or clock
is used.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from arcbridge.agent.recording.opened import Difference
from arcbridge.audit.verify import ChainFinding, Report
from arcbridge.checks.diagnosis import Finding, directory_finding, key_finding, ok, skipped
from arcbridge.cli.administration import format_done, format_list
from arcbridge.client.background.caller import NotRunning, OtherVersion
from arcbridge.client.commands import elevation
from arcbridge.client.commands.administration import Answered
from arcbridge.client.commands.sign_in import LoggedIn
from arcbridge.client.credentials.identity_summary import IdentitySummary
from arcbridge.client.credentials.jwt_unverified import UnverifiedClaims
from arcbridge.client.doctor.access_judgement import LoginFacts, SessionFacts, judge_login, judge_policy, judge_session
from arcbridge.client.doctor.kubeconfig_hop import ContextFacts, judge_kubeconfig
from arcbridge.client.doctor.relay_hops import CertificateText, judge_certificate, judge_clock
from arcbridge.errors import (
    ArcbridgeError,
    JoinRefused,
    PermissionRefused,
    PinMismatch,
    Unauthenticated,
    Unreachable,
    UntrustedCertificate,
)
from arcbridge.net.join import JoinCode
from arcbridge.pki.pins import mismatch_message
from arcbridge.relay.backup import Manifest, Restored
from tests.agent.elevation.documents import request_document, rule_document

NOW = 1_800_000_000.0
PIN, OTHER_PIN = "sha256:" + "71c2" * 16, "sha256:" + "0b9e" * 16
RELAY = ("--relay", "https://relay.example.org", "--access-token-file", "access", "--id-token-file", "id")

Patch = Callable[[pytest.MonkeyPatch], None]


class Scene:
    """A command line, and what is put in the place of the parts that it asks."""

    def __init__(self, line: str, *patches: Patch, title: str = "") -> None:
        self.words = [part for word in line.split() for part in (RELAY if word == "RELAY" else (word,))]
        self.title = title or line.replace(" RELAY", "")
        self.patches = patches


def put(name: str, value: object) -> Patch:
    """Put a value in the place of what a dotted name names."""
    return lambda patch: patch.setattr(name, value)


def answers(name: str, value: object) -> Patch:
    """Let a coroutine function return a value, or raise it."""

    async def answer(*args: object, **options: object) -> object:
        if isinstance(value, BaseException):
            raise value
        return copy.deepcopy(value)

    return put(name, answer)


def returns(name: str, value: object) -> Patch:
    """Let a function return a value, or raise it."""

    def answer(*args: object, **options: object) -> object:
        if isinstance(value, BaseException):
            raise value
        return value

    return put(name, answer)


# --- the client -------------------------------------------------------------------------------------------------------

CLUSTER_ROWS = [
    {
        "name": "berlin-factory",
        "state": "Connected",
        "agents": 2,
        "last_seen": NOW - 3,
        "version": "0.1.0+1f2e3d4c",
        "certificate_expires": NOW + 86400 * 20,
        "ca_pin": PIN,
    },
    {
        "name": "munich",
        "state": "Offline",
        "agents": 0,
        "last_seen": NOW - 86400 * 3,
        "version": "0.1.0+1f2e3d4c",
        "certificate_expires": NOW - 5,
        "ca_pin": PIN,
    },
    {"name": "warehouse-hamburg-harbour-north-gate-2", "state": "Connecting", "agents": 0},
    {"name": "shanghai", "state": "Revoked 撤销\u202e", "agents": 0, "last_seen": NOW - 90},
]


def cluster_rows(rows: object) -> Patch:
    return answers("arcbridge.client.commands.directory.list_clusters", rows)


PROCESS = {"pid": 4711, "version": "0.1.0", "since": NOW - 7300, "former_versions": 0}
SERVED = [
    {
        "name": "berlin-factory",
        "user": "alice@example.com",
        "port": 47011,
        "contexts": ["berlin-factory"],
        "state": "connected",
        "relay": "relay-eu.example.org:443",
        "round_trip": 0.0124,
        "since": NOW - 7200,
        "bytes_to_cluster": 123456,
        "bytes_from_cluster": 98765432,
        "token_expires": NOW + 1800,
        "reason": "",
    },
    {
        "name": "munich",
        "user": "陈伟@example.com",
        "port": 47012,
        "contexts": ["munich", "munich-2"],
        "state": "waiting",
        "relay": "relay-eu.example.org:443",
        "round_trip": 0.0,
        "since": NOW - 60,
        "bytes_to_cluster": 0,
        "bytes_from_cluster": 0,
        "token_expires": 0,
        "reason": 'no agent of the cluster "munich" is connected; it was seen last 3 days ago',
    },
]


def background(reply: object) -> Patch:
    """Let the background process reply, or let the question to it fail."""
    sent = reply if isinstance(reply, BaseException) else json.dumps(reply).encode()

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        returns("arcbridge.cli.background.exchange", sent)(monkeypatch)
        returns("arcbridge.cli.background.ask", reply)(monkeypatch)
        monkeypatch.setattr("arcbridge.cli.background.answer_of", json.loads)

    return patch


def connects(*replies: object) -> Patch:
    """Let the background process answer each cluster with one of these."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        rest = iter(replies)

        def ask(*_: object) -> object:
            reply = next(rest)
            if isinstance(reply, BaseException):
                raise reply
            return reply

        monkeypatch.setattr("arcbridge.cli.background.ask", ask)
        monkeypatch.setattr("arcbridge.client.background.connecting.is_to_be_trusted", lambda *_: False)
        monkeypatch.setattr("arcbridge.client.background.connecting.login_may_help", lambda *_: False)

    return patch


def known(*names: str) -> Patch:
    return returns("arcbridge.client.state.StateDirectory.cluster_names", list(names))


CLAIMS = UnverifiedClaims(NOW + 3600, subject="alice@example.com", audiences=("arcbridge-relay",))


def way() -> list[Finding]:
    """What the client's doctor says of a way that works up to the relay's policy."""
    shown = CertificateText(("relay.example.org",), NOW, NOW + 86400 * 31)
    cluster = replace(CLAIMS, audiences=("arcbridge-berlin-factory",))
    return [
        ok("name resolution", "relay.example.org is 192.0.2.10"),
        skipped("outbound proxy", "none for this relay (HTTPS_PROXY, ALL_PROXY, NO_PROXY)"),
        ok("TCP", "relay.example.org:443 accepts connections (12 ms)"),
        judge_certificate("relay certificate", "relay.example.org", shown, None, "the pinned CA", NOW),
        judge_clock("clock", 0.0),
        judge_login(LoginFacts(relay=CLAIMS, cluster=cluster, bound="DPoP"), NOW),
        judge_policy(None, ["berlin-factory"], "berlin-factory", CLAIMS),
    ]


def broken_way() -> list[Finding]:
    """The same, with a clock that is wrong and without an agent."""
    facts = SessionFacts("berlin-factory", JoinRefused(JoinCode.NO_AGENT, "no agent"))
    held = ContextFacts("berlin-factory", "berlin-factory", 47011, listening=True, holder="user mallory")
    return [
        *(judge_clock("clock", -40.0) if one.hop == "clock" else one for one in way()),
        *judge_session(facts, CLAIMS),
        skipped("API server", "there is no session to ask it through"),
        judge_kubeconfig([held], "berlin-factory"),
    ]


def pinned_way() -> list[Finding]:
    """What it says of a relay, and of a cluster, whose pins are others than those that are known."""
    relay = PinMismatch(mismatch_message("the relay's CA", PIN, OTHER_PIN))
    cluster = PinMismatch(mismatch_message('the CA of cluster "berlin-factory"', PIN, OTHER_PIN))
    return [
        judge_certificate("relay certificate", "relay.example.org", CertificateText(), relay, "the pinned CA", NOW),
        *judge_session(SessionFacts("berlin-factory", cluster), CLAIMS),
    ]


def of_issuers() -> list[Finding]:
    """What the relay's doctor says of issuers, and of directories of groups."""
    url = "https://login.example.org"
    return [
        key_finding("jwt[0]", url, True, None),
        key_finding("jwt[1]", url, False, UntrustedCertificate("its certificate is of no CA that is trusted here")),
        directory_finding("graph.main", False, "graph_permission", "Microsoft Graph refuses the application (403)"),
    ]


def examined(findings: Callable[[], list[Finding]]) -> Patch:
    async def examine(context: object, cluster: str, report: Callable[[Finding], None], *, throughput: bool) -> None:
        for finding in findings():
            report(finding)

    return put("arcbridge.client.doctor.examination.examine", examine)


WHO = IdentitySummary(
    "alice@example.com",
    "alice",
    "https://login.example.org",
    "https://relay.example.org",
    NOW + 3600,
    True,
    "kI3vX0m2bqVY7mUQjJpXcZyY3l5b1ZkqQ0c8dXrM9uA",
)


PINS = [
    {
        "name": "berlin",
        "relay": "https://relay.example.org",
        "pin": PIN,
        "followed_by": "sha256:" + "5e0d" * 16,
        "file": "/home/alice/pins.toml",
    }
]


def who(value: object) -> Patch:
    return returns("arcbridge.client.credentials.identity_summary.summary_of", value)


def logs_in(by: str) -> Patch:
    """Let `login` show what `client.credentials.login` shows of a login by a code (`device`), or find one (`kept`)."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        from arcbridge.client.credentials.login import Login
        from arcbridge.client.credentials.token_cache import TokenSet
        from arcbridge.settings.config import LoginConfig

        async def log_in(config: object, relays: object, terminal: Any, **_: object) -> LoggedIn:
            class AtIssuer:
                url, origins = "https://login.example.org", ("https://login.example.org",)

                async def post(self, *_: object) -> Mapping[str, object]:
                    page = f"{self.url}/device"
                    return {
                        "device_code": "d",
                        "user_code": "WKMD-MTPP",
                        "verification_uri": page,
                        "expires_in": 600,
                        "verification_uri_complete": f"{page}?user_code=WKMD-MTPP",
                    }

                def has(self, page: str) -> bool:
                    return page.startswith(self.url)

            class Endpoints:
                device_authorization = "https://login.example.org/d"

            async def polled(self: object, *_: object) -> TokenSet:
                return TokenSet()

            monkeypatch.setattr(Login, "_poll", polled)
            login = Login(LoginConfig(issuer=AtIssuer.url, client_id="arcbridge"), None, say=terminal.tell)
            if by == "device":
                await login._device_code(AtIssuer(), Endpoints())
            return LoggedIn("alice@example.com", NOW + 3600, "https://relay.example.org", already=by == "kept")

        monkeypatch.setattr("arcbridge.client.commands.sign_in.log_in", log_in)

    return patch


def lends(*found: Mapping[str, Any], refused: ArcbridgeError | None = None) -> Patch:
    """Let the cluster have these requests, or refuse to do anything."""

    class Cluster:
        async def user(self) -> tuple[str, tuple[str, ...]]:
            return "alice", ("dev",)

        async def rules(self) -> list[Any]:
            return [elevation._rule(rule_document())]

        async def requests(self) -> list[Any]:
            return [elevation._elevation(one) for one in found]

        async def one(self, *_: object) -> Any:
            if refused is not None:
                raise refused
            return elevation._elevation(found[0])

        ask = begun = approve = deny = withdraw = one

    @asynccontextmanager
    async def given(context: object) -> AsyncIterator[Cluster]:
        yield Cluster()

    return put("arcbridge.client.commands.elevation.elevations_of", given)


LENT = request_document("alice-x7k2p", groups=["oidc:operators"], begins=NOW - 60)
ASKED = request_document("chen-b4q9z", user="陈伟@example.com", rule="incident", approved=())
NOT_LOGGED_IN = Unauthenticated(
    "you are not logged in at https://relay.example.org; run `arcbridge login https://relay.example.org`"
)


def refused(cluster: str) -> PermissionRefused:
    return PermissionRefused(
        f'cluster "{cluster}" does not exist or you may not reach it; ask the relay\'s operator for access'
    )


DOWN = Unreachable(
    "no relay answers: https://relay.example.org cannot be reached (connection refused); check its address and this "
    "machine's network"
)
LONG = ArcbridgeError(
    "the agent may not act as users: its ServiceAccount has no right to impersonate `uids`\n"
    "have the cluster's owner install the chart again, or add the rule: `kubectl -n arcbridge describe clusterrole`"
)

BUNDLED = (
    returns(
        "arcbridge.bundle.sources.Collector.collect",
        ({"doctor.json": b"{}"}, {"metrics.txt": "observe.listen is not set, so that no metrics are served"}),
    ),
    returns("arcbridge.cli.bundle.pack", b"x" * 34_000),
    returns("arcbridge.cli.bundle.write_new", None),
)

CLIENT = {
    "clusters": [
        Scene("clusters RELAY", cluster_rows(CLUSTER_ROWS)),
        Scene("clusters RELAY -o wide", cluster_rows(CLUSTER_ROWS)),
        Scene("clusters RELAY", cluster_rows([]), title="clusters, with none"),
        Scene("clusters RELAY", cluster_rows(NOT_LOGGED_IN), title="clusters, without a login"),
        Scene("clusters RELAY", cluster_rows(DOWN), title="clusters, without a relay"),
    ],
    "status": [
        Scene("status", background({"process": PROCESS, "clusters": SERVED}), who(WHO)),
        Scene("status -o wide", background({"process": PROCESS, "clusters": SERVED}), who(WHO)),
        Scene(
            "status",
            background(
                {"process": PROCESS, "clusters": [{**SERVED[0], "restricted": ["read-only", "namespaces=shop"]}]}
            ),
            who(WHO),
            title="status, with fewer rights",
        ),
        Scene(
            "status",
            background({"process": {**PROCESS, "former_versions": 1}, "clusters": []}),
            title="status, nothing connected",
        ),
        Scene("status", background(NotRunning()), title="status, no process"),
        Scene("status", background(OtherVersion("0.0.9")), title="status, another version"),
    ],
    "connect": [
        Scene(
            "connect berlin-factory munich RELAY",
            connects(
                {"port": 47011, "context": "berlin-factory", "current": True},
                {"port": 47012, "context": "munich", "current": False},
            ),
        ),
        Scene("connect berlin-factry RELAY", connects(refused("berlin-factry")), known("berlin-factory", "munich")),
        Scene("connect prague RELAY", connects(refused("prague")), known("berlin-factory", "munich")),
        Scene("connect berlin RELAY", connects(DOWN)),
        Scene("disconnect berlin", background({"disconnected": [{"cluster": "berlin", "context": "berlin"}]})),
        Scene("disconnect --all", background({"disconnected": []}), title="disconnect --all, nothing connected"),
        Scene("stop", returns("arcbridge.cli.background.stop_process", None)),
        Scene("stop", returns("arcbridge.cli.background.stop_process", NotRunning()), title="stop, no process"),
        Scene("logs", title="logs, no process has run"),
        Scene("uninstall --yes", title="uninstall, nothing is there"),
    ],
    "doctor": [
        Scene("doctor berlin-factory RELAY", examined(broken_way)),
        Scene("doctor berlin-factory RELAY", examined(pinned_way), title="doctor, other pins"),
        Scene("doctor RELAY", examined(way), title="doctor, all is well"),
        Scene("--role relay doctor", answers("arcbridge.relay.doctor.diagnose", of_issuers())),
        *(Scene(line, *BUNDLED) for line in ("bundle report.tar.gz", "bundle --without-names report.tar.gz")),
    ],
    "elevation": [
        Scene("elevate -n berlin --for 30m --reason INC-42 RELAY", lends(LENT)),
        Scene(
            "elevate -n berlin --reason INC-42 --group admins RELAY", lends(LENT), title="elevate, no rule gives that"
        ),
        Scene("approve -n berlin chen-b4q9z RELAY", lends(ASKED)),
        Scene(
            "approve -n berlin chen-b4q9z RELAY",
            lends(
                refused=elevation.ElevationRefused(
                    "an approval is its writer's own, and never for the writer's own request"
                )
            ),
            title="approve, one's own",
        ),
        Scene("deny -n berlin chen-b4q9z --reason none RELAY", lends(ASKED)),
        Scene("withdraw -n berlin alice-x7k2p RELAY", lends(LENT)),
        Scene("elevations -n berlin RELAY", lends(LENT, ASKED)),
        Scene("elevations -n berlin -o wide RELAY", lends(LENT, ASKED)),
        Scene("elevations -n berlin -o json RELAY", lends(LENT)),
        Scene("elevations -n berlin RELAY", lends(), title="elevations, with none"),
    ],
    "login": [
        Scene("login RELAY", logs_in("device"), title="login by a code"),
        Scene("login RELAY", logs_in("kept"), title="login, when logged in"),
        Scene("whoami RELAY", who(WHO)),
        Scene("trust RELAY", returns("arcbridge.client.commands.pins.known_pins", PINS)),
        Scene("trust berlin RELAY", returns("arcbridge.client.commands.pins.known_pins", [])),
        Scene(
            "trust berlin --renew RELAY",
            returns("arcbridge.client.commands.pins.known_pins", PINS),
            answers("arcbridge.client.commands.pins.renew", PIN),
        ),
        Scene("whoami RELAY", who(NOT_LOGGED_IN), title="whoami, without a login"),
        Scene("logout", title="logout, without a login"),
        Scene("clusters RELAY", cluster_rows(LONG), title="an error of two sentences"),
    ],
    "usage": [
        Scene("stauts"),
        Scene("connect --contxt x"),
        Scene("token"),
        Scene("forward"),
        Scene("config check"),
        Scene("clusters -o wdie RELAY"),
        Scene("completion tcsh"),
        Scene("run -n a"),
        Scene("--role king"),
        Scene("-n BERLIN"),
        Scene("speedtest x"),
        Scene("--role client config check RELAY"),
    ],
}

# --- administrators ---------------------------------------------------------------------------------------------------

LISTS: dict[str, list[dict[str, Any]]] = {
    "token list": [
        {
            "id": "k7dq2x4m",
            "cluster": "berlin",
            "state": "open",
            "used": 0,
            "uses": 1,
            "created": NOW - 60,
            "expires_at": NOW + 3600,
        },
        {
            "id": "p9rs5t6v",
            "cluster": "warehouse-hamburg-harbour",
            "state": "used up",
            "used": 3,
            "uses": 3,
            "created": NOW - 86400,
            "expires_at": NOW - 60,
        },
    ],
    "cluster list": [
        {
            "name": "berlin-factory",
            "state": "Connected",
            "agents": 2,
            "ready": 2,
            "failing": "",
            "sessions": 14,
            "round_trip": 0.0124,
            "last_seen": NOW - 3,
            "certificate_expires": NOW + 86400 * 20,
            "version": "0.1.0+1f2e3d4c",
            "cluster_ca_pin": PIN,
            "newest_relay_ca": 1,
            "newest_cluster_ca": 2,
        },
        {"name": "munich", "state": "Offline", "agents": 0, "last_seen": NOW - 86400 * 3, "cluster_ca_pin": PIN},
    ],
    "session list": [
        {
            "session": "01k5v8m2q4x7z9b3",
            "user": "alice@example.com",
            "cluster": "berlin-factory",
            "since": NOW - 600,
            "bytes_to_agent": 123456,
            "bytes_to_client": 98765432,
            "round_trip": 0.0124,
            "actor": "release-bot",
            "restricted": "read-only namespaces",
            "agent": "berlin-factory-0",
            "relay": "relay-1",
            "worker": 2,
        }
    ],
    "refusal list": [
        {
            "at": NOW - 600,
            "user": "mallory@example.com",
            "cluster": "berlin-factory",
            "code": "FORBIDDEN",
            "rule": "policy.rule",
            "reason": "the policy does not allow it",
            "times": 3,
            "session": "01k5v8m2q4x7z9b3",
            "relay": "relay-1",
            "worker": 2,
        }
    ],
    "user list": [
        {
            "user": "bob@example.com",
            "before": NOW - 60,
            "revoked_at": NOW - 50,
            "reason": "the laptop was lost on the train to Hamburg, and the disk was not encrypted",
        }
    ],
    "recovery list": [{"cluster": "munich", "last_seen": NOW - 86400}],
    "policy list": [
        {"hash": "3f9c2a17d5e8", "rules": 12, "held": "", "reason": "", "relay": "relay-1", "worker": 1},
        {
            "hash": "3f9c2a17d5e8",
            "rules": 12,
            "held": "8e5d71a2c9f3",
            "reason": "test 3 fails: alice may not reach munich by the new version",
            "relay": "relay-1",
            "worker": 2,
        },
    ],
}
DONE = {
    "token delete k7dq2x4m": [{"id": "k7dq2x4m"}],
    "cluster revoke munich": [{"cluster": "munich", "known": True}],
    "cluster revoke munihc": [{"cluster": "munihc", "known": False}],
    "cluster restore munich": [{"cluster": "munich"}],
    "cluster delete munich": [{"cluster": "munich"}],
    "session end 01k5": [{"session": "01k5v8m2q4x7z9b3", "user": "alice@example.com", "cluster": "berlin-factory"}],
    "user revoke bob": [{"user": "bob", "before": NOW}],
    "user restore bob": [{"user": "bob"}],
}


def administered(rows: object) -> Patch:
    return answers("arcbridge.client.commands.administration.administer", Answered(rows, False))


def prints(name: str, text: Callable[[], str]) -> Patch:
    """Let a command print a text."""

    def printed(_: object) -> int:
        sys.stdout.write(text())
        return 0

    return put(name, printed)


TOKEN = {
    "token": "eb81d3e8b9e9786d.3B0qaYOpxPEa5W8ndXcz-lVPH6YMaWszXq4K1fDp3p8",
    "cluster": "berlin",
    "uses": 1,
    "expires_at": NOW + 3600,
    "relay": "https://relay.example.org",
    "relay_ca_pin": PIN,
}
MANIFEST = Manifest(
    1,
    NOW,
    "0.1.0",
    "sqlite",
    9,
    PIN,
    12,
    ["munich"],
    1,
    2,
    {name: "0" * 64 for name in ("registry.db", "ca.crt", "ca.key", "relay.toml", "policy.toml")},
)
REASON = 'allow[0] (policy.toml, line 4) allows it, by the group "oidc:platform-engineers"'
EXPLAINED = {
    "user": "alice@example.com",
    "actor": "",
    "groups": ["oidc:platform-engineers"],
    "cluster": "berlin-factory",
    "allowed": True,
    "known": True,
    "reason": REASON,
    "policy": "3f9c2a17d5e8",
    "running": True,
    "cluster_state": "Connected",
    "agents": 2,
    "did_you_mean": "",
    "revoked": None,
    "token": {"from": "session", "at": NOW - 60, "groups": ["a"], "more": 14, "missing_claim": ""},
}
COMPARED = {
    "former": "3f9c2a17d5e8",
    "hash": "8e5d71a2c9f3",
    "running": True,
    "tests": 4,
    "errors": [],
    "warnings": ["allow[3] (policy.toml, line 17): the cluster pattern 'prod-*' fits no cluster that is enrolled"],
    "rules": [
        {
            "change": "changed",
            "rule": "allow[0]",
            "line": 4,
            "gains": ["oidc:developers", "oidc:contractors", "oidc:auditors"],
            "loses": ["oidc:interns"],
        }
    ],
    "admins": [],
    "clusters": [{"cluster": "berlin-factory", "gains": ["oidc:developers"], "loses": []}],
    "users": [{"user": "bob@example.com", "sessions_lost": 2, "gains": [], "loses": ["berlin-factory", "munich"]}],
}
RECORD = {
    "ts": "2027-01-15T08:00:00.000Z",
    "user": "alice@example.com",
    "verb": "create",
    "outcome": "ended",
    "status": 101,
    "path": "/api/v1/namespaces/shop/pods/cart-7d9f/exec",
    "namespace": "shop",
    "command": ["sh", "-c", "ls -l /data | head"],
    "bytes_to_user": 12345,
    "chain": "a",
    "seq": 1,
    "prev": "0",
}
ROTATION = SimpleNamespace(
    rows=[
        {"ca": "present", "pin": PIN, "certificate_expires": NOW + 86400 * 300},
        {"ca": "next", "pin": PIN.replace("71c2", "93e4"), "certificate_expires": NOW + 86400 * 3650},
    ],
    missing=["cluster munich has not followed: its agent was seen last 3 days ago"],
    followed="11 of 12 clusters",
    agents="24 of 26 agents",
    users="7 of 9 users; not at the last join of bob@example.com, carol@example.com",
    relays=["relay-1", "relay-2"],
)
RECORDED = {
    "time": "2026-11-29T10:04:12.117Z",
    "user": "oidc:alice@example.org",
    "pod": "production/web-7d9c6",
    "container": "app",
    "command": "sh",
    "seconds": 412.5,
    "bytes": 48_640,
    "exit": 0,
    "failure": "",
    "file": "20261129T095719Z-9f2c81d07b3e4a55-5d1e0a9c44b7f210-3-1.cast.age.tar",
    "sha256": "71c2" * 16,
}
CAST = (
    b'{"version": 3}\n[0.1, "o", "$ \\u001b[1mls\\u001b[0m\\r\\napp.py\\r\\n$ "]\n'
    b'[0.0, "m", "the recording broke off here"]\n'
)
CHANGED = Difference("recordings/a.cast.age.tar", "changed", f"its SHA-256 is {'0b9e' * 16}, and was {'71c2' * 16}")
REPORT = Report(
    2,
    1200,
    [ChainFinding("gap", "audit.log", 17, "9f2c", 803, "records 800 to 802 are missing")],
    [
        {
            "chain": "9f2c",
            "from": 1,
            "to": 1200,
            "end": "it goes on",
            "hash": "0" * 64,
            "file": "audit.log",
            "line": 1200,
        }
    ],
    ["audit.log.2.gz is older than the first anchor"],
)

ADMINISTRATORS = {
    "lists": [
        *(
            Scene(f"admin {command} RELAY", administered(rows))
            for command, rows in LISTS.items()
            if "recovery" not in command
        ),
        Scene("admin cluster list RELAY -o wide", administered(LISTS["cluster list"])),
        Scene("admin session list RELAY", administered([]), title="admin session list, with none"),
        Scene(
            "recovery list",
            prints(
                "arcbridge.cli.relay.recovery_list",
                lambda: format_list("recovery list", LISTS["recovery list"], "table"),
            ),
        ),
        Scene("admin token create --cluster berlin RELAY", administered([TOKEN])),
    ],
    "acts": [Scene(f"admin {line} RELAY", administered(rows)) for line, rows in DONE.items()],
    "relay": [
        Scene(
            "policy explain alice@example.com berlin-factory",
            answers("arcbridge.relay.policy_review.explain_access", EXPLAINED),
        ),
        Scene(
            "policy accept 8e5d71a2c9f3",
            prints(
                "arcbridge.cli.relay.policy_accept", lambda: format_done("policy accept", [{"hash": "8e5d71a2c9f3"}])
            ),
        ),
        Scene("--role relay ca status", answers("arcbridge.relay.ca_rotation.status", ROTATION)),
        *(
            Scene(
                f"--role relay ca {step}",
                answers("arcbridge.relay.ca_rotation.take_step", SimpleNamespace(list=SimpleNamespace(pins=[PIN]))),
            )
            for step in ("next", "activate", "retire")
        ),
        Scene("recovery end", title="recovery end where no relay has run"),
        Scene("policy diff new.toml", answers("arcbridge.relay.policy_review.compare_policy", COMPARED)),
        Scene("backup relay.backup", answers("arcbridge.cli.backup.make_backup", MANIFEST)),
        Scene("restore relay.backup", answers("arcbridge.cli.backup.restore_backup", Restored(MANIFEST, 11, 1))),
        Scene("audit show audit.log", returns("arcbridge.audit.query.find_records", [RECORD])),
        Scene("audit verify audit.log", returns("arcbridge.audit.verify.verify", REPORT)),
        Scene("recording list audit.log", returns("arcbridge.agent.recording.opened.find_recordings", [RECORDED])),
        Scene(
            "recording open --identity auditor.key --text session.cast.age.tar",
            returns("arcbridge.agent.recording.opened.read_identities", []),
            returns("arcbridge.agent.recording.opened.open_recording", [CAST]),
        ),
        Scene(
            "recording verify --audit audit.log recordings",
            returns("arcbridge.agent.recording.opened.find_recordings", []),
            returns("arcbridge.agent.recording.opened.compare", (11, [CHANGED])),
        ),
        Scene("--role relay config check", title="config check of a relay without settings"),
        Scene("--role relay config init --directory etc"),
        Scene("cluster list", title="cluster list where no relay has run"),
    ],
}
