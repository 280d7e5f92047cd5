"""Sessions that are less than their user, before a real API server: what passes, what its own audit log shows, how long
it holds; kubectl, and a tool server for AI agents (docs/how-to/read-only.md)."""

from __future__ import annotations

import base64
import http.client
import json
import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml

from arcbridge.refusals import RefusalRule
from tests.agent.restrictions.test_session_restrictions import TABLE
from tests.readme.blocks import Block, blocks
from tests.readme.machines import ROOT, Machines
from tests.support import mcp_server
from tests.support.cluster import Cluster, Unavailable, kubectl_binary
from tests.support.processes import require_or_skip, run
from tests.support.reports import audited, until
from tests.support.world import ALICE, BOB, ApiServer, Client, World, arcbridge

SHOP = "shop"
RESTRICT = ("--read-only", "--no-secrets", "--namespace", SHOP)
REVIEWS = "/apis/authorization.k8s.io/v1/selfsubject"


@pytest.fixture(scope="module")
def world(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Its own: its relay is killed."""
    with World(api, cluster="berlin", directory=tmp_path_factory.mktemp("restricted")) as world:
        yield world.start()


@pytest.fixture(scope="module")
def pod(cluster: Cluster) -> Iterator[str]:
    cluster.add_pod("web", SHOP)
    yield "web"
    cluster.delete_pod("web", SHOP)


@pytest.fixture(scope="module")
def plain(world: World) -> Client:
    return world.start_client(ALICE)


@pytest.fixture(scope="module")
def reader(world: World) -> Client:
    """A cluster's administrator who only reads."""
    return world.start_client(ALICE, "--read-only")


class Answers:
    """Sends requests to a client's endpoint as they are, with its kubeconfig's certificate."""

    def __init__(self, client: Client) -> None:
        config = yaml.safe_load(client.kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self._server = cluster["server"].removeprefix("https://")
        self._context = ssl.create_default_context(
            cadata=base64.b64decode(cluster["certificate-authority-data"]).decode()
        )
        pair = client.directory / "pair.pem"
        pair.touch(mode=0o600)
        pair.write_bytes(b"".join(base64.b64decode(user[f"client-{one}-data"]) for one in ("certificate", "key")))
        self._context.load_cert_chain(pair)

    def ask(
        self, method: str, target: str, document: object = None, headers: Mapping[str, str] = MappingProxyType({})
    ) -> tuple[int, dict[str, Any]]:
        body = b"" if document is None else json.dumps(document).encode()
        with closing(http.client.HTTPSConnection(self._server, context=self._context, timeout=30)) as connection:
            kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
            sent = {"Content-Type": kind, "Accept": "application/json", **headers}
            connection.request(method, target, body or None, sent)
            answer = connection.getresponse()
            text = answer.read()
        try:
            found = json.loads(text)
        except ValueError:
            found = {}
        return answer.status, found if isinstance(found, dict) else {}

    def cause(
        self, method: str, target: str, document: object = None, headers: Mapping[str, str] = MappingProxyType({})
    ) -> str:
        """Return the restriction that refuses a request; empty where none does."""
        code, status = self.ask(method, target, document, headers)
        causes = status.get("details", {}).get("causes") or [{}]
        found = str(causes[0].get("reason", ""))
        return found if code == 403 and found.startswith("restricted.") else ""

    def may(self, verb: str, group: str, resource: str, namespace: str = SHOP) -> bool:
        """Return what a SelfSubjectAccessReview says."""
        resource, _, subresource = resource.partition("/")
        attributes = {"verb": verb, "group": group, "resource": resource, "subresource": subresource}
        review = {"spec": {"resourceAttributes": {**attributes, "namespace": namespace}}}
        code, answer = self.ask("POST", f"{REVIEWS}accessreviews", review)
        assert code == 201, answer
        return answer["status"]["allowed"] is True


COLLECTIONS = [
    f"/api/v1/namespaces/{SHOP}/pods",
    f"/api/v1/namespaces/{SHOP}/configmaps",
    f"/api/v1/namespaces/{SHOP}/serviceaccounts",
    f"/apis/apps/v1/namespaces/{SHOP}/deployments",
    f"/apis/batch/v1/namespaces/{SHOP}/jobs",
    f"/apis/rbac.authorization.k8s.io/v1/namespaces/{SHOP}/roles",
    "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "/api/v1/nodes",
]


def restricted_events(cluster: Cluster) -> list[dict[str, Any]]:
    """Return what the API server has recorded of restricted sessions."""
    events = cluster.audit_events()
    return [one for one in events if "arcbridge.io/restricted" in one.get("impersonatedUser", {}).get("extra", {})]


@pytest.mark.timeout(240)
def test_h43_what_the_api_server_records_of_a_read_only_session_is_reads(
    cluster: Cluster, plain: Client, reader: Client, pod: str
) -> None:
    """Each verb on each of these, with and without, and each path of the table: no write arrives, and each read has the
    answer that it has without."""
    before = len(restricted_events(cluster))
    ours, theirs = Answers(reader), Answers(plain)
    for collection in COLLECTIONS:
        one = f"{collection}/no-such"
        for method, target, document in (
            ("POST", f"{collection}?dryRun=All", {}), ("PUT", one, {}), ("PATCH", one, {"metadata": {}}),
            ("DELETE", one, None), ("DELETE", f"{collection}?labelSelector=no=such", None), ("OPTIONS", one, None),
        ):  # fmt: skip
            assert ours.cause(method, target, document) == "restricted.read_only", (method, target)
            if method != "OPTIONS":
                assert theirs.cause(method, target, document) == ""
        for target in (collection, one, f"{collection}?watch=1&timeoutSeconds=1&limit=1" if "nodes" in one else one):
            assert ours.ask("GET", target)[0] == theirs.ask("GET", target)[0], target
    base = f"/api/v1/namespaces/{SHOP}/pods/{pod}"
    for subresource in ("exec?command=id", "attach", "portforward", "proxy", "proxy/a"):
        assert ours.cause("GET", f"{base}/{subresource}") == "restricted.read_only"
        assert ours.cause("POST", f"{base}/{subresource}") == "restricted.read_only"
    assert ours.ask("GET", f"{base}/log")[0] == theirs.ask("GET", f"{base}/log")[0]

    for method, target, *rules in TABLE:
        if rules[0] is not RefusalRule.NONE:
            code = ours.ask(method, target)[0]
            assert code in (400, 403, 405), (method, target, code)
        elif "tch" not in target and "follow" not in target:  # watches and logs go on
            assert ours.ask(method, target)[0] != 502, target
    events = restricted_events(cluster)[before:]
    assert len(events) > 40
    writes = [one for one in events if one["verb"] not in ("get", "list", "watch")]
    assert {one["objectRef"]["resource"] for one in writes} <= {
        "selfsubjectaccessreviews", "selfsubjectrulesreviews", "selfsubjectreviews"
    }  # fmt: skip
    assert {one["user"]["username"] for one in events} == {"system:serviceaccount:arcbridge:arcbridge-agent"}
    assert {tuple(one["impersonatedUser"]["extra"]["arcbridge.io/restricted"]) for one in events} == {("read-only",)}
    touched = {part for one in events for part in one["requestURI"].partition("?")[0].split("/")}
    assert touched.isdisjoint({"exec", "attach", "portforward", "proxy"})


@pytest.mark.timeout(240)
def test_h46_a_session_without_create_makes_nothing_and_one_with_it_alone_reads_nothing(
    world: World, cluster: Cluster
) -> None:
    """Each built-in resource and what is beneath it, by PUT and by server-side apply of what is not there."""
    cluster.ensure_namespace(SHOP)
    changer = Answers(world.start_client(ALICE, "--verb", "update", "--verb", "patch"))
    groups = changer.ask("GET", "/apis")[1]["groups"]
    paths = ["/api/v1", *(f"/apis/{version['groupVersion']}" for one in groups for version in one["versions"])]
    tried = 0
    for path in paths:
        for resource in changer.ask("GET", path)[1]["resources"]:
            name, _, behind = resource["name"].partition("/")
            if behind == "proxy" or not {"update", "patch"} <= {*resource["verbs"]}:
                continue
            space = f"/namespaces/{SHOP}" if resource["namespaced"] else ""
            target = f"{path}{space}/{name}/no-such{behind and '/'}{behind}?dryRun=All&fieldManager=a"
            metadata = {"name": "no-such", **({"namespace": SHOP} if space else {})}
            version = f"{resource['group']}/{resource['version']}" if "group" in resource else path.split("/", 2)[2]
            kind = {"apiVersion": version, "kind": resource["kind"], "metadata": metadata}
            for method, headers in (("PUT", {}), ("PATCH", {"Content-Type": "application/apply-patch+yaml"})):
                found = changer.cause(method, target, kind, headers)
                known = found == "restricted.verbs" or changer.ask(method, target, kind, headers)[0] == 404
                assert known, (method, target)
            assert behind or found == "restricted.verbs", target
            tried += 1
    assert tried > 60
    assert changer.ask("PATCH", f"/api/v1/namespaces/{SHOP}?dryRun=All", {"metadata": {}})[0] == 200

    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}
    maker = Answers(world.start_client(ALICE, "--verb", "create"))
    for one in ("serviceaccounts/default/token", "resourcequotas/a/status"):
        target = f"/api/v1/namespaces/{SHOP}/{one}"
        assert maker.cause("GET", target, headers=upgrade) == maker.cause("GET", target) == "restricted.verbs"
    cluster.apply({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "a", "namespace": SHOP}})
    assert maker.ask("GET", f"/api/v1/namespaces/{SHOP}/resourcequotas/a/status", headers=upgrade)[0] == 403


def test_the_list_of_rights_agrees_with_what_happens(world: World, cluster: Cluster) -> None:
    """For a user with some rights, whose list is exact: what it has works, and what it has not is denied. (For one with
    `*` the sentence beside the list has what rules cannot express.)"""
    cluster.grant("system:aggregate-to-edit", user=BOB.email, namespace=SHOP)
    cluster.grant("system:aggregate-to-view", user=BOB.email, namespace=SHOP)
    answers = Answers(world.start_client(BOB, *RESTRICT))
    code, answer = answers.ask("POST", f"{REVIEWS}rulesreviews", {"spec": {"namespace": SHOP}})
    assert code == 201
    status = answer["status"]
    assert "read-only no-secrets namespaces=shop" in status["evaluationError"]
    listed = {
        (verb, group, resource)
        for rule in status["resourceRules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        if not rule.get("resourceNames")
    }
    assert len(listed) > 100, status
    reads = {one for one in listed if one[2].partition("/")[0].startswith("selfsubject") is False}
    others = {one for one in reads if one[0] not in ("get", "list", "watch")}
    assert others == {("impersonate", "", "serviceaccounts")}, "as RBAC has it: who is impersonated only reads, too"
    assert answers.may("impersonate", "", "serviceaccounts")
    version = {"": "/api/v1", "apps": "/apis/apps/v1", "batch": "/apis/batch/v1"}
    for verb, group, resource in sorted(reads):
        if verb == "list" and "/" not in resource and group in version:
            assert answers.ask("GET", f"{version[group]}/namespaces/{SHOP}/{resource}")[0] in (200, 404, 405), resource
            assert answers.may("list", group, resource)
            for other in ("create", "update", "patch", "delete", "deletecollection"):
                assert not answers.may(other, group, resource)
    assert not answers.may("get", "", "secrets")
    assert not answers.may("list", "", "pods", namespace="default")
    assert not answers.may("list", "", "pods", namespace="")


def test_kubectl_says_which_restriction_and_how_to_do_more(world: World, cluster: Cluster, pod: str) -> None:
    kubectl = cluster.kubectl_for(kubeconfig=world.start_client(ALICE, *RESTRICT).kubeconfig)
    assert f"pod/{pod}" in kubectl.run("get", "pods", "-n", SHOP, "-o", "name").stdout
    refused = {
        ("delete", "pod", pod, "-n", SHOP): "--read-only",
        ("exec", "-n", SHOP, pod, "--", "id"): "--read-only",
        ("label", "pod", pod, "-n", SHOP, "a=b"): "--read-only",
        ("get", "secrets", "-n", SHOP): "--no-secrets",
        ("get", "pods", "-A"): "--namespace",
        ("get", "nodes"): "--namespace",
    }
    for arguments, flag in refused.items():
        done = kubectl.run(*arguments, check=False)
        assert done.returncode != 0
        assert "this session" in done.stderr, arguments
        assert f"without {flag}, or [restrict] in its settings " in done.stderr
    own = "create selfsubjectaccessreviews.authorization.k8s.io"
    for question, answer in (("get pods", "yes"), ("delete pods", "no"), ("get secrets", "no"), (own, "yes")):
        done = kubectl.run("auth", "can-i", *question.split(), "-n", SHOP, check=False)
        assert done.stdout.split()[0] == answer, question
    listed = kubectl.run("auth", "can-i", "--list", "-n", SHOP)
    assert "delete" not in listed.stdout
    assert "read-only no-secrets namespaces=shop" in listed.stderr
    info = json.loads(kubectl.run("auth", "whoami", "-o", "json").stdout)["status"]["userInfo"]
    assert info["username"] == ALICE.email
    assert info["extra"]["arcbridge.io/restricted"] == ["read-only", "no-secrets", f"namespaces={SHOP}"]
    record = audited(world, "a refusal", verb="delete", restricted=info["extra"]["arcbridge.io/restricted"])
    assert (record["outcome"], record["resource"], record["name"]) == ("refused", "pods", pod)


def test_s21_they_hold_when_the_relay_is_killed(world: World, cluster: Cluster) -> None:
    reader, direct = world.start_client(ALICE, *RESTRICT), cluster.kubectl_for()
    kubectl = cluster.kubectl_for(kubeconfig=reader.kubeconfig)
    with kubectl.start("get", "configmaps", "-n", SHOP, "--watch", "-o", "name") as watch:
        direct.run("create", "configmap", "before", "-n", SHOP)
        watch.wait_for_line("configmap/before", timeout=20)
        line = arcbridge("--role", "relay", "--config", str(world.relay_config), "session", "list", "-o", "json")
        listed = json.loads(run(line).stdout)
        assert "read-only no-secrets namespaces" in [row["restricted"] for row in listed]
        world.kill_relay()
        world.start_relay()
        direct.run("create", "configmap", "resumed", "-n", SHOP)
        watch.wait_for_line("configmap/resumed", timeout=60)
        for arguments in (("delete", "configmap", "resumed", "-n", SHOP), ("get", "secrets", "-n", SHOP)):
            done = until(lambda a=arguments: _refused(kubectl, a), "the session answers again", timeout=30)
            assert "this session" in done
    direct.run("delete", "configmap", "before", "resumed", "-n", SHOP)


def _refused(kubectl: Any, arguments: tuple[str, ...]) -> str:
    text = str(kubectl.run(*arguments, check=False).stderr)
    return text if "Forbidden" in text else ""


def test_a_tool_server_for_ai_agents_reads_a_pod_and_cannot_delete_it(world: World, cluster: Cluster, pod: str) -> None:
    try:
        program = mcp_server.program()
    except Unavailable as error:
        require_or_skip("npm", str(error))
    directory = world.directory / "agent-of-alice"
    environment = {**os.environ, **world.client_env(directory)}
    words = arcbridge(*world.client_arguments(ALICE, directory), "run", *RESTRICT, "--for", "1h", "--", str(program))
    with mcp_server.McpServer(words, environment) as server:
        assert {"pods_list_in_namespace", "pods_delete", "pods_exec", "resources_get"} <= server.tools()
        failed, text = server.call("pods_list_in_namespace", namespace=SHOP)
        assert (failed, pod in text) == (False, True)
        assert server.call("pods_log", namespace=SHOP, name=pod)[0] is False
        for tool, flag, arguments in (
            ("pods_delete", "--read-only", {"namespace": SHOP, "name": pod}),
            ("pods_exec", "this session is read-only", {"namespace": SHOP, "name": pod, "command": ["id"]}),
            ("resources_list", "--no-secrets", {"apiVersion": "v1", "kind": "Secret", "namespace": SHOP}),
            ("resources_list", "--namespace", {"apiVersion": "v1", "kind": "Node"}),
        ):
            failed, text = server.call(tool, **arguments)
            assert failed, (tool, text)
            assert flag in text, (tool, text)
    assert cluster.kubectl("get", "pod", pod, "-n", SHOP, "-o", "name").stdout == f"pod/{pod}\n"


def test_a_command_reaches_the_cluster_for_its_time_alone(world: World) -> None:
    kubectl = kubectl_binary("1.36")
    script = f"while {kubectl} get namespaces >/dev/null 2>errors; do :; done; cat errors; exit 7"
    done = world.run_client(ALICE, "run", "--for", "3s", "--", "sh", "-c", f"cd $(dirname $KUBECONFIG); {script}")
    assert done.returncode == 7
    assert "the time that --for gave the session" in done.stdout


def test_every_block_of_the_page(world: World, cluster: Cluster, pod: str, tmp_path: Path) -> None:
    """docs/how-to/read-only.md, as a reader types it on a machine that is logged in."""
    with Machines(
        tmp_path,
        kubectl_binary("1.36"),
        dialled="workstation",
        replaced={"PROGRAM": "kubectl get pods -o name"},
        names=("workstation",),
        environment=world.client_environment(ALICE, tmp_path),
    ) as machines:
        try:
            for block in blocks(ROOT / "docs" / "how-to" / "read-only.md"):
                machines.run(block)
        finally:
            machines.run(Block("the end", 0, "run", "arcbridge stop", "workstation"))
