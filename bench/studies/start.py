"""How long it takes to begin: the program, a client, a session."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.address import Address
from bench.load.generator import Generator
from bench.path.link import Link
from bench.path.link import Path as Way
from bench.process import NotReady
from bench.result import rounded
from bench.studies import start_commands
from bench.studies.base import Study
from tests.support.processes import ProcessFailed
from tests.support.world import ALICE, ApiServer, World, fixed_port

TARGET = "bench"
VERSIONS = 20
CLIENTS = 7
SESSIONS = 11
PATH = Way("40 ms", round_trip_ms=40)
ROUND_TRIPS = 5
"""TCP, TLS with the relay, the join, TLS with the agent, and AUTH with the first stream's opening."""
PATIENCE_S = 30.0


class Start(Study):
    """`--version`, a client until its endpoint answers, a session until a target's first byte; the medians."""

    name = "start"
    title = "`arcbridge --version`; a client from its start until its endpoint answers; a new session to the first byte"
    expected_s = 15.0

    def run(self, directory: Path, *, rounds: int, seconds: float) -> dict[str, Any]:
        left_out: list[str] = []
        runs: dict[str, list[float]] = {
            "version_as_module_ms": [_version([sys.executable, "-m", "arcbridge"], directory) for _ in range(VERSIONS)],
            "python_alone_ms": [_wall([sys.executable, "-c", "pass"], directory) for _ in range(VERSIONS)],
        }
        load = Generator()
        with load.target() as target:
            # No API server is needed: that the agent cannot reach one is an answer, too, and has come the whole way.
            credential = directory / "agent-token"
            credential.write_text("of-no-use")
            world = World(
                ApiServer(f"https://127.0.0.1:{fixed_port()}", token_file=credential), directory=directory / "world"
            )
            world.targets[TARGET] = (str(target.address), ALICE.groups)
            try:
                world.start()
                start_client(world, directory / "compiles", compiled(directory))
                for number in range(CLIENTS):
                    for name, value in start_client(world, directory / "home", compiled(directory)).items():
                        # The first start with a home makes keys and certificates, too.
                        key = name if number else f"first_{name}"
                        runs.setdefault(key, []).append(value)
                commands, left_out = start_commands.measure(world, directory / "home", program(), compiled(directory))
                runs |= commands
                cold, warm = _sessions(world, directory / "home", SESSIONS)
                runs |= {"first_byte_ms": warm, "first_byte_of_a_process_ms": [cold]}
                with Link(PATH, Address("127.0.0.1", world.relay_port)) as link:
                    world.client_routes = [str(link.address)]
                    cold, warm = _sessions(world, directory / "home", SESSIONS)
                runs |= {"first_byte_over_40_ms_ms": warm, "first_byte_of_a_process_over_40_ms_ms": [cold]}
            except ProcessFailed as error:
                raise NotReady(str(error)) from error
            finally:
                world.stop()
        values = {name: rounded(statistics.median(found)) for name, found in runs.items()}
        far = values["first_byte_over_40_ms_ms"]
        values["first_byte_round_trips"] = rounded(far / PATH.round_trip_ms)
        values["first_byte_beyond_5_round_trips_ms"] = rounded(far - ROUND_TRIPS * PATH.round_trip_ms)
        return {
            "values": values,
            "runs": [{name: [rounded(value) for value in found]} for name, found in runs.items()],
            "notes": [
                *left_out,
                f"version, whoami, status, credential: {start_commands.COUNT} starts of the console script and of the "
                "single-file client in turns, as users run them; `python_alone_ms` is the floor",
                "all starts run from byte code, as pip and the image install it (results before 25 November compiled "
                "each module of arcbridge at each start, because their environment forbids to write byte code)",
                "client_ready: from the start of the process until its endpoint has answered a request, which went to "
                f"the agent and back; {CLIENTS - 1} starts with a home that has been used, and one with a new one "
                "(`first_client_ready_ms`), which makes keys and certificates",
                "first_byte: in one process, a new session each time, from its beginning until a TCP target's first "
                "byte is back, opened, authorized and audited; `of_a_process`: its first, which fetches the relay's CA",
            ],
        }


def program() -> list[str]:
    """The command as it was installed, or the module where there is none."""
    script = shutil.which("arcbridge", path=str(Path(sys.executable).parent))
    return [script] if script else [sys.executable, "-m", "arcbridge"]


def compiled(directory: Path) -> dict[str, str]:
    """The environment of a start from byte code; the first one compiles, into `directory`."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(directory / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def _version(command: Sequence[str], directory: Path) -> float:
    return _wall([*command, "--version"], directory)


def _wall(argv: Sequence[str], directory: Path) -> float:
    """Milliseconds from before a process begins until it has ended."""
    environment = compiled(directory)
    before = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=PATIENCE_S, env=environment)
    took = (time.perf_counter() - before) * 1e3
    if done.returncode:
        raise NotReady(f"{' '.join(argv)}: {done.stderr.strip()}")
    return took


def start_client(world: World, home: Path, environment: Mapping[str, str]) -> dict[str, float]:
    """Start `proxy` and ask its endpoint once; milliseconds since the start, and CPU milliseconds."""
    kubeconfig = home / "kubeconfig"
    environment = {**environment, **world.client_env(home)}
    argv = [*program(), *world.client_arguments(ALICE, home), "--file", str(kubeconfig), "--port", "0"]
    log = home / "client.log"
    before = time.perf_counter()
    with log.open("w") as stderr:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
    try:
        assert process.stdout is not None
        port = 0
        for line in process.stdout:
            if found := re.search(r"listening on port (\d+)", line):
                port = int(found[1])
            if "Start sending" in line:
                break
        else:
            raise NotReady(f"the client ended: {log.read_text(errors='replace')[-500:]}")
        said = time.perf_counter()
        _ask(port, home / "state", kubeconfig)
        answered = time.perf_counter()
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        cpu = sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        if process.stdout is not None:
            process.stdout.close()
    return {
        "client_says_ready_ms": (said - before) * 1e3,
        "client_ready_ms": (answered - before) * 1e3,
        "client_cpu_ms": cpu * 1e3,
    }


def _ask(port: int, directory: Path, kubeconfig: Path) -> None:
    """Send one request to the local endpoint with the kubeconfig's certificate; any status is an answer."""
    import base64

    import yaml

    document = yaml.load(kubeconfig.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    user = document["users"][0]["user"]
    pair = directory / "pair.pem"
    pair.touch(mode=0o600)
    pair.write_bytes(b"".join(base64.b64decode(user[f"client-{part}-data"]) for part in ("certificate", "key")))
    authority = base64.b64decode(document["clusters"][0]["cluster"]["certificate-authority-data"]).decode()
    context = ssl.create_default_context(cadata=authority)
    context.load_cert_chain(pair)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as sock,
    ):
        sock.sendall(b"GET /version HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        if not sock.recv(65536).startswith(b"HTTP/1.1 "):
            raise NotReady("the client's endpoint did not answer")


def _sessions(world: World, home: Path, count: int) -> tuple[float, list[float]]:
    """Milliseconds from the beginning of a session to a target's first byte: of a process's first, and of the next."""
    argv = [sys.executable, "-m", "bench.studies.start_session", TARGET, str(count)]
    argv += world.client_arguments(ALICE, home)
    environment = {**os.environ, **world.client_env(home)}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment, timeout=2 * PATIENCE_S)
    if done.returncode:
        raise NotReady(f"no session: {done.stderr[-500:]}")
    cold, *warm = json.loads(done.stdout)
    return cold, warm
