"""A real Kubernetes control plane for tests: etcd, kube-apiserver and a node whose containers are local processes.

    with Cluster() as cluster:
        cluster.add_pod("web")
        cluster.kubectl("exec", "web", "--", "hostname")

The programs are built by Go from `tests/cluster` on first use, into a cache outside the repository; with
KUBEBUILDER_ASSETS set, kube-apiserver, etcd and kubectl are taken from there. `Unavailable` says what is missing.

From the command line, `python -m tests.support.cluster` starts one and stays until Ctrl-C, and
`python -m tests.support.cluster build` only builds and prints the directory.

Everything listens on loopback and ends with the process that started it, also when that is killed.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import trustme

from tests.support.kube_programs import KUBECTL_MINORS as KUBECTL_MINORS
from tests.support.kube_programs import KUBERNETES_VERSION as KUBERNETES_VERSION
from tests.support.kube_programs import Binaries as Binaries
from tests.support.kube_programs import Kubectl as Kubectl
from tests.support.kube_programs import Unavailable as Unavailable
from tests.support.kube_programs import binaries as binaries
from tests.support.kube_programs import cache_directory as cache_directory
from tests.support.kube_programs import helm as helm
from tests.support.kube_programs import k9s as k9s
from tests.support.kube_programs import kubectl_binary as kubectl_binary
from tests.support.kube_programs import kubectl_versions as kubectl_versions
from tests.support.kube_programs import net_http_server as net_http_server
from tests.support.kube_programs import require_isolation as require_isolation
from tests.support.processes import ManagedProcess, ProcessFailed
from tests.support.stopping import Stopping
from tests.support.world import fixed_port

_TESTS = Path(__file__).resolve().parents[1]
AGENT_MANIFESTS = _TESTS.parent / "config" / "kubernetes" / "overlays" / "impersonation-legacy"
NODE = "node-1"
_GATES = "--feature-gates=PodCertificateRequest=true,ClusterTrustBundle=true,ClusterTrustBundleProjection=true"
_POD_CERTIFICATES = (
    _GATES,
    "--runtime-config=certificates.k8s.io/v1beta1=true",
    "--enable-admission-plugins=NodeRestriction",
)
ACTS_AS_ANY = "test-acts-as-any"
"""ClusterRole with which a ServiceAccount may impersonate every user and group."""


class ApiError(RuntimeError):
    """The API server answered with an error; `status` is its HTTP code, `body` what it said."""

    def __init__(self, method: str, path: str, status: int, body: str) -> None:
        super().__init__(f"{method} {path}: {status} {body}")
        self.status = status
        self.body = body


# The cluster.


class Cluster(Stopping):
    """A running control plane. Starts in the constructor (about two seconds) and ends with `stop` or the `with` block.

    `extra_args` are appended to kube-apiserver's own, and a flag given there wins. Events of its audit log (level
    Metadata) are in `audit_events()`.

    `images` makes it run workloads as a cluster does: kube-controller-manager makes pods of DaemonSets, Deployments and
    StatefulSets, and ServiceAccounts, and the node isolates them (namespaces, hence root), each image being the command
    of this machine that `images` has for its repository. A node that is alone leads from 127.0.0.1 to node ports.
    Raises `Unavailable` where that cannot be. With several `nodes`, `node-1` and on, kube-scheduler chooses among them,
    and node-1 isolates nothing.

    `pod_certificates` switches on PodCertificateRequests and ClusterTrustBundles, which are beta in Kubernetes 1.36,
    and the authorizer and admission that narrow what a node may ask for. `tests.support.pod_signer` is the signer.
    """

    def __init__(
        self,
        *,
        directory: Path | None = None,
        extra_args: Sequence[str] = (),
        images: Mapping[str, Sequence[str]] | None = None,
        nodes: int = 1,
        pod_certificates: bool = False,
    ) -> None:
        self.binaries = binaries()
        self._pod_certificates = pod_certificates
        self._images = images
        self._nodes = nodes
        if images is not None:
            require_isolation()
            if self.binaries.kube_controller_manager is None:
                raise Unavailable("KUBEBUILDER_ASSETS has no kube-controller-manager; unset it to have one built")
        if nodes > 1 and self.binaries.kube_scheduler is None:
            raise Unavailable("KUBEBUILDER_ASSETS has no kube-scheduler; unset it to have one built")
        self.directory = Path(tempfile.mkdtemp(prefix="arcbridge-cluster-")) if directory is None else directory
        self._temporary = directory is None
        self.directory.mkdir(parents=True, exist_ok=True)
        self.processes: list[ManagedProcess] = []
        self._kubectl: dict[str, Kubectl] = {}
        self._sockets: Path | None = None
        self._numbered = 0
        try:
            self._make_certificates()
            self._start(list(extra_args))
        except BaseException:
            self.stop()
            raise

    # Attributes for the tests that connect.

    @property
    def api_url(self) -> str:
        """The API server's address, `https://127.0.0.1:PORT`."""
        return f"https://127.0.0.1:{self.port}"

    @property
    def ca_file(self) -> Path:
        """The CA of the API server's certificate, which is for 127.0.0.1, localhost and kubernetes.default.svc."""
        return self.directory / "serving-ca.crt"

    @property
    def ca_pem(self) -> bytes:
        return self.ca_file.read_bytes()

    @property
    def client_ca(self) -> trustme.CA:
        """The CA whose client certificates the API server takes."""
        return self._client_ca

    @property
    def kubeconfig(self) -> Path:
        """A kubeconfig of a member of system:masters."""
        return self.directory / "admin.kubeconfig"

    @property
    def logs(self) -> Path:
        """The directory with the logs of all three programs."""
        return self.directory / "logs"

    # Acting as administrator.

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Any:
        """Send one request as administrator and return the decoded JSON. Raises `ApiError`."""
        with self._open(method, path, body, content_type, accept=accept) as answer:
            return json.load(answer)

    def kubectl(
        self,
        *args: str | os.PathLike[str],
        version: str = KUBECTL_MINORS[0],
        input: str | None = None,
        timeout: float = 60,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl as administrator, straight to the API server."""
        return self.kubectl_for(version).run(*args, input=input, timeout=timeout, check=check)

    def kubectl_for(self, version: str = KUBECTL_MINORS[0], kubeconfig: Path | None = None) -> Kubectl:
        """Return kubectl of a minor version, as administrator or with another kubeconfig, in a home of its own."""
        key = f"{version}\0{kubeconfig or ''}"
        if key not in self._kubectl:
            home = self.directory / "home" / f"{version}-{len(self._kubectl)}"
            self._kubectl[key] = Kubectl(kubectl_binary(version), kubeconfig or self.kubeconfig, home)
        return self._kubectl[key]

    def apply(self, manifest: str | Mapping[str, object]) -> None:
        """Apply YAML text, or one object, with kubectl."""
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        self.kubectl("apply", "--validate=false", "-f", "-", input=text)

    def ensure_namespace(self, name: str) -> None:
        """Create the namespace unless it exists."""
        self._ensure("/api/v1/namespaces", {"metadata": {"name": name}})

    def add_pod(
        self,
        name: str,
        namespace: str = "default",
        *,
        command: Sequence[str] = ("sleep", "infinity"),
        stdin: bool = False,
        env: Mapping[str, str] | None = None,
        ports: Sequence[int] = (),
    ) -> dict[str, Any]:
        """Create a pod on the node, wait until it runs (or has ended), and return it.

        Its one container is a local process. Port N of the pod is port N of 127.0.0.1; `ports` only declares them.
        Creates the namespace if need be.
        """
        self.ensure_namespace(namespace)
        main: dict[str, object] = {"name": "main", "image": "local", "command": list(command), "stdin": stdin}
        main["env"] = [{"name": key, "value": value} for key, value in (env or {}).items()]
        main["ports"] = [{"containerPort": port} for port in ports]
        created = self.request(
            "POST",
            f"/api/v1/namespaces/{namespace}/pods",
            {
                "metadata": {"name": name},
                "spec": {
                    "nodeName": NODE,
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": 1,
                    "containers": [main],
                },
            },
        )
        timeout = 15.0
        for kind, pod in self._watch_pod(created, timeout):
            if kind == "DELETED" or pod["status"].get("phase") in ("Running", "Succeeded", "Failed"):
                return pod
        raise ProcessFailed(f"pod {namespace}/{name} does not run after {timeout} s\n{self.processes[-1].tail()}")

    def delete_pod(self, name: str, namespace: str = "default") -> None:
        """Delete a pod at once, and with it its processes."""
        self.request("DELETE", f"/api/v1/namespaces/{namespace}/pods/{name}", {"gracePeriodSeconds": 0})

    def service_account_token(self, namespace: str, name: str, *, lifetime: int = 3600) -> str:
        """Return a token from the TokenRequest API; creates namespace and service account if need be.

        `lifetime` is in seconds; the API server takes no less than 600.
        """
        self.ensure_namespace(namespace)
        accounts = f"/api/v1/namespaces/{namespace}/serviceaccounts"
        self._ensure(accounts, {"metadata": {"name": name}})
        body = {"spec": {"expirationSeconds": lifetime}}
        return str(self.request("POST", f"{accounts}/{name}/token", body)["status"]["token"])

    def install_agent(self) -> None:
        """Apply the shipped manifests of the agent, and let it act as any user and group.

        Tests make up their people, whom the manifests cannot name. Returns once the API server's authorizer knows.
        """
        self.kubectl("apply", "-k", str(AGENT_MANIFESTS))
        role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": ACTS_AS_ANY}}
        rules = [{"apiGroups": [""], "resources": ["users", "groups"], "verbs": ["impersonate"]}]
        self.apply({**role, "rules": rules})
        self.grant(ACTS_AS_ANY, service_account=("arcbridge", "arcbridge-agent"))

    def grant(
        self,
        role: str,
        *,
        user: str | None = None,
        group: str | None = None,
        service_account: tuple[str, str] | None = None,
        namespace: str | None = None,
    ) -> None:
        """Bind a ClusterRole to a user, a group or a service account (namespace, name), everywhere or in one namespace.

        Returns once the API server's authorizer knows.
        """
        self._numbered += 1
        subjects: list[dict[str, str]] = []
        for kind, subject in (("User", user), ("Group", group)):
            if subject is not None:
                subjects.append({"kind": kind, "name": subject, "apiGroup": "rbac.authorization.k8s.io"})
        if service_account is not None:
            where, who = service_account
            subjects.append({"kind": "ServiceAccount", "namespace": where, "name": who})
        if namespace is not None:
            self.ensure_namespace(namespace)
        scope = "clusterrolebindings" if namespace is None else f"namespaces/{namespace}/rolebindings"
        self.request(
            "POST",
            f"/apis/rbac.authorization.k8s.io/v1/{scope}",
            {
                "metadata": {"name": f"test-{self._numbered}"},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
                "subjects": subjects,
            },
        )
        self.settle_rbac()

    def settle_rbac(self) -> None:
        """Return once all roles and bindings written so far are in force.

        The authorizer reads them from watches, so a binding that was just created may be unknown to the next request.
        Each watch keeps the order of writes: when a marker written now is in force, so is everything before it.
        """
        self._numbered += 1
        rbac, marker = "/apis/rbac.authorization.k8s.io/v1", f"settled-{self._numbered}"
        subjects = [{"kind": "Group", "name": f"test:{marker}", "apiGroup": "rbac.authorization.k8s.io"}]
        questions = []
        for kind, where in (("ClusterRole", ""), ("Role", "/namespaces/default")):
            rule = {"apiGroups": ["test.invalid"], "resources": [marker, kind.lower()], "verbs": ["get"]}
            reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": marker}
            self.request("POST", f"{rbac}{where}/{kind.lower()}s", {"metadata": {"name": marker}, "rules": [rule]})
            self.request(
                "POST",
                f"{rbac}{where}/{kind.lower()}bindings",
                {"metadata": {"name": marker}, "roleRef": reference, "subjects": subjects},
            )
            asked = {"verb": "get", "group": "test.invalid", "resource": kind.lower(), "namespace": "default"}
            questions.append({"spec": {"groups": [f"test:{marker}"], "resourceAttributes": asked}})
        deadline = time.monotonic() + 30
        for question in questions:
            while not self.request("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", question)["status"][
                "allowed"
            ]:
                if time.monotonic() > deadline:
                    raise ProcessFailed("roles are not in force after 30 s")
                time.sleep(0.005)

    def client_certificate(self, user: str, groups: Sequence[str] = ()) -> tuple[bytes, bytes]:
        """Return a certificate that the API server takes for a user of at most one group, and its key, both PEM."""
        # Without a host name its certificate would have an empty critical extension, which Go refuses.
        (group,) = groups or (None,)
        leaf = self._client_ca.issue_cert("client.invalid", common_name=user, organization_name=group)
        return leaf.cert_chain_pems[0].bytes(), leaf.private_key_pem.bytes()

    def write_kubeconfig(
        self, path: Path, *, token: str | None = None, user: str | None = None, groups: Sequence[str] = ()
    ) -> Path:
        """Write a kubeconfig that goes straight to the API server, with a token or as a user with groups."""
        if token is not None:
            credentials = {"token": token}
        else:
            assert user is not None, "a token or a user"
            certificate, key = self.client_certificate(user, groups)
            credentials = {"client-certificate-data": _base64(certificate), "client-key-data": _base64(key)}
        _write_private(
            path,
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "test",
                    "clusters": [
                        {
                            "name": "test",
                            "cluster": {"server": self.api_url, "certificate-authority-data": _base64(self.ca_pem)},
                        }
                    ],
                    "users": [{"name": "test", "user": credentials}],
                    "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
                },
                indent=1,
            ).encode(),
        )
        return path

    def audit_events(self) -> list[dict[str, Any]]:
        """Return the API server's audit log so far: who asked for what, on whose behalf, and the answer's code."""
        text = (self.directory / "audit.log").read_bytes()
        return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]

    # Ending.

    def stop(self) -> None:
        """End all programs and remove the directory, if it was made here. May be called twice."""
        for process in reversed(self.processes):
            if process.name.startswith("node"):
                process.stop()  # it ends its containers
            else:
                process.kill()  # the data is thrown away, so there is nothing to end in order
        self.processes.clear()
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)
        if self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)

    # Starting.

    def _make_certificates(self) -> None:
        self._client_ca = trustme.CA()
        serving_ca = trustme.CA()
        serving_ca.cert_pem.write_to_path(str(self.ca_file))
        self._client_ca.cert_pem.write_to_path(str(self.directory / "client-ca.crt"))
        names = ("127.0.0.1", "::1", "localhost", "kubernetes.default.svc")
        for name, leaf in (("apiserver", serving_ca.issue_cert(*names)), ("node", serving_ca.issue_cert("127.0.0.1"))):
            _write_private(self.directory / f"{name}.crt", leaf.cert_chain_pems[0].bytes())
            _write_private(self.directory / f"{name}.key", leaf.private_key_pem.bytes())
        for name in ("kubelet-client", "admin"):
            certificate, key = self.client_certificate(name, ["system:masters"])
            _write_private(self.directory / f"{name}.crt", certificate)
            _write_private(self.directory / f"{name}.key", key)
        _write_private(self.directory / "service-account.key", trustme.CA().private_key_pem.bytes())

    def _start(self, extra_args: list[str]) -> None:
        where = self.directory
        (where / "audit-policy.yaml").write_text(
            json.dumps(
                {
                    "apiVersion": "audit.k8s.io/v1",
                    "kind": "Policy",
                    "omitStages": ["RequestReceived"],
                    "rules": [{"level": "None", "users": ["system:apiserver"]}, {"level": "Metadata"}],
                }
            )
        )
        # 108 characters are all that the address of a Unix socket holds, and `where` may have more.
        self._sockets = Path(tempfile.mkdtemp(prefix="arcbridge-etcd-", dir="/tmp"))
        etcd_socket = f"unix://{self._sockets}/etcd.sock"
        etcd = ManagedProcess(
            [
                self.binaries.etcd,
                f"--data-dir={where}/etcd",
                "--unsafe-no-fsync",
                f"--listen-client-urls={etcd_socket}",
                "--advertise-client-urls=http://127.0.0.1:0",  # must have a port; a single member tells no other
                "--listen-peer-urls=http://127.0.0.1:0",
                "--initial-advertise-peer-urls=http://127.0.0.1:0",
                "--initial-cluster=default=http://127.0.0.1:0",
                "--heartbeat-interval=10",
                "--election-timeout=100",  # milliseconds until the only member elects itself: a second by default
            ],
            log_dir=self.logs,
            name="etcd",
            cwd=where,
        )
        self.processes.append(etcd)
        etcd.wait_for_line("ready to serve client requests", timeout=30)
        context = ssl.create_default_context(cafile=self.ca_file)
        context.load_cert_chain(where / "admin.crt", where / "admin.key")
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        self.port = fixed_port()
        apiserver = ManagedProcess(
            [self.binaries.kube_apiserver, *self._apiserver_args(etcd_socket), *extra_args],
            log_dir=self.logs,
            name="kube-apiserver",
            cwd=where,
        )
        self.processes.append(apiserver)
        try:
            apiserver.wait_for_url(f"{self.api_url}/readyz", context=context, timeout=60)
        except ProcessFailed as error:
            raise ProcessFailed(f"{error}\n{etcd.tail()}") from None
        self.write_kubeconfig(self.kubeconfig, user="admin", groups=["system:masters"])
        for number in range(1, self._nodes + 1):
            self._start_node(f"node-{number}")
        self.ensure_namespace("default")  # which a controller of the API server makes, sooner or later
        self._aggregate_roles()
        if self._images is not None:
            self._start_controllers()
        if self._nodes > 1:
            self._start_scheduler()

    def _start_node(self, name: str) -> None:
        where = self.directory
        node = ManagedProcess(
            [
                self.binaries.node,
                f"--kubeconfig={self.kubeconfig}",
                f"--name={name}",
                f"--root={where}/pods/{name}",
                f"--bind={'true' if self._nodes == 1 else 'false'}",
                f"--tls-cert-file={where}/node.crt",
                f"--tls-private-key-file={where}/node.key",
                f"--client-ca-file={where}/client-ca.crt",
                *([] if self._nodes > 1 and name == NODE else self._isolation()),
            ],
            log_dir=self.logs,
            name="node" if name == NODE else name,
            cwd=where,
            death_signal=signal.SIGTERM,  # so that it ends its containers
        )
        self.processes.append(node)
        node.wait_for_line(r"^ready \d+$", stream="stdout", timeout=30)

    def _isolation(self) -> list[str]:
        if self._images is None:
            return []
        images = {repository: list(command) for repository, command in self._images.items()}
        return ["--isolate", f"--images={json.dumps(images)}", f"--api-port={self.port}"]

    def _start_controllers(self) -> None:
        where = self.directory
        controllers = (
            "daemonset-controller",
            "deployment-controller",
            "replicaset-controller",
            "statefulset-controller",
            "serviceaccount-controller",
            "root-ca-certificate-publisher-controller",
            "disruption-controller",
            "garbage-collector-controller",
            *(["kube-apiserver-serving-clustertrustbundle-publisher-controller"] if self._pod_certificates else []),
        )
        manager = ManagedProcess(
            [
                self.binaries.kube_controller_manager or "",
                f"--kubeconfig={self.kubeconfig}",
                f"--root-ca-file={self.ca_file}",
                f"--controllers={','.join(controllers)}",
                *([_GATES] if self._pod_certificates else []),
                "--bind-address=127.0.0.1",
                "--secure-port=0",
                "--leader-elect=false",
                # A client-side queue would make a test wait for nothing.
                "--kube-api-qps=200",
                "--kube-api-burst=400",
            ],
            log_dir=self.logs,
            name="kube-controller-manager",
            cwd=where,
        )
        self.processes.append(manager)
        manager.wait_for_line("Proceeding to collect garbage", timeout=60)  # the last of all to begin

    def _start_scheduler(self) -> None:
        scheduler = ManagedProcess(
            [
                self.binaries.kube_scheduler or "",
                f"--kubeconfig={self.kubeconfig}",
                "--bind-address=127.0.0.1",
                "--secure-port=0",
                "--leader-elect=false",
            ],
            log_dir=self.logs,
            name="kube-scheduler",
            cwd=self.directory,
        )
        self.processes.append(scheduler)

    def _aggregate_roles(self) -> None:
        """Fill in `view`, `edit` and `admin`, which are empty where no controller manager runs."""
        path, rules = "/apis/rbac.authorization.k8s.io/v1/clusterroles", []
        for name in ("view", "edit", "admin"):  # each includes those before it
            rules += self.request("GET", f"{path}/system:aggregate-to-{name}")["rules"]
            self.request("PATCH", f"{path}/{name}", {"rules": rules}, content_type="application/merge-patch+json")

    def _apiserver_args(self, etcd_socket: str) -> list[str]:
        where = self.directory
        return [
            f"--etcd-servers={etcd_socket}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",  # no pod looks for it through the Service `kubernetes`
            f"--secure-port={self.port}",
            f"--cert-dir={where}",
            f"--tls-cert-file={where}/apiserver.crt",
            f"--tls-private-key-file={where}/apiserver.key",
            f"--client-ca-file={where}/client-ca.crt",
            f"--authorization-mode={'Node,' if self._pod_certificates else ''}RBAC",
            *(_POD_CERTIFICATES if self._pod_certificates else []),
            # Without the controllers there is no default service account, and pods would be refused.
            *(["--disable-admission-plugins=ServiceAccount"] if self._images is None else []),
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={where}/service-account.key",
            f"--service-account-signing-key-file={where}/service-account.key",
            "--service-cluster-ip-range=10.0.0.0/24",
            f"--kubelet-certificate-authority={self.ca_file}",
            f"--kubelet-client-certificate={where}/kubelet-client.crt",
            f"--kubelet-client-key={where}/kubelet-client.key",
            "--kubelet-preferred-address-types=InternalIP",
            f"--audit-policy-file={where}/audit-policy.yaml",
            f"--audit-log-path={where}/audit.log",
            "--profiling=false",
        ]

    # Requests.

    def _open(
        self,
        method: str,
        path: str,
        body: object = None,
        content_type: str = "application/json",
        timeout: float = 30,
        accept: str = "application/json",
    ) -> Any:
        request = urllib.request.Request(
            self.api_url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": content_type, "Accept": accept},
        )
        try:
            return self._opener.open(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise ApiError(method, path, error.code, error.read().decode(errors="replace")) from None

    def _ensure(self, collection: str, body: object) -> None:
        try:
            self.request("POST", collection, body)
        except ApiError as error:
            if error.status != 409:
                raise

    def _watch_pod(self, pod: Mapping[str, Any], timeout: float) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the changes of one pod until the deadline."""
        metadata = pod["metadata"]
        path = (
            f"/api/v1/namespaces/{metadata['namespace']}/pods?watch=1&timeoutSeconds={max(1, round(timeout))}"
            f"&fieldSelector=metadata.name%3D{metadata['name']}&resourceVersion={metadata['resourceVersion']}"
        )
        with self._open("GET", path, timeout=timeout + 5) as events:
            for line in events:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise ApiError("GET", path, event["object"].get("code", 500), json.dumps(event["object"]))
                yield event["type"], event["object"]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _write_private(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def main(argv: Sequence[str] | None = None) -> int:
    """Build the programs, or run a cluster until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.cluster", description=main.__doc__)
    parser.add_argument("what", nargs="?", choices=["run", "build"], default="run")
    parser.add_argument("--helm", action="store_true", help="build Helm and k9s as well")
    parser.add_argument("--pod", action="append", default=[], metavar="NAME", help="add a pod that sleeps")
    options = parser.parse_args(argv)
    try:
        programs = binaries()
        if options.helm:
            print(f"helm: {helm()}", file=sys.stderr)
            print(f"k9s: {k9s()}", file=sys.stderr)
    except Unavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.what == "build":
        print(programs.kube_apiserver.parent)
        return 0
    end = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: end.set())
    begun = time.monotonic()
    with Cluster() as cluster:
        for name in options.pod:
            cluster.add_pod(name)
        print(f"ready after {time.monotonic() - begun:.1f} s: {cluster.api_url}", file=sys.stderr)
        print(f"export KUBECONFIG={cluster.kubeconfig}", flush=True)
        print("Ctrl-C ends it", file=sys.stderr)
        end.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
