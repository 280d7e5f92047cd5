"""The snippets of docs/how-to/ci.md: each step's own command, taken from the page, run as its platform runs it.

Only what is a place of the example is replaced: the relay's address, the pins, the issuer's URL. The platforms are
`tests.support.ci_platforms`; relay, agent and API server are real, and so is the TokenRequest of the Tekton snippet.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from tests.support.ci_platforms import AZURE_USER, GITHUB_USER, GITLAB_USER, CiPlatforms
from tests.support.cluster import Cluster, kubectl_binary
from tests.support.processes import require_or_skip, run
from tests.support.reports import audited, until
from tests.support.world import ALICE, RELAY_AUDIENCE, ApiServer, World

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "ci.md"
CLUSTER = "prod-eu"
TEKTON_USER = "system:serviceaccount:ci:builder"
RELAY_APPLICATION = "22222222-2222-2222-2222-222222222222"
CLUSTER_APPLICATION = "33333333-3333-3333-3333-333333333333"
NO_PIN = f"sha256:{64 * '0'}"
USERS = {"github": GITHUB_USER, "gitlab": GITLAB_USER, "entra": AZURE_USER, "kubernetes": TEKTON_USER}
"""Who a job is, by its issuer: the name in policy and RBAC has the issuer's as prefix."""


def snippets() -> dict[str, str]:
    """The blocks of the page that are files, by the name in their first line."""
    blocks = re.findall(r"```(?:yaml|toml)\n# (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return dict(blocks)


class Organisation(World):
    """One whose relay and agent let jobs of four platforms in."""

    platforms: CiPlatforms
    pods: Cluster

    def authentication(self, audience: str) -> str:
        at_relay = audience == RELAY_AUDIENCE
        document = json.loads(super().authentication(audience))
        for name in ("github", "gitlab", "entra"):
            wanted = audience if name != "entra" else RELAY_APPLICATION if at_relay else CLUSTER_APPLICATION
            ca = self.platforms.ca_pem
            document["jwt"].append(
                {
                    "issuer": {"url": self.platforms.url(name), "certificateAuthority": ca, "audiences": [wanted]},
                    "claimMappings": {"username": {"claim": "sub", "prefix": f"{name}:"}},
                }
            )
        issuer = {
            "url": "https://kubernetes.default.svc.cluster.local",
            "discoveryURL": f"{self.pods.api_url}/.well-known/openid-configuration",
            "certificateAuthority": Path(self.pods.ca_file).read_text(),
            "audiences": [audience],
        }
        username = {"claim": "sub", "prefix": "kubernetes:"}
        document["jwt"].append({"issuer": issuer, "claimMappings": {"username": username}})
        return json.dumps(document)


@pytest.fixture(scope="module")
def world(api: ApiServer, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Organisation]:
    # The keys of the cluster's own issuer are not secret; here they are open to all, as at a public issuer URL.
    cluster.grant("system:service-account-issuer-discovery", group="system:unauthenticated")
    world = Organisation(api, cluster=CLUSTER, directory=tmp_path_factory.mktemp("ci"))
    world.pods = cluster
    world.cluster_audience = "arcbridge-{cluster}"
    world.agent_settings = f'forbidden_audiences = ["{RELAY_AUDIENCE}"]\n'
    for issuer, user in USERS.items():
        world.policy += f'[[allow]]\nusers = ["{issuer}:{user}"]\nclusters = ["{CLUSTER}"]\n'
        cluster.grant("edit", user=f"{issuer}:{user}", namespace="default")
    with CiPlatforms() as platforms, world:
        world.platforms = platforms
        yield world.start()


@pytest.fixture(scope="module")
def cluster_pin(world: Organisation) -> str:
    listed = json.loads(world.run_client(ALICE, "clusters", "-o", "json", check=True).stdout)
    return str(listed[0]["cluster_ca_pin"])


class Runner:
    """A fresh machine of a platform with a checkout, `arcbridge` and `kubectl`."""

    def __init__(self, world: Organisation, cluster: Cluster, cluster_pin: str, directory: Path) -> None:
        self.world = world
        self.cluster = cluster
        self.directory = directory
        self.pins = {"ARCBRIDGE_RELAY_CA_PIN": world.relay_pin, "ARCBRIDGE_CLUSTER_CA_PIN": cluster_pin}
        programs = directory / "bin"
        programs.mkdir()
        (programs / "kubectl").symlink_to(kubectl_binary("1.36"))
        (programs / "arcbridge").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m arcbridge "$@"\n')
        (programs / "arcbridge").chmod(0o755)
        self.checkout = directory / "checkout"
        (self.checkout / "deploy").mkdir(parents=True)
        self.name = directory.name.replace("_", "-")
        manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": self.name}}
        (self.checkout / "deploy" / "app.json").write_text(json.dumps(manifest))
        # The machine's own certificate authorities: those of the platforms.
        (directory / "authorities.pem").write_text(world.platforms.ca_pem)
        self.env = {
            **os.environ,
            **world.client_env(directory / "home"),
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(PAGE.parents[2]),
            "SSL_CERT_FILE": str(directory / "authorities.pem"),
            "XDG_RUNTIME_DIR": "",
            "TMPDIR": str(directory),
        }

    def settings(self, snippet: Mapping[str, str]) -> dict[str, str]:
        """The variables that a snippet sets, with this organisation's relay and pins."""
        assert set(snippet) == {"ARCBRIDGE_RELAY", *self.pins}
        return {"ARCBRIDGE_RELAY": self.world.relay_url, **self.pins}

    def step(self, script: str, env: Mapping[str, str], *prefix: str) -> subprocess.CompletedProcess[bytes]:
        """Run a step's script as the platforms do: a shell that stops at the first failure."""
        command = [*prefix, "bash", "-e", "-c", script]
        return run(command, env={**self.env, **env}, cwd=self.checkout, check=False)


@pytest.fixture
def runner(world: Organisation, cluster: Cluster, cluster_pin: str, tmp_path: Path) -> Runner:
    return Runner(world, cluster, cluster_pin, tmp_path)


def check(runner: Runner, done: subprocess.CompletedProcess[bytes]) -> None:
    assert (done.returncode, done.stdout.decode()) == (0, f"configmap/{runner.name} created\n"), done.stderr.decode()
    assert done.stderr == b""


def owner(runner: Runner) -> str:
    """Whom the API server knew when it was deployed (its own audit log)."""

    def users() -> set[str]:
        return {
            event["impersonatedUser"]["username"]
            for event in runner.cluster.audit_events()
            if event.get("objectRef", {}).get("name") == runner.name and event["verb"] == "create"
        }

    (user,) = until(users, "the API server has recorded it")
    return user


def test_github_actions(runner: Runner) -> None:
    job = yaml.safe_load(snippets()[".github/workflows/deploy.yml"])["jobs"]["deploy"]
    *_, step = job["steps"]
    done = runner.step(step["run"], {**runner.settings(job["env"]), **runner.world.platforms.github()})
    check(runner, done)
    assert owner(runner) == f"github:{GITHUB_USER}"
    relay, cluster = [line for line in runner.world.platforms.asked if line.startswith("github ")][-2:]
    for line, audience in ((relay, "arcbridge-relay"), (cluster, "arcbridge-prod-eu")):
        assert re.fullmatch(rf"github arcbridge:key:[\w-]{{43}}@{audience}", line)


def test_gitlab(runner: Runner) -> None:
    job = yaml.safe_load(snippets()[".gitlab-ci.yml"])["deploy"]
    (line,) = job["script"]
    done = runner.step(line, {**runner.settings(job["variables"]), **runner.world.platforms.gitlab(job["id_tokens"])})
    check(runner, done)
    assert owner(runner) == f"gitlab:{GITLAB_USER}"


def test_azure_pipelines(runner: Runner) -> None:
    pipeline = yaml.safe_load(snippets()["azure-pipelines.yml"])
    *_, step = pipeline["steps"]
    assert step["env"] == {"SYSTEM_ACCESSTOKEN": "$(System.AccessToken)"}
    settings = snippets()["arcbridge.toml"]
    here = {
        "https://relay.example.org:443": runner.world.relay_url,
        f'relay_ca_pin = "{NO_PIN}"': f'relay_ca_pin = "{runner.world.relay_pin}"',
        f'cluster_ca_pin = "{NO_PIN}"': f'cluster_ca_pin = "{runner.pins["ARCBRIDGE_CLUSTER_CA_PIN"]}"',
        "https://login.microsoftonline.com/11111111-1111-1111-1111-111111111111/v2.0": runner.world.platforms.url(
            "entra"
        ),
    }
    for example, real in here.items():
        assert example in settings
        settings = settings.replace(example, real, 1)
    (runner.checkout / "arcbridge.toml").write_text(settings)
    done = runner.step(step["inputs"]["inlineScript"], runner.world.platforms.azure())
    check(runner, done)
    assert owner(runner) == f"entra:{AZURE_USER}"
    assert set(runner.world.platforms.asked) >= {
        "azure-devops",
        f"entra api://{RELAY_APPLICATION}/.default",
        f"entra api://{CLUSTER_APPLICATION}/.default",
    }


def pod(runner: Runner, cluster: Cluster) -> tuple[Path, dict[str, str]]:
    """What a pod of the ServiceAccount `builder` finds: its directory, and its environment."""
    directory = runner.directory / "serviceaccount"
    directory.mkdir()
    (directory / "token").write_text(cluster.service_account_token("ci", "builder"))
    (directory / "ca.crt").write_bytes(cluster.ca_pem)
    return directory, {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(cluster.port)}


def test_tekton(runner: Runner, cluster: Cluster) -> None:
    if os.geteuid() != 0 or run(["unshare", "-m", "true"], check=False).returncode:
        require_or_skip("root", "a directory at a pod's place needs root and a mount namespace")
    (step,) = yaml.safe_load(snippets()["task.yaml"])["spec"]["steps"]
    directory, env = pod(runner, cluster)
    cluster.apply(snippets()["rights.yaml"])
    cluster.settle_rbac()
    env |= runner.settings({one["name"]: one["value"] for one in step["env"]})
    script = runner.directory / "script"
    script.write_text(step["script"])
    script.chmod(0o755)
    place = "/var/run/secrets/kubernetes.io/serviceaccount"
    inside = f'mount -t tmpfs none /var/run && mkdir -p {place} && mount --bind "$1" {place} && shift && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", inside, "sh", str(directory), str(script)]
    check(runner, run(command, env={**runner.env, **env}, cwd=runner.checkout, check=False))
    assert owner(runner) == f"kubernetes:{TEKTON_USER}"
    record = audited(runner.world, "the deployment", user=f"kubernetes:{TEKTON_USER}", name=runner.name)
    assert record["bound"] == "audience"
