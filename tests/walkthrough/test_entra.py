"""Azure Arc's walkthrough against the shapes of Entra ID, and what people who leave Arc keep: users and groups.

The tenant and Microsoft Graph are `tests.support.entra`; relay, agent and clients have the files of
config/examples/entra-id, and kubectl speaks to a real API server.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster
from tests.support.entra import CLUSTER, PIPELINE, READER, RELAY, Certificate, Entra, Federated, GraphState
from tests.support.issuer import Issuer
from tests.support.issuer_server import ACTIONS_SECRET
from tests.support.machine import Shell, claims
from tests.support.processes import run
from tests.support.reports import metrics, until
from tests.support.world import arcbridge
from tests.walkthrough.people import JOB_ID, STAFF, EntraMachine, EntraWorld

pytestmark = pytest.mark.timeout(180)

DEMO = "arc-demo"
"""The namespace of the walkthrough's workload."""
MANY = tuple(str(uuid.UUID(int=n)) for n in range(1, 251))


@pytest.fixture(scope="session")
def enrolled(world: EntraWorld) -> EntraWorld:
    """The organisation with its agent, whichever test comes first."""
    world.start_agent(extra=world.graph())
    return world


@pytest.fixture(autouse=True)
def usual(entra: Entra) -> Iterator[None]:
    """Each test finds Graph well, and the tenant's applications as they were."""
    entra.graph = GraphState()
    yield
    entra.applications[CLUSTER].version = 2
    entra.applications[RELAY].assigned = None


def bind(cluster: Cluster, name: str, role: str, user: str) -> None:
    """`kubectl create clusterrolebinding NAME --clusterrole ROLE --user=$AAD_ENTITY_ID`, word by word."""
    cluster.kubectl("create", "clusterrolebinding", name, f"--clusterrole={role}", f"--user={user}")


def test_arc_s_walkthrough(cluster: Cluster, enrolled: EntraWorld, entra: Entra) -> None:
    """Azure Arc's own ("Use cluster connect to securely connect to clusters"), step by step.

    What `az connectedk8s connect`, `kubectl create clusterrolebinding`, `az login`, `az connectedk8s proxy` and
    `kubectl` do there, the executable and kubectl do here.
    """
    command = arcbridge("--role", "relay", "cluster", "list", "--config", str(enrolled.relay_config), "-o", "json")

    def connected() -> bool:
        (found,) = [one for one in json.loads(run(command).stdout) if one["name"] == enrolled.cluster]
        return bool(found["state"] == "Connected")

    until(connected, "the cluster is connected", timeout=30)
    cluster.ensure_namespace(DEMO)
    user = entra.hire("anna@example.org", groups=[STAFF])
    anna = EntraMachine.at_work(enrolled, "anna", user=user)
    pipeline, application = EntraMachine.at_work(enrolled, "pipeline", "ci.toml"), entra.applications[PIPELINE]
    secret = pipeline.directory / "client-secret"
    secret.touch(mode=0o600)
    secret.write_text(application.secret)
    cluster.add_pod("demo-anna", DEMO)
    bind(cluster, "demo-user-binding", "cluster-admin", user.upn)
    bind(cluster, "demo-app-binding", "view", application.object_id)
    cluster.settle_rbac()

    # A person.
    assert "Logged in as" in anna.log_in()
    anna.start()
    shell = Shell(cluster, anna)
    assert shell.whoami()["username"] == user.upn
    assert "demo-anna" in shell.kubectl.run("get", "pods", "-n", DEMO).stdout
    assert not shell.refusal("create", "configmap", "by-anna", "-n", DEMO)

    # A job, which was bound to less.
    pipeline.start()
    job = Shell(cluster, pipeline)
    assert job.whoami()["username"] == application.object_id
    assert "demo-anna" in job.kubectl.run("get", "pods", "-n", DEMO).stdout
    assert "orbidden" in job.refusal("delete", "configmap", "by-anna", "-n", DEMO)

    # What both did is on record under their own names.
    until(
        lambda: {user.upn, application.object_id} <= {record.get("user") for record in enrolled.audit_lines()},
        "both are in the audit log",
    )


class TestPeople:
    def test_by_a_code_with_a_token_for_each_of_two_resources(
        self, cluster: Cluster, enrolled: EntraWorld, entra: Entra
    ) -> None:
        cluster.grant("view", group=STAFF)
        user = entra.hire("bert@example.org", groups=[STAFF])
        bert = EntraMachine.at_work(enrolled, "bert", user=user)
        assert "Logged in" in bert.log_in_by_device()
        bert.start()
        who = Shell(cluster, bert).whoami()
        assert (who["username"], who["uid"]) == ("bert@example.org", user.object_id)
        assert who["groups"] == [STAFF, "system:authenticated"]
        assert (claims(bert.kept["access_token"])["aud"], claims(bert.cluster_token)["aud"]) == (RELAY, CLUSTER)

    def test_a_v1_token_means_the_same_person(self, cluster: Cluster, enrolled: EntraWorld, entra: Entra) -> None:
        entra.applications[CLUSTER].version = 1
        user = entra.hire("carl@example.org", groups=[STAFF])
        change = {
            f'cluster_audience = "{CLUSTER}"': f'cluster_audience = "api://{CLUSTER}"',
            '"api://{audience}/.default"': '"{audience}/.default"',
        }
        carl = EntraMachine.at_work(enrolled, "carl", user=user, change=change)
        carl.log_in()
        carl.start()
        who = Shell(cluster, carl).whoami()
        assert (who["username"], who["uid"]) == ("carl@example.org", user.object_id)
        assert claims(carl.cluster_token)["iss"] == entra.issuer_v1

    def test_a_token_that_names_a_key_counts_with_its_proof(
        self, cluster: Cluster, enrolled: EntraWorld, entra: Entra
    ) -> None:
        user = entra.hire("dana@example.org", groups=[STAFF])
        dana = EntraMachine.at_work(enrolled, "dana", user=user, change={"[login]\n": "[login]\npop = true\n"})
        dana.log_in()
        dana.start()
        assert Shell(cluster, dana).whoami()["username"] == "dana@example.org"
        assert set(claims(dana.kept["access_token"])["cnf"]) == {"kid", "xms_ksl"}
        lines = until(
            lambda: [line for line in enrolled.audit_lines() if line.get("user") == "dana@example.org"],
            "dana is in the audit log",
        )
        assert {line["bound"] for line in lines} == {"cnf.kid"}
        # The same tokens on another machine, which does not have the key.
        thief = EntraMachine.with_tokens(enrolled, "thief", dana.kept["access_token"], dana.cluster_token)
        status, said = thief.run("clusters", check=False)
        assert status == 3
        assert "bound to a key and came without a proof" in said

    def test_more_groups_than_a_token_holds(self, cluster: Cluster, enrolled: EntraWorld, entra: Entra) -> None:
        cluster.grant("view", group=STAFF)
        user = entra.hire("gwen@example.org", groups=[*MANY, STAFF])
        gwen = EntraMachine.at_work(enrolled, "gwen", user=user)
        gwen.log_in()
        gwen.start()
        shell = Shell(cluster, gwen)
        assert set(shell.whoami()["groups"]) == {*MANY, STAFF, "system:authenticated"}
        assert not shell.refusal("get", "pods", "-n", "default")
        # Relay and agent asked once each, and neither went where the token points.
        assert entra.graph.asked == [f"users/{user.object_id}"] * 2
        assert not [path for path in entra.requests if "trap" in path]

    def test_when_graph_does_not_answer_no_user_comes_in_with_fewer_groups(
        self, cluster: Cluster, enrolled: EntraWorld, entra: Entra
    ) -> None:
        entra.applications[RELAY].assigned = (STAFF,)  # its tokens name the groups that are assigned to it
        user = entra.hire("hugo@example.org", groups=[*MANY, STAFF])
        hugo = EntraMachine.at_work(enrolled, "hugo", user=user)
        hugo.log_in()
        entra.graph.status, entra.graph.retry_after = 503, "1"
        refused = hugo.begin("--file", "kubeconfig", "--port", "0")
        assert refused.wait(60) == 4
        said = refused.output()
        assert (
            "the groups of this login cannot be looked up now: Microsoft Graph is busy (status 503); try again shortly"
            in said
        )
        assert re.search(r"\(session [0-9a-f]{16}\)", said), "by which the operators find it in their logs"
        assert not [line for line in enrolled.audit_lines() if line.get("user") == user.upn]
        entra.graph.status = 200

        def comes_in() -> bool:
            again = hugo.begin("--file", str(hugo.directory / "kubeconfig"), "--port", "0")
            return bool(again.wait_for_line(r"(Start sending)|groups of this login", timeout=30)[1])

        until(comes_in, "Graph is asked again", timeout=60)
        assert STAFF in Shell(cluster, hugo).whoami()["groups"]

    def test_a_credential_for_graph_that_lapses_shows_and_a_new_one_counts_without_a_restart(
        self, cluster: Cluster, enrolled: EntraWorld, entra: Entra
    ) -> None:
        entra.applications[RELAY].assigned = (STAFF,)
        user = entra.hire("ines@example.org", groups=[*MANY, STAFF])
        ines = EntraMachine.at_work(enrolled, "ines", user=user)
        ines.log_in()
        reader = entra.applications[READER]
        reader.secret, entra.graph.revoked = f"{reader.secret}-next", True
        refused = ines.begin("--file", "kubeconfig", "--port", "0")
        assert refused.wait(60) == 4
        assert "the groups of this login cannot be looked up now: " in refused.output()
        enrolled.agent.wait_for_line(re.escape("gets no token for Microsoft Graph (status 401, invalid_client)"))
        failing = 'arcbridge_agent_check_ok{check="groups"}'
        until(lambda: metrics(enrolled.agent_observe)[failing] == 0.0, "the self-check has failed", timeout=60)
        enrolled.agent.wait_for_line('"check":"groups","code":"graph_credential"')
        enrolled.graph()  # the file has the new secret
        until(lambda: metrics(enrolled.agent_observe)[failing] == 1.0, "the new secret counts", timeout=60)
        ines.start()
        assert STAFF in Shell(cluster, ines).whoami()["groups"]


class TestPipelines:
    """Each way in which an application or managed identity proves itself, as one object id in RBAC."""

    def job(self, cluster: Cluster, enrolled: EntraWorld, machine: EntraMachine) -> None:
        machine.start()
        who = Shell(cluster, machine).whoami()
        assert (who["username"], who["uid"]) == (JOB_ID, JOB_ID)

    def test_by_a_certificate(self, cluster: Cluster, enrolled: EntraWorld, entra: Entra) -> None:
        certificate = Certificate.make("arcbridge-ci")
        entra.applications[PIPELINE].certificates.append(certificate)
        machine = EntraMachine.at_work(enrolled, "by-certificate", "ci-certificate.toml")
        certificate.write(machine.directory, "client-certificate")
        (machine.directory / "client-certificate.key").rename(machine.directory / "client-key.pem")
        self.job(cluster, enrolled, machine)

    def test_as_a_job_of_github_actions_and_as_a_pod(
        self, cluster: Cluster, enrolled: EntraWorld, entra: Entra, tmp_path: Path
    ) -> None:
        with Issuer(tmp_path / "issuer") as issuer:
            pod = "system:serviceaccount:shop:deploy"
            for subject in ("repo:example/shop:ref:refs/heads/main", pod):
                entra.applications[PIPELINE].federated.append(Federated(issuer.url, subject, issuer.ca_file))
            github = EntraMachine.at_work(
                enrolled,
                "by-github",
                "ci-github.toml",
                env={
                    "SSL_CERT_FILE": str(issuer.ca_file),
                    "ACTIONS_ID_TOKEN_REQUEST_URL": f"{issuer.url}/actions?api-version=2.0",
                    "ACTIONS_ID_TOKEN_REQUEST_TOKEN": ACTIONS_SECRET,
                },
            )
            self.job(cluster, enrolled, github)
            file = tmp_path / "azure-identity-token"
            file.write_text(issuer.mint(sub=pod, aud="api://AzureADTokenExchange"))
            place = "/var/run/secrets/azure/tokens/azure-identity-token"
            self.job(
                cluster, enrolled, EntraMachine.at_work(enrolled, "by-pod", "ci-pod.toml", change={place: str(file)})
            )
            # Another job's token is no credential of this application.
            file.write_text(issuer.mint(sub="system:serviceaccount:other:other", aud="api://AzureADTokenExchange"))
            other = EntraMachine.at_work(enrolled, "by-other", "ci-pod.toml", change={place: str(file)})
            status, said = other.run("clusters", check=False)
            assert status == 3
            assert "AADSTS700213" in said

    def test_as_a_managed_identity(self, cluster: Cluster, enrolled: EntraWorld, entra: Entra) -> None:
        identity = entra.applications[PIPELINE]
        tokens = {audience: entra.token_for(identity, audience) for audience in (RELAY, CLUSTER)}
        machine = EntraMachine.at_work(
            enrolled, "by-identity", "ci-managed-identity.toml", change={"/etc/arcbridge/": f"{enrolled.directory}/"}
        )
        # The metadata service of the machine has one address everywhere, which is not ours to have; it answers so.
        script = enrolled.directory / "managed-identity-token.sh"
        lines = ["#!/bin/sh", f'case "${{ARCBRIDGE_TOKEN_AUDIENCE:-{RELAY}}}" in']
        lines += [f"""{one}) echo '{json.dumps({"access_token": text})}' ;;""" for one, text in tokens.items()]
        script.write_text("\n".join([*lines, "esac", ""]))
        script.chmod(0o755)
        self.job(cluster, enrolled, machine)


class TestTheTenant:
    def test_keys_of_personal_accounts_sign_nothing_here(self, enrolled: EntraWorld, entra: Entra) -> None:
        user = entra.hire("ivan@example.org", groups=[STAFF])
        for key, name in ((None, "ivan"), (entra.foreign_key, "forger")):
            tokens = (entra.token_for(user, one, key=key) for one in (RELAY, CLUSTER))
            status, said = EntraMachine.with_tokens(enrolled, name, *tokens).run("clusters", check=False)
            assert (status == 0) is (key is None), said
