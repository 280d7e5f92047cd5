"""The walkthrough of Azure Arc's documentation ("Use cluster connect to securely connect to clusters"), step by step.

What `az connectedk8s connect`, `kubectl create clusterrolebinding`, `az login`, `az connectedk8s proxy` and `kubectl`
do there, the executable and kubectl do here. The identity provider is given by an `Organisation`.
"""

from __future__ import annotations

import json
from typing import Protocol

from tests.support.cluster import Cluster
from tests.support.machine import Machine, Shell
from tests.support.processes import run
from tests.support.reports import until
from tests.support.world import World, arcbridge

DEMO = "arc-demo"
"""The namespace of the walkthrough's workload."""


class Organisation(Protocol):
    """An identity provider with its files of config/examples, and a world whose issuer it is."""

    @property
    def world(self) -> World: ...

    def person(self, name: str) -> tuple[Machine, str]:
        """A user who may reach the cluster, and the user's name in RBAC: by UPN where the provider has such."""
        ...

    def pipeline(self) -> tuple[Machine, str]:
        """A job as an application, and that one's name in RBAC: by object id where the provider has such."""
        ...


def enrol(world: World) -> None:
    """`az connectedk8s connect`: a join token, the agent, and the cluster stands in the list as connected."""
    world.start_agent()
    command = arcbridge("--role", "relay", "cluster", "list", "--config", str(world.relay_config), "-o", "json")

    def connected() -> bool:
        (found,) = [one for one in json.loads(run(command).stdout) if one["name"] == world.cluster]
        return bool(found["state"] == "Connected")

    until(connected, "the cluster is connected", timeout=30)


def bind(cluster: Cluster, name: str, role: str, user: str) -> None:
    """`kubectl create clusterrolebinding NAME --clusterrole ROLE --user=$AAD_ENTITY_ID`, word by word."""
    cluster.kubectl("create", "clusterrolebinding", name, f"--clusterrole={role}", f"--user={user}")


def walk(cluster: Cluster, organisation: Organisation) -> None:
    """Enrol, bind a user and an application, log in, `kubectl get`, and the same as a job of a pipeline."""
    world = organisation.world
    enrol(world)
    cluster.ensure_namespace(DEMO)

    anna, user = organisation.person("anna")
    pipeline, application = organisation.pipeline()
    tag = user.partition("@")[0].replace(":", "-")
    cluster.add_pod(f"demo-{tag}", DEMO)
    bind(cluster, f"demo-user-binding-{tag}", "cluster-admin", user)
    bind(cluster, f"demo-app-binding-{tag}", "view", application)
    cluster.settle_rbac()

    # A person.
    assert "Logged in as" in anna.log_in()
    anna.start()
    shell = Shell(cluster, anna)
    assert shell.whoami()["username"] == user
    assert f"demo-{tag}" in shell.kubectl.run("get", "pods", "-n", DEMO).stdout
    assert not shell.refusal("create", "configmap", f"by-{tag}", "-n", DEMO)

    # A job, which was bound to less.
    pipeline.start()
    job = Shell(cluster, pipeline)
    assert job.whoami()["username"] == application
    assert f"demo-{tag}" in job.kubectl.run("get", "pods", "-n", DEMO).stdout
    assert "orbidden" in job.refusal("delete", "configmap", f"by-{tag}", "-n", DEMO)

    # What both did is on record under their own names.
    until(
        lambda: {user, application} <= {record.get("user") for record in world.audit_lines()},
        "both are in the audit log",
    )
