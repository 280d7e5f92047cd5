"""Groups that are lent for a time, before a real API server with the chart's own definitions and policies: what is
forged, what passes meanwhile, what ends with a grant, and what a relay learns (docs/how-to/elevation.md)."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import ssl
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.blindness.reviewed_world import ReviewedWorld
from tests.config.helm import AGENT, Helm
from tests.e2e.test_restrictions import COLLECTIONS, SHOP, Answers
from tests.readme.blocks import Block, blocks
from tests.readme.machines import ROOT, Machines
from tests.support.cluster import ACTS_AS_ANY, Cluster, Unavailable, helm, kubectl_binary
from tests.support.processes import ManagedProcess, require_or_skip, run
from tests.support.reports import audited, metrics, records, until, wait_for_record
from tests.support.world import ALICE, BOB, ApiServer, User, World, arcbridge

CAROL = User("carol", ("staff",))
API = "/apis/access.arcbridge.io/v1alpha1"
REQUESTS = f"{API}/accessrequests"
MARK = "INC-4711"
SKEWED = """\
import time
_time = time.time
time.time = lambda: _time() + 300.0
"""
"""What makes a process of Python five minutes fast."""


def rendered(home: Path, *settings: str) -> list[dict[str, Any]]:
    """Return what the chart makes for elevation, for the agent of the shared cluster."""
    try:
        binary = helm()
    except Unavailable as error:
        require_or_skip("helm", str(error))
    values = ("-f", str(AGENT / "ci/values.yaml"), "--set", "elevation.enabled=true", *settings)
    shown = ("--show-only", "templates/elevation.yaml", "--show-only", "templates/rbac.yaml")
    groups = ("--set", "elevation.groups={operators}", "--kube-version", "1.36.0")
    command = ("template", "arcbridge-agent", str(AGENT), "--namespace", "arcbridge", *values, *groups, *shown)
    found = list(yaml.safe_load_all(Helm(binary, home).run(*command).stdout))
    (role,) = [one for one in found if one["metadata"]["name"] == "arcbridge:arcbridge-agent" and "rules" in one]
    role["metadata"]["name"] = "test-elevation"
    kinds = ("CustomResourceDefinition", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
    roles = [one for one in found if one["metadata"]["name"].endswith((":requester", ":approver"))]
    return [role, *roles, *(one for one in found if one["kind"] in kinds)]


@pytest.fixture(scope="module")
def definitions(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The chart's definitions, policies and roles in the shared cluster, and two rules."""
    made = rendered(tmp_path_factory.mktemp("helm"), "--set", "impersonation.mode=legacy")
    text = yaml.safe_dump_all(made)
    cluster.apply(text)
    cluster.grant("test-elevation", service_account=("arcbridge", "arcbridge-agent"))
    for group in ("developers", "staff"):
        cluster.grant("arcbridge:arcbridge-agent:requester", group=group)
    cluster.grant("edit", group="staff", namespace=SHOP)
    cluster.grant("cluster-admin", group="operators")
    until(lambda: cluster.kubectl("get", "accessrules", check=False).returncode == 0, "the definitions are served")
    for name, spec in {
        "incident": {
            "requesters": {"groups": ["developers"]}, "groups": ["operators"], "maxSeconds": 3600,
            "reasonPattern": "^INC-[0-9]+$", "approvers": {"groups": ["platform", "developers"]},
        },
        "short": {"requesters": {"groups": ["developers"]}, "groups": ["operators"], "maxSeconds": 60},
    }.items():  # fmt: skip
        cluster.apply({"apiVersion": f"{API[6:]}", "kind": "AccessRule", "metadata": {"name": name}, "spec": spec})
    yield
    cluster.kubectl("delete", "-f", "-", input=text)


class Direct:
    """Sends requests straight to the API server, as a user of one group."""

    def __init__(self, cluster: Cluster, user: str, group: str, directory: Path) -> None:
        self._server = cluster.api_url.removeprefix("https://")
        self._context = ssl.create_default_context(cadata=cluster.ca_pem.decode())
        pair = directory / f"{user}-{group}.pem"
        pair.touch(mode=0o600)
        pair.write_bytes(b"".join(cluster.client_certificate(user, [group])))
        self._context.load_cert_chain(pair)
        self.user = user

    def ask(
        self, method: str, target: str, document: object = None, kind: str = "application/json"
    ) -> tuple[int, dict[str, Any]]:
        body = b"" if document is None else json.dumps(document).encode()
        kind = "application/merge-patch+json" if method == "PATCH" else kind
        with closing(http.client.HTTPSConnection(self._server, context=self._context, timeout=30)) as connection:
            connection.request(method, target, body or None, {"Content-Type": kind, "Accept": "application/json"})
            answer = connection.getresponse()
            found = json.loads(answer.read() or b"{}")
        return answer.status, found

    def request(self, name: str, query: str = "", **changes: Any) -> tuple[int, str]:
        """Write a request that is good but for the changes; return the code and what was said."""
        spec = {"user": self.user, "rule": "incident", "groups": ["operators"], "seconds": 600, "reason": "INC-1"}
        more = {key: changes.pop(key) for key in ("status", "metadata") if key in changes}
        document = {
            "apiVersion": API[6:], "kind": "AccessRequest", "metadata": {"name": name, **more.pop("metadata", {})},
            "spec": {**spec, **changes}, **more,
        }  # fmt: skip
        code, answer = self.ask("POST", REQUESTS + query, document)
        return code, str(answer.get("message", ""))

    def status(self, name: str, **status: Any) -> tuple[int, str]:
        code, answer = self.ask("PATCH", f"{REQUESTS}/{name}/status", {"status": status})
        return code, str(answer.get("message", ""))

    def approve(self, name: str, *, user: str = "", group: str = "platform") -> tuple[int, str]:
        return self.status(name, approvals=[{"user": user or self.user, "group": group}])


@pytest.fixture(scope="module")
def people(cluster: Cluster, definitions: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Direct]:
    """Those who write straight to the API server, once the policies are in force there."""
    directory = tmp_path_factory.mktemp("people")
    made = {
        name: Direct(cluster, user, group, directory)
        for name, user, group in (
            ("bob", BOB.email, "developers"), ("carol", CAROL.email, "staff"), ("alice", ALICE.email, "platform"),
            ("operator", BOB.email, "operators"), ("plain", ALICE.email, "developers"),
        )
    }  # fmt: skip
    until(lambda: made["bob"].request("early", "?dryRun=All", user="other")[0] == 422, "a policy holds", timeout=30)
    until(lambda: made["bob"].request("early", "?dryRun=All", seconds=3601)[0] == 422, "all hold", timeout=30)
    return made


@pytest.fixture(scope="module")
def world(
    api: ApiServer, people: dict[str, Direct], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ReviewedWorld]:
    """Two agents, of which the second one's clock is five minutes fast."""
    directory = tmp_path_factory.mktemp("elevation")
    (directory / "skewed").mkdir()
    (directory / "skewed" / "sitecustomize.py").write_text(SKEWED)
    world = ReviewedWorld(api, end="agent", cluster="lending", directory=directory, agents=2)
    world.policy = '[[allow]]\ngroups = ["platform", "developers", "staff"]\nclusters = ["*"]\n'
    world.agent_settings = (
        'elevation.groups = ["operators"]\nelevation.default = "read-only"\nelevation.default_groups = ["developers"]'
    )
    world.agent_prefixes[1] = ("env", f"PYTHONPATH={directory / 'skewed'}{os.pathsep}{ROOT}")
    with world:
        yield world.start()


def elevations(world: World) -> list[float]:
    return [metrics(port)["arcbridge_agent_elevations"] for port in world.agent_observes]


def in_force(world: World, count: int) -> None:
    until(lambda: elevations(world) == [count] * 2, f"both agents have {count} grants")


def forty(answers: Answers | Direct) -> list[tuple[str, str, int, str]]:
    """Send 40 requests; return method, target, code and the restriction that refuses."""
    found = []
    for collection in COLLECTIONS:
        one = f"{collection}/no-such"
        for method, target, document in (
            ("POST", f"{collection}?dryRun=All", {}), ("PUT", one, {}), ("PATCH", one, {"metadata": {}}),
            ("DELETE", one, None), ("GET", collection, None),
        ):  # fmt: skip
            code, answer = answers.ask(method, target, document)
            causes = answer.get("details", {}).get("causes") or [{}] if answer.get("kind") == "Status" else [{}]
            reason = str(causes[0].get("reason", "")) if code == 403 else ""
            found.append((method, target, code, reason if reason.startswith("restricted.") else ""))
    return found


def test_g1_nothing_is_forged(people: dict[str, Direct], cluster: Cluster) -> None:
    """By the policies and the schema of the chart alone: no agent takes part. Each attempt violates one policy."""
    bob, alice, carol = people["bob"], people["alice"], people["carol"]
    annotations = {"annotations": {f"a{number}": "" for number in range(9)}}
    owners = [{"apiVersion": "v1", "kind": "Namespace", "name": "shop", "uid": "0"}]
    for words, changes in (
        ("an access request is its writer's own", {"user": ALICE.email}),
        ("one of these groups", {"groups": ["operators", "platform"]}),
        ("for so long", {"seconds": 3601}),
        ("reasonPattern", {"reason": "because"}),
        ("spec.groups", {"groups": []}),
        ("spec.seconds", {"seconds": 0}),
        ("annotations", {"metadata": annotations}),
        ("no finalizers", {"metadata": {"finalizers": ["example.org/kept"]}}),
        ("no owners", {"metadata": {"ownerReferences": owners}}),
    ):
        code, said = bob.request("forged", **changes)
        assert (code, words in said) == (422, True), (changes, said)
    code, said = carol.request("forged")
    assert (code, "does not name you" in said) == (422, True), said
    assert people["operator"].request("forged")[0] == 422, "nor does a group that was lent give the right to ask"
    as_alice = json.dumps({"apiVersion": API[6:], "kind": "AccessRequest", "metadata": {"name": "as"}, "spec": {
        "user": BOB.email, "rule": "incident", "groups": ["operators"], "seconds": 60, "reason": "INC-1"}})  # fmt: skip
    extra = ("--as", BOB.email, "--as-group", "developers", "--as-user-extra", "arcbridge.io/original-user=x")
    done = cluster.kubectl("create", *extra, "-f", "-", input=as_alice, check=False)
    assert "who acts as another user" in done.stderr, done.stderr

    good = {"approvals": [{"user": ALICE.email, "group": "platform"}], "from": "2026-01-01T00:00:00Z"}
    assert bob.request("good", status=good)[0] == 201
    assert "status" not in bob.ask("GET", f"{REQUESTS}/good")[1], "a status that comes with it counts nothing"
    made = bob.ask("GET", f"{REQUESTS}/good")[1]
    for changed in ({"seconds": 3600}, {"reason": "INC-2"}, {"user": ALICE.email}):
        for who in (bob, alice):
            edited = {**made, "spec": {**made["spec"], **changed}}
            code, answer = who.ask("PUT", f"{REQUESTS}/good", edited)
            assert code in (403, 422), (changed, answer)
            assert who is bob or "changed afterwards" in answer["message"]
    plain = people["plain"]  # alice as one of the developers: without the verb
    cluster.grant("arcbridge:arcbridge-agent:approver", user=CAROL.email)
    for words, written in (
        ("never for the writer's own request", lambda: bob.approve("good", group="developers")),
        ("an approval is its writer's own", lambda: bob.approve("good", user=ALICE.email)),
        ("an approval is its writer's own", lambda: alice.approve("good", user=CAROL.email)),
        ("an approval is its writer's own", lambda: carol.approve("good")),
        ("names no approvers of this group", lambda: carol.approve("good", group="staff")),
        ("takes the verb approve", lambda: plain.approve("good", group="developers")),
        ("one is written at a time", lambda: alice.status("good", approvals=[
            {"user": ALICE.email, "group": "platform"}, {"user": CAROL.email, "group": "platform"}])),
        ("an agent writes once", lambda: alice.status("good", **{"from": "2026-01-01T00:00:00Z"})),
        ("an agent writes once", lambda: bob.status("good", until="2030-01-01T00:00:00Z")),
        ("takes the verb approve", lambda: bob.status("good", denied={"user": BOB.email})),
        ("denial is its writer's own", lambda: alice.status("good", denied={"user": CAROL.email})),
        ("withdrawal is its writer's own", lambda: bob.status("good", withdrawn={"user": ALICE.email})),
        ("withdrawal is its writer's own", lambda: plain.status("good", withdrawn={"user": ALICE.email})),
    ):  # fmt: skip
        code, said = written()
        assert (code, words in said) == (422, True), (words, said)
    lent = ("--as", ALICE.email, "--as-group", "platform", "--as-user-extra", "arcbridge.io/elevated=x")
    patch = json.dumps({"status": {"approvals": [{"user": ALICE.email, "group": "platform"}]}})
    line = ("patch", "accessrequest", "good", "--subresource=status", "--type=merge", "-p", patch)
    done = cluster.kubectl(*line, *lent, check=False)
    assert "or is elevated" in done.stderr, done.stderr
    program = ("--as", BOB.email, "--as-group", "developers", "--as-user-extra", "arcbridge.io/actor=bot")
    done = cluster.kubectl("create", *program, "-f", "-", input=as_alice, check=False)
    assert "a program that acts for a user asks" in done.stderr, done.stderr
    line = ("patch", "accessrequest", "good", "--subresource=status", "--type=merge", "-p")
    done = cluster.kubectl(*line, json.dumps({"status": {"withdrawn": {"user": BOB.email}}}), *program, check=False)
    assert "a program that acts for a user withdraws" in done.stderr, done.stderr

    assert alice.approve("good") == (200, "")
    for words, written in (
        ("stays as it was written", lambda: bob.status("good", approvals=[])),
        ("stays as it was written", lambda: alice.approve("good", group="developers")),
    ):
        code, said = written()
        assert (code, words in said) == (422, True), (words, said)
    assert bob.status("good", withdrawn={"user": BOB.email}) == (200, "")
    code, said = bob.status("good", withdrawn=None)
    assert (code, "and stays" in said) == (422, True), said
    assert bob.ask("DELETE", f"{REQUESTS}/good")[0] == 403, "what was asked stays to be read"
    assert cluster.kubectl("delete", "accessrequest", "good").returncode == 0
    assert bob.request("good")[0] == 201
    assert "status" not in bob.ask("GET", f"{REQUESTS}/good")[1], "a request of the same name begins anew"
    cluster.kubectl("delete", "accessrequest", "good")


def test_g6_forty_requests_in_each_state_and_two_agents_with_two_clocks(
    world: World, people: dict[str, Direct], cluster: Cluster
) -> None:
    """Restricted, plain, elevated, and when it is over: each answers as RBAC does for those groups."""
    plain = Answers(world.start_client(CAROL))
    assert forty(plain) == forty(people["carol"])
    bob = Answers(world.start_client(BOB))
    reads = [one for one in forty(people["bob"]) if one[0] == "GET"]

    def only_reads() -> None:
        found = forty(bob)
        assert [one for one in found if one[0] == "GET"] == reads
        assert {(code, why) for method, _, code, why in found if method != "GET"} == {(403, "restricted.read_only")}
        assert not bob.may("delete", "", "pods")

    only_reads()
    code, answer = bob.ask("POST", REQUESTS, {
        "apiVersion": API[6:], "kind": "AccessRequest", "metadata": {"name": "forty"},
        "spec": {"user": BOB.email, "rule": "incident", "groups": ["operators"], "seconds": 600, "reason": MARK},
    })  # fmt: skip
    assert code == 201, answer
    only_reads()
    assert people["alice"].approve("forty")[0] == 200
    in_force(world, 1)
    assert forty(bob) == forty(people["operator"])
    assert bob.may("delete", "", "pods")
    assert forty(plain) == forty(people["carol"]), "no other user has anything of it"

    status = people["alice"].ask("GET", f"{REQUESTS}/forty")[1]["status"]
    begins, ends = (datetime.fromisoformat(status[key]).timestamp() for key in ("from", "until"))
    assert abs(begins - time.time()) < 60, "by the API server's clock, whichever agent wrote it"
    assert ends - begins == 600
    for agent in world.agents:
        assert wait_for_record(agent, "elevation begun")["until"] == status["until"]
    events = [one for one in cluster.audit_events() if one.get("impersonatedUser", {}).get("username") == BOB.email]
    text = f"forty rule=incident groups=operators approved-by={ALICE.email} reason={MARK}"
    assert [text] in [one["impersonatedUser"].get("extra", {}).get("arcbridge.io/elevated") for one in events]
    record = audited(world, "an elevated write", verb="update", elevated=[text], user=BOB.email)
    assert "restricted" not in record

    code, said = people["bob"].status("forty", withdrawn={"user": BOB.email})
    assert code == 200, said
    in_force(world, 0)
    only_reads()
    assert people["operator"].request("replayed")[0] == 422


@contextmanager
def rules_of(cluster: Cluster, changed: dict[str, list[dict[str, Any]]]) -> Iterator[None]:
    """Give ClusterRoles other rules for a while."""
    path = "/apis/rbac.authorization.k8s.io/v1/clusterroles/"
    kept = {name: cluster.request("GET", path + name)["rules"] for name in changed}
    try:
        write_rules(cluster, path, changed)
        yield
    finally:
        write_rules(cluster, path, kept)


def write_rules(cluster: Cluster, path: str, rules: dict[str, list[dict[str, Any]]]) -> None:
    for name, some in rules.items():
        cluster.request("PATCH", path + name, {"rules": some}, content_type="application/merge-patch+json")
    cluster.settle_rbac()


def test_constrained_impersonation_lends_what_its_rules_name(
    world: World, people: dict[str, Direct], cluster: Cluster, tmp_path: Path
) -> None:
    """With the chart's rules for Kubernetes 1.36 alone; a group that they lack is named by the agent's check."""
    users = "impersonation.mode=constrained,impersonation.users={*},impersonation.groups={developers,staff}"
    (role, *_) = rendered(tmp_path, "--set", users)
    none: list[dict[str, Any]] = []
    constrained = {ACTS_AS_ANY: none, "arcbridge-agent-impersonation": none, "test-elevation": role["rules"]}
    whom = [rule for rule in role["rules"] if rule.get("resources") == ["groups"]]
    assert [(rule["verbs"], rule["resourceNames"]) for rule in whom] == [
        (["impersonate:user-info"], ["developers", "staff", "operators"])
    ]
    bob = Answers(world.start_client(BOB))
    with rules_of(cluster, constrained):
        reads = forty(bob)
        assert {code for method, _, code, _ in reads if method != "GET"} == {403}
        assert people["bob"].request("constrained", rule="short", seconds=60)[0] == 201
        in_force(world, 1)
        assert forty(bob) == forty(people["operator"])
        # A look while the rules were being written has failed for another reason, and is over once one has passed.
        until(lambda: set(elevation_checks(world)) == {1}, "the agents may lend what the rules name", timeout=60)
        lacking = [{**rule, "resourceNames": ["developers"]} if rule in whom else rule for rule in role["rules"]]
        with rules_of(cluster, {"test-elevation": lacking}):
            one = f"{COLLECTIONS[0]}/no-such"
            # The API server remembers for ten seconds whom the agent was allowed to be.
            until(lambda: bob.ask("DELETE", one)[0] == 502, "the agent may not be an operator", timeout=40)
            assert "may not act as you" in bob.ask("DELETE", one)[1]["message"]
            for agent in world.agents:
                agent.signal(signal.SIGHUP)
            said = "the agent may not impersonate group operators, so that the API server refuses elevated users"
            for agent in world.agents:
                wait_for_record(agent, "check failed", code="elevation_rights", reason=said, timeout=60)
        assert people["bob"].status("constrained", withdrawn={"user": BOB.email})[0] == 200
        in_force(world, 0)
        assert forty(bob) == reads
    cluster.kubectl("delete", "accessrequest", "constrained")


def test_g3_what_runs_by_a_grant_ends_with_it_and_nothing_else(
    world: World, cluster: Cluster, people: dict[str, Direct]
) -> None:
    """By withdrawal, by a rule that became narrower, and in time, each with kubectl."""
    cluster.add_pod("web", SHOP, stdin=True)
    direct, kubectl = cluster.kubectl_for(), cluster.kubectl_for(kubeconfig=world.start_client(BOB).kubeconfig)
    others = cluster.kubectl_for(kubeconfig=world.start_client(CAROL).kubeconfig)
    watch, bob = ("--watch", "-o", "name", "-n", SHOP), people["bob"]
    direct.run("create", "configmap", "first", "-n", SHOP)
    with kubectl.start("get", "configmaps", *watch) as before, others.start("get", "configmaps", *watch) as other:
        for one in (before, other):
            one.wait_for_line("configmap/first", timeout=20)
        asked = ask(world)
        done = world.run_client(ALICE, "approve", asked.name)
        assert done.stdout.startswith(f"approved: {BOB.email}, operators for 10 min, {MARK}"), done.stderr
        assert asked.process.wait(30) == 0, asked.process.tail()
        assert "operators until " in asked.process.output("stdout")
        for how, name in (("withdrawn", asked.name), ("rule", "by-rule"), ("expired", "short")):
            seconds = 10 if how == "expired" else 600
            if how != "withdrawn":
                assert bob.request(name, rule="short" if how == "expired" else "incident", seconds=seconds)[0] == 201
                assert how == "expired" or people["alice"].approve(name)[0] == 200
            in_force(world, 1)
            with (
                kubectl.start("get", "secrets", "--watch", "-o", "name", "-n", "kube-system") as by_it,
                kubectl.start("exec", "-i", "-n", SHOP, "web", "--", "sh", "-c", "echo inside; cat", stdin=True) as sh,
            ):
                sh.wait_for_line("inside", timeout=20)
                until(lambda: begun(world, "watch", "secrets"), "the watch runs")
                if how == "withdrawn":
                    done = world.run_client(BOB, "withdraw", name)
                    assert done.stdout.startswith("withdrawn: "), done.stderr
                elif how == "rule":
                    narrow(cluster, 599)
                assert sh.wait(10 + (how == "expired") * seconds) != 0
                by_it.wait(10)
            in_force(world, 0)
            if how == "rule":
                assert bob.status(name, withdrawn={"user": BOB.email})[0] == 200
                narrow(cluster, 3600)
            for kind in ({"resource": "secrets"}, {"subresource": "exec"}):
                record = audited(world, "its end", outcome="cut", user=BOB.email, **kind)
                assert record["reason"] == "the elevation by which it began has ended"
            assert min(ends(world, how)) >= 1
        direct.run("create", "configmap", "lasting", "-n", SHOP)
        for one in (before, other):
            one.wait_for_line("configmap/lasting", timeout=20)
    direct.run("delete", "configmap", "first", "lasting", "-n", SHOP)
    cluster.delete_pod("web", SHOP)


class Asked:
    """A user's `elevate` that runs, and the name of its request."""

    def __init__(self, process: ManagedProcess, name: str) -> None:
        self.process = process
        self.name = name


def ask(world: World) -> Asked:
    directory = world._new_home(BOB)
    words = ("elevate", "--reason", MARK, "--rule", "incident", "--for", "10m")
    line = arcbridge(*world.client_arguments(BOB, directory), *words)
    process = world._start(f"elevate-{world._clients}", line, env=world.client_env(directory))
    return Asked(process, process.wait_for_line(r"Asked as (\S+)\.", timeout=30)[1])


def narrow(cluster: Cluster, seconds: int) -> None:
    patch = json.dumps({"spec": {"maxSeconds": seconds}})
    cluster.kubectl("patch", "accessrule", "incident", "--type=merge", "-p", patch)


def begun(world: World, verb: str, resource: str) -> bool:
    lines = world.audit_lines()
    ended = {one.get("request") for one in lines if "outcome" in one}
    return any(
        (one.get("verb"), one.get("resource")) == (verb, resource) and one["request"] not in ended for one in lines
    )


def elevation_checks(world: World) -> list[float]:
    return [metrics(port)['arcbridge_agent_check_ok{check="elevation"}'] for port in world.agent_observes]


def ends(world: World, reason: str) -> list[float]:
    name = f'arcbridge_agent_elevations_ended_total{{reason="{reason}"}}'
    return [metrics(port)[name] for port in world.agent_observes]


def test_what_is_refused_is_said_at_the_command(world: World) -> None:
    """In the words of the policy, and of the rules that there are."""
    for words, said in (
        (("elevate", "--reason", "because", "--rule", "incident"), "reasonPattern"),
        (("elevate", "--reason", MARK, "--group", "platform"), "no rule of this cluster gives you that"),
    ):
        done = world.run_client(BOB, *words)
        assert (done.returncode, said in " ".join(done.stderr.split())) == (5, True), done.stderr
        assert "arcbridge clusters" not in done.stderr


def test_g7_without_the_policies_no_agent_lends(world: World, cluster: Cluster, people: dict[str, Direct]) -> None:
    """An agent that begins without them waits until they are back."""
    binding = "validatingadmissionpolicybinding/arcbridge.arcbridge-agent.requests"
    kept = json.loads(cluster.kubectl("get", binding, "-o", "json").stdout)
    cluster.kubectl("delete", binding)
    try:
        until(lambda: people["bob"].request("x", "?dryRun=All", user="other")[0] == 201, "it is gone", timeout=30)
        for agent in world.agents:
            agent.stop()
        agent = world.start_agent(1)
        wait_for_record(agent, "check failed", check="elevation", code="elevation_policies", timeout=60)
        assert people["bob"].request("unlent", rule="short", seconds=60)[0] == 201
    finally:
        restored = time.time()
        cluster.apply({"apiVersion": kept["apiVersion"], "kind": kept["kind"], "spec": kept["spec"], "metadata": {
            "name": kept["metadata"]["name"]}})  # fmt: skip
    begun = wait_for_record(agent, "elevation begun", timeout=60)
    assert datetime.fromisoformat(begun["until"]).timestamp() - 60 >= int(restored) - 1
    cluster.kubectl("delete", "accessrequest", "unlent")


def test_every_block_of_the_page(world: World, cluster: Cluster, tmp_path: Path) -> None:
    """docs/how-to/elevation.md, as its two readers type it, each logged in."""
    cluster.kubectl("delete", "accessrequests", "--all")
    for name in ("anna", "lead"):
        (tmp_path / name).mkdir()
    replaced = {"berlin": "lending"}
    machines = {
        name: Machines(
            tmp_path / name, kubectl_binary("1.36"), dialled=name, replaced=replaced, names=(name,),
            environment={**world.client_environment(user, tmp_path / name / "login"), "ARCBRIDGE_CLUSTER": "lending"},
        )
        for name, user in (("anna", BOB), ("lead", ALICE))
    }  # fmt: skip
    with machines["anna"], machines["lead"]:
        machine = machines["lead"]
        try:
            for block in blocks(ROOT / "docs" / "how-to" / "elevation.md"):
                machine = machines.get(block.machine, machine)
                machine.run(block)
                name_request(machine, block)
        finally:
            for one in machines:
                home = machines[one].at(one) / "home"
                run(arcbridge("stop"), env={**os.environ, "HOME": str(home), "XDG_RUNTIME_DIR": ""}, check=False)
    cluster.kubectl("delete", "accessrule", "night", "--ignore-not-found")


def name_request(machine: Machines, block: Block) -> None:
    """Let a page's `anna-4kq7w` be the request that its reader has just seen in the list, as one that waits."""
    listed = block.kind == "run" and block.text.startswith("arcbridge elevations")
    if listed and (found := re.search(r"^(\S+)\s.*waiting", machine.output, re.MULTILINE)):
        machine.replaced["anna-4kq7w"] = found[1]


def test_the_relay_learns_nothing(world: ReviewedWorld) -> None:
    """It carries a request, its reason, its approval and the rules, and has no word of them. Ends the organisation."""
    asked = ask(world)
    assert world.run_client(ALICE, "approve", asked.name).returncode == 0
    assert asked.process.wait(30) == 0, asked.process.tail()
    assert any(records(agent, "elevation begun", reason=MARK) for agent in world.agents)
    world.end_and_search((MARK, asked.name, "accessrequests", "reasonPattern"))
