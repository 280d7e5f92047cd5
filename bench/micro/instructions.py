"""Instructions of one role for an echo, an open, a GET or an exec, by callgrind; load hardly changes them.

    python -m bench.micro.instructions ROLE PATH [--count 30] [--keep FILE]

The three roles as shipped at a real kube-apiserver; valgrind runs the one that is counted, and counts after a warm-up.
Instructions of the kernel are not counted, and what a role does once a second is: under valgrind an operation takes
some thirty times as long. `callgrind_annotate --inclusive=yes FILE` tells which functions took them. Needs valgrind.
"""

from __future__ import annotations

import argparse
import http.client
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from arcbridge.agent.kube.warm_connections import DELAY
from bench.budget.paths import NAMESPACE, POD, TARGET, _echo, _exec, _get, _open
from bench.load.generator import Generator
from bench.studies.kubernetes import _way_of_kubeconfig
from tests.support.cluster import Cluster
from tests.support.world import ALICE, ApiServer, World

WARM_UP = 20
"""Operations before anything counts: Python adapts its code, connections are made."""


def count(role: str, path: str, times: int, directory: Path, keep: Path) -> float:
    """Return the instructions of one operation; the profile goes to `keep`."""
    counts = directory / "counts"
    valgrind = (
        "valgrind",
        "--tool=callgrind",
        "--instr-atstart=no",
        f"--callgrind-out-file={counts}",
        f"--log-file={directory}/log",
    )
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(directory=directory / "cluster"))
        cluster.install_agent()
        cluster.grant("cluster-admin", group=ALICE.groups[0])
        cluster.add_pod(POD, NAMESPACE)
        token = directory / "agent-token"
        token.touch(mode=0o600)
        token.write_text(cluster.service_account_token("arcbridge", "arcbridge-agent"))
        target = stack.enter_context(Generator().target())
        api = ApiServer(cluster.api_url, cluster.ca_file, token)
        world = stack.enter_context(World(api, directory=directory / "world"))
        world.targets[TARGET] = (str(target.address), ALICE.groups)
        if role == "relay":
            world.relay_prefixes[0] = valgrind
        elif role == "agent":
            world.agent_prefixes[0] = valgrind
        else:
            world.client_prefix = valgrind
        world.start()
        operation: Callable[[], None]
        if path in ("echo", "open"):
            process, port = world.start_forward(TARGET)
            echoes = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            echoes.sendall(b"E")
            operation = partial(_echo, echoes) if path == "echo" else partial(_open, port)
        else:
            client = world.start_client(ALICE)
            process, way = client.process, _way_of_kubeconfig(client.kubeconfig, directory)
            trust = ssl.create_default_context(cafile=way.roots)
            trust.load_cert_chain(way.certificate, way.key)
            if path == "get":
                operation = partial(_get, http.client.HTTPSConnection("127.0.0.1", client.port, context=trust))
            else:
                operation = partial(_paused, partial(_exec, client.port, trust))
        pid = str({"client": process, "relay": world.relay, "agent": world.agent}[role].pid)
        _control("-i", "on", pid)
        for _ in range(WARM_UP):
            operation()
        _control("-z", pid)
        for _ in range(times):
            operation()
        _control("-d", pid)
    found = next(directory.glob("counts.*"))
    shutil.move(found, keep)
    totals = next(line for line in keep.read_text().splitlines() if line.startswith(("totals:", "summary:")))
    return int(totals.split()[1]) / times


def _paused(operation: Callable[[], None]) -> None:
    """Run it when the connection for it was made, also by an agent that is so slow."""
    time.sleep(5 * DELAY)
    operation()


def _control(*arguments: str) -> None:
    subprocess.run(["callgrind_control", *arguments], check=True, stdout=subprocess.DEVNULL)


def main(argv: list[str]) -> int:
    """Count, and say how many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=("client", "relay", "agent"))
    parser.add_argument("path", choices=("echo", "open", "get", "exec"))
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--keep", type=Path, default=Path("callgrind.out"), help="where the profile goes")
    args = parser.parse_args(argv)
    if shutil.which("valgrind") is None:
        parser.error("valgrind is not installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        found = count(args.role, args.path, args.count, Path(directory), args.keep)
    print(f"{args.path}, {args.role}: {found:.0f} instructions; the profile is {args.keep}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
