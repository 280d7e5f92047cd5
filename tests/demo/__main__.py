"""`make run`: three real processes on loopback, and kubectl through them to a cluster.

Which cluster: the one of KUBECONFIG if that is set (nothing in it is changed); else a real local API server, if its
programs are built already; else a small demonstration API, so that nothing has to be built. It says which. With
`--real` it is the real local API server, which Go builds if it must.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.cluster import KUBERNETES_VERSION, Cluster, Kubectl, Unavailable, binaries, kubectl_versions
from tests.support.processes import ManagedProcess, ProcessFailed
from tests.support.world import ALICE, BOB, MALLORY, ApiServer, Client, User, World

BOLD, DIM, RED, GREEN, PLAIN = (
    ("\033[1m", "\033[2m", "\033[31m", "\033[32m", "\033[0m")
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    else ("", "", "", "", "")
)


@dataclass(frozen=True, slots=True)
class Backend:
    """The cluster that the agent is put into."""

    kind: str
    """`given`, `local` or `demonstration`."""
    description: str
    api: ApiServer
    cluster: Cluster | None = None


@dataclass(slots=True)
class Script:
    """The commands shown, and whether each answered as it should."""

    kubectl: Path
    failures: list[str] = field(default_factory=list)

    def show(self, who: User, client: Client, *args: str, expect: str, code: int = 0) -> None:
        """Run one kubectl command as a person; its output must match `expect` and its exit code `code`."""
        print(f"\n{BOLD}{who.name}$ kubectl {' '.join(args)}{PLAIN}")
        done = Kubectl(self.kubectl, client.kubeconfig, client.directory / "kubectl").run(*args, check=False)
        output = (done.stdout + done.stderr).rstrip()
        print("\n".join(f"  {line}" for line in output.splitlines()))
        if done.returncode != code or not re.search(expect, output):
            problem = f"kubectl {' '.join(args)} as {who.name}: exit {done.returncode}, wanted {code} and /{expect}/"
            self.failures.append(problem)
            print(f"  {RED}not as it should be: {problem}{PLAIN}")


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"{DIM}--{PLAIN} {text}", flush=True)


@contextlib.contextmanager
def backend(directory: Path, *, real: bool) -> Iterator[Backend]:
    """Yield the cluster for this run; end it afterwards if it was started here. Raises Unavailable if `real` is not."""
    directory.mkdir(parents=True, exist_ok=True)
    if os.environ.get("KUBECONFIG") and not real:
        yield given_cluster(directory)
        return
    try:
        binaries(build=real)
    except Unavailable:
        if real:
            raise
        say("no real API server is built on this machine; `make run REAL=1` builds one with Go 1.26, in minutes")
        with demonstration_api(directory) as demonstration:
            yield demonstration
        return
    cluster = Cluster(directory=directory / "cluster")
    with cluster:
        cluster.grant("edit", group="platform")
        cluster.grant("view", group="developers")
        cluster.ensure_namespace("shop")
        cluster.add_pod("till", "shop", command=("sh", "-c", "echo the till is open; exec sleep infinity"))
        token = directory / "agent-token"
        token.write_text(agent_service_account(cluster))
        token.chmod(0o600)
        api = ApiServer(cluster.api_url, Path(cluster.ca_file), token)
        yield Backend("local", f"a real kube-apiserver {KUBERNETES_VERSION} with etcd", api, cluster)


def agent_service_account(cluster: Cluster) -> str:
    """Create the agent's ServiceAccount with the shipped manifests, and a token for it."""
    cluster.install_agent()
    return cluster.service_account_token("arcbridge", "arcbridge-agent")


def given_cluster(directory: Path) -> Backend:
    """Return the cluster of KUBECONFIG, reached with the credentials of its current context."""
    kubectl = next(iter(kubectl_versions(build=False).values()))
    done = subprocess.run(
        [str(kubectl), "config", "view", "--raw", "--minify", "--flatten", "-o", "json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"error: KUBECONFIG cannot be used: {done.stderr.strip()}")
    view = json.loads(done.stdout)
    server, user = view["clusters"][0]["cluster"], (view.get("users") or [{"user": {}}])[0]["user"]

    def keep(name: str, data: bytes) -> Path:
        path = directory / name
        path.touch(0o600)
        path.write_bytes(data)
        return path

    def decoded(source: dict[str, str], key: str, name: str) -> Path | None:
        return keep(name, base64.b64decode(source[key])) if key in source else None

    token = keep("token", user["token"].encode()) if "token" in user else None
    certificate = decoded(user, "client-certificate-data", "client.pem")
    if token is None and certificate is None:
        raise SystemExit(
            "error: the current context of KUBECONFIG has neither a token nor a client certificate; the demonstration "
            "agent needs one that may impersonate. Unset KUBECONFIG to use a local API instead"
        )
    api = ApiServer(
        server["server"],
        decoded(server, "certificate-authority-data", "ca.pem"),
        token,
        certificate,
        decoded(user, "client-key-data", "client.key"),
    )
    return Backend("given", f"the cluster of KUBECONFIG, {server['server']}", api)


@contextlib.contextmanager
def demonstration_api(directory: Path) -> Iterator[Backend]:
    """Start the small API of tests/demo/api.py as a process."""
    argv = [sys.executable, "-m", "tests.demo.api", "--directory", str(directory)]
    with ManagedProcess(argv, log_dir=directory / "logs", name="demonstration-api") as process:
        url = process.wait_for_line(r"listening on (https://\S+)")[1]
        api = ApiServer(url, directory / "ca.pem", directory / "token")
        yield Backend("demonstration", "a small demonstration API, and no real cluster", api)


def commands(script: Script, world: World, kind: str) -> Client:
    """Run and show the commands. Returns the client that stays."""
    say("alice's client: joins through the relay, proves who she is to the agent, saves a kubeconfig")
    alice = world.start_client(ALICE)
    script.show(ALICE, alice, "version", expect=r"Server Version: v1\.")
    script.show(ALICE, alice, "auth", "whoami", expect=r"alice@example\.com")
    if kind == "given":
        script.show(ALICE, alice, "auth", "can-i", "--list", expect="selfsubject")
    else:
        script.show(ALICE, alice, "get", "namespaces", expect="shop")
    if kind != "given":
        script.show(ALICE, alice, "get", "pods", "-n", "shop", expect="till")
        script.show(ALICE, alice, "logs", "-n", "shop", "till", expect="the till is open")
        script.show(ALICE, alice, "exec", "-n", "shop", "till", "--", "echo", "hello from the pod", expect="hello from")
        bob = world.start_client(BOB)
        script.show(BOB, bob, "auth", "whoami", expect=r"bob@example\.com")
        script.show(BOB, bob, "delete", "pod", "-n", "shop", "till", expect="Forbidden", code=1)
        bob.process.stop()
    say("mallory is in no group that the relay's policy names")
    refused = world.run_client(MALLORY, "--port", "0", "--file", str(world.directory / "mallory"))
    message = refused.stderr.strip().splitlines()[-1] if refused.stderr.strip() else ""
    print(f"  {message}")
    if refused.returncode == 0 or "error" not in refused.stderr:
        script.failures.append("mallory was not refused")
    return alice


def show_hops(world: World) -> None:
    """Show what each process logged of one session, in order of time."""
    records = world.audit_records()
    if not records:
        return
    session = str(records[0].get("session", ""))
    lines: list[tuple[str, str, dict[str, object]]] = []
    for name, process in (("client", world.processes[2]), ("relay", world.relay), ("agent", world.agent)):
        for line in process.output("stderr").splitlines():
            if session in line and line.startswith("{"):
                entry = json.loads(line)
                lines.append((str(entry["timestamp"]), name, entry))
    print(f"\n{BOLD}The first session, {session}, as each process logged it{PLAIN}")
    for timestamp, name, entry in sorted(lines, key=lambda one: one[0])[:6]:
        rest = {key: value for key, value in entry.items() if key in ("user", "subject", "source", "instance", "mode")}
        shown = ", ".join(f"{key} {value}" for key, value in rest.items())
        print(f"  {timestamp[11:23]}  {name:7}{entry['event']} ({shown})")
    print(f"{BOLD}and the agent's audit of its requests (request id, who, what, the API server's answer){PLAIN}")
    for record in [record for record in records if record.get("session") == session][:6]:
        what = record.get("resource") or f"/{record.get('path', '')}"
        print(
            f"  {str(record['ts'])[11:23]}  {record['request']}  {record['user']}  {record['verb']} {what}  "
            f"{record.get('status', record.get('outcome'))}"
        )


def main() -> int:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(prog="make run", description=__doc__)
    parser.add_argument("--once", action="store_true", help="stop after the last command")
    parser.add_argument("--real", action="store_true", help="a real API server, built with Go if it must be")
    options = parser.parse_args()
    end = threading.Event()
    signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C: everything started here ends
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="arcbridge-demo-")))
        where = stack.enter_context(backend(directory / "backend", real=options.real))
        say(f"cluster: {BOLD}{where.description}{PLAIN}")
        world = stack.enter_context(World(where.api, directory=directory / "world"))
        say("a made-up organisation's OIDC issuer")
        world.start_issuer()
        world.start_relay()
        say(f"relay: pid {world.relay.pid}, {world.relay_url}, the only process with an open port")
        world.start_agent()
        say(f"agent: pid {world.agent.pid}, enrolled with a one-time join token; it only dials out")
        script = Script(next(iter(kubectl_versions(build=False).values())))
        client = commands(script, world, where.kind)
        show_hops(world)
        if script.failures:
            print(f"\n{RED}{len(script.failures)} answers were not as they should be:{PLAIN}")
            print("\n".join(f"  {failure}" for failure in script.failures))
            return 1
        print(
            f"\n{GREEN}Every answer was as it should be.{PLAIN}\n"
            "The path of each: kubectl -> client -> relay -> agent -> API server."
        )
        if options.once:
            return 0
        print(f"\nFrom another terminal, as alice:\n\n  export KUBECONFIG={client.kubeconfig}")
        print(f"  {script.kubectl} get namespaces")
        if where.kind != "given":
            print(f"  {script.kubectl} logs -f -n shop till")
            print(f"  {script.kubectl} exec -it -n shop till -- sh")
        if where.kind == "given":
            print("\nalice may do little there; to let her look around, with your own credentials:\n")
            print("  kubectl create clusterrolebinding arcbridge-demo --clusterrole=view --group=platform")
        print(f"\nLogs: {world.logs}\nCtrl-C ends it and leaves nothing behind.")
        sys.stdout.flush()
        end.wait()
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nended")
        sys.exit(0)
    except (ProcessFailed, Unavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
