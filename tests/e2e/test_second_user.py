"""A second user of the machine, a real one, attacks the client of the first: its files, its port, its processes.

The client runs as `OWNER` in the worst of homes: open to every reader, with umask 0. The attacker runs as `OTHER`; what
it got is what it prints. Only a test that runs as root can start both.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.support.processes import ManagedProcess, require_or_skip, run
from tests.support.reports import audited, metrics, until
from tests.support.second_user import OTHER, OWNER, as_user, require_users
from tests.support.world import ALICE, CLUSTER, World, arcbridge, fixed_port

KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
ENVIRONMENT_CANARY = "canary-in-the-environment"
SECRETS = b"GET /api/v1/namespaces/default/secrets HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@dataclass
class Home:
    """The home of a user: where it is, and what a command line of that user begins with."""

    path: Path
    uid: int
    shared: Path
    """A directory that all users share, as /tmp."""

    @property
    def prefix(self) -> tuple[str, ...]:
        return as_user(self.uid, umask=0)

    def client(self, world: World, *words: str) -> list[str]:
        """A client's command line with a login of Alice, which the home holds."""
        arguments = world.client_arguments(ALICE, self.path / "login")
        for path in (self.path / "login", *(self.path / "login").iterdir()):
            os.chown(path, self.uid, self.uid)
        for path in (self.path / "login").iterdir():
            path.chmod(0o600)
        return [*self.prefix, *arcbridge(*arguments, *words)]

    @property
    def env(self) -> dict[str, str | None]:
        return {
            **{"HOME": str(self.path), "ARCBRIDGE_TOKEN": None, "KUBECONFIG": None},
            **{name: None for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")},
        }


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    require_users()
    with tempfile.TemporaryDirectory(prefix="arcbridge-users-") as name:
        place = Path(name)
        place.chmod(0o755)
        (place / "home").mkdir()
        os.chown(place / "home", OWNER, OWNER)
        (place / "home").chmod(0o755)
        (place / "tmp").mkdir()
        (place / "tmp").chmod(0o1777)
        yield Home(place / "home", OWNER, place / "tmp")


@pytest.fixture(scope="module")
def observe() -> int:
    return fixed_port()


@pytest.fixture(scope="module")
def client(world: World, home: Home, observe: int) -> Iterator[ManagedProcess]:
    """The first user's client: every file of it is made here, and every directory."""
    client = ManagedProcess(
        home.client(
            world,
            *("--file", str(home.path / "new/kube/config"), "--observe-listen", f"127.0.0.1:{observe}"),
            *("--log-format", "json", "--log-level", "debug"),
        ),
        log_dir=world.logs,
        name="first-user",
        env={**home.env, "CANARY": ENVIRONMENT_CANARY},
    )
    client.wait_for_line("Press Ctrl", timeout=60)
    yield client
    client.stop()


@pytest.fixture(scope="module")
def port(client: ManagedProcess) -> int:
    return int(client.wait_for_line(r"Proxy is listening on port (\d+)")[1])


def as_other(script: str, *arguments: str, timeout: float = 60) -> Any:
    """Run a script as the attacker; what it prints is JSON."""
    done = subprocess.run(
        [*as_user(OTHER), sys.executable, "-c", script, *arguments], capture_output=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def kubectl(home: Home, *words: str) -> subprocess.CompletedProcess[bytes]:
    if KUBECTL is None:
        require_or_skip("kubectl", "no kubectl: install the dev dependencies")
    command = [KUBECTL, "--kubeconfig", str(home.path / "new/kube/config"), "--cache-dir", str(home.path / "kubectl")]
    return run(
        [*as_user(OWNER), *command, *words], env={"HOME": str(home.path), "PATH": os.environ["PATH"]}, check=False
    )


FILES = """
import json, os, sys
got = []
for path in sys.argv[1:]:
    def attempt(name, act):
        try:
            act()
            got.append([name, path])
        except OSError:
            pass
    if os.path.isdir(path):
        attempt("made a file in", lambda: os.close(os.open(path + "/planted", os.O_CREAT | os.O_EXCL | os.O_WRONLY)))
        attempt("made a link in", lambda: os.symlink("/etc/passwd", path + "/link"))
        attempt("changed the mode of", lambda: os.chmod(path, 0o777))
    else:
        attempt("read", lambda: open(path, "rb").read())
        attempt("wrote", lambda: open(path, "ab").write(b""))
        attempt("changed the mode of", lambda: os.chmod(path, 0o777))
        attempt("removed", lambda: os.unlink(path))
    attempt("renamed", lambda: os.rename(path, path + ".moved"))
print(json.dumps(got))
"""


def test_w11_no_file_is_read_and_none_is_replaced(client: ManagedProcess, home: Home, port: int) -> None:
    assert kubectl(home, "get", "--raw", "/version").returncode == 0, "the client works"
    paths = sorted(home.path.rglob("*"))
    names = {path.name for path in paths}
    assert {"config", "ca.key", "pins.toml", "ports.json"} <= names
    assert [name for name in names if name.startswith(f"{CLUSTER}@")]
    before = {path: (path.lstat().st_ino, path.lstat().st_mode) for path in paths}
    assert as_other(FILES, *map(str, paths)) == []
    assert {path: (path.lstat().st_ino, path.lstat().st_mode) for path in sorted(home.path.rglob("*"))} == before
    for path in paths:
        status = path.lstat()
        assert status.st_uid == OWNER
        assert not status.st_mode & stat.S_IWOTH, path
        if path.is_file() and "kubectl" not in path.parts:
            assert stat.S_IMODE(status.st_mode) == 0o600, path
    # The attack is one that succeeds where files are open.
    (home.shared / "open").write_text("")
    (home.shared / "open").chmod(0o666)
    got = as_other(FILES, str(home.shared / "open"), str(home.shared))
    assert {what for what, _ in got} == {"read", "wrote", "made a file in", "made a link in"}
    for left in ("planted", "link", "open"):
        (home.shared / left).unlink()


PROCESS = """
import ctypes, json, os, signal, sys
pid, got = int(sys.argv[1]), []
for name in ("environ", "mem", "maps", "fd", "fdinfo", "cwd", "root", "exe", "auxv", "stack", "map_files", "ns/net"):
    path = f"/proc/{pid}/{name}"
    try:
        if name in ("cwd", "root", "exe", "ns/net"):
            os.readlink(path)
        elif os.path.isdir(path):
            os.listdir(path)
        else:
            with open(path, "rb", buffering=0) as file:
                file.seek(0x400000 if name == "mem" else 0)
                if not file.read(16):
                    continue
        got.append(name)
    except OSError:
        pass
# Other calls ask the kernel the same question (ptrace(2), "Ptrace access mode checking").
if ctypes.CDLL(None, use_errno=True).ptrace(16, pid, 0, 0) == 0:  # PTRACE_ATTACH
    got.append("ptrace")
seen = {name: open(f"/proc/{pid}/{name}", "rb").read().decode("latin-1") for name in ("cmdline", "comm", "status")}
# At the end: a signal that arrives may end what the others look at.
for number in (0, signal.SIGUSR1, signal.SIGABRT):
    try:
        os.kill(pid, number)
        got.append(f"signal {number}")
    except OSError:
        pass
print(json.dumps([got, seen]))
"""


def test_w10_nothing_is_seen_of_the_process(client: ManagedProcess, home: Home) -> None:
    got, seen = as_other(PROCESS, str(client.pid))
    assert got == []
    text = json.dumps(seen)
    assert f"--cluster\\u0000{CLUSTER}" in text, "the command line of the client itself was looked at"
    for path in (home.path / "login").iterdir():
        assert path.read_text() not in text
    assert ENVIRONMENT_CANARY not in text
    # A process of the attacker's own is open to it.
    own = subprocess.Popen([*as_user(OTHER), "sleep", "60"])
    try:
        until(lambda: Path(f"/proc/{own.pid}/comm").read_text() == "sleep\n", "it runs")
        got, _ = as_other(PROCESS, str(own.pid))
        assert {"environ", "maps", "fd", "cwd", "signal 0", "ptrace"} <= set(got)
    finally:
        own.kill()
        own.wait()


ENDPOINT = """
import json, os, socket, ssl, sys
port, request, pem = int(sys.argv[1]), sys.argv[2].encode().decode("unicode_escape").encode(), sys.argv[3]
got, bound = [], []
def ask(name, host, context=None, server_name=None, first=b""):
    try:
        with socket.create_connection((host, port), timeout=10) as sock:
            sock.sendall(first)
            if context is not None:
                sock = context.wrap_socket(sock, server_hostname=server_name)
            sock.sendall(request)
            answer = b""
            while chunk := sock.recv(65536):
                answer += chunk
        got.append([name, host, answer.decode("latin-1")[:600]])
    except OSError as error:
        got.append([name, host, f"{type(error).__name__}"])
for host in ("127.0.0.1", "::1"):
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        for credential in ("", pem):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.minimum_version = context.maximum_version = version
            if credential:
                context.load_cert_chain(credential)
            for server_name in ("localhost", "other.example"):
                ask(f"{version.name} {'own certificate' if credential else 'none'}", host, context, server_name)
    ask("plain", host)
    ask("proxied", host, first=b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\\r\\n")
for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0"), (socket.AF_INET, "127.0.0.2"),
                     (socket.AF_INET6, "::1"), (socket.AF_INET6, "::")):
    for option in (None, socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        with socket.socket(family) as sock:
            if option is not None:
                sock.setsockopt(socket.SOL_SOCKET, option, 1)
            try:
                sock.bind((host, port))
                sock.listen()
                bound.append(host)
            except OSError:
                pass
print(json.dumps([got, bound]))
"""


def test_w1_no_request_is_answered_for_another_user(
    client: ManagedProcess, home: Home, world: World, observe: int, port: int
) -> None:
    before, earlier = metrics(observe), len(world.audit_lines())
    mine = trustme.CA(organization_name="arcbridge local endpoint", organization_unit_name="arcbridge local endpoint")
    pem = home.shared / "other.pem"
    issued = mine.issue_cert(CLUSTER, common_name=CLUSTER)
    pem.write_bytes(issued.private_key_pem.bytes() + issued.cert_chain_pems[0].bytes())
    pem.chmod(0o644)
    got, bound = as_other(ENDPOINT, str(port), SECRETS.decode().replace("\r\n", "\\r\\n"), str(pem))
    assert len(got) == 20
    told = [answer for _, _, answer in got if answer.startswith("HTTP/")]
    assert told, "one without a certificate is told what this is"
    assert all(answer.startswith("HTTP/1.1 401 ") for answer in told)
    assert not [answer for _, _, answer in got if CLUSTER in answer]
    # Bytes that are no HTTP are an alert of TLS, or nothing.
    for name, _, answer in got:
        assert (
            answer in ("", "SSLError", "ConnectionResetError", "BrokenPipeError")
            or answer in told
            or (name in ("plain", "proxied") and answer.encode("latin-1")[:1] == b"\x15")
        ), (name, answer)
    assert bound in ([], ["127.0.0.2"] * len(bound)), "no other program shares the port"
    after = metrics(observe)
    for name in ('arcbridge_client_local_connections_total{result="spliced"}', "arcbridge_client_sessions"):
        assert after[name] == before[name]
    # Whatever has come of one of these requests stands before this one in the agent's record.
    name = f"after-{secrets.token_hex(4)}"
    assert kubectl(home, "get", "--raw", f"/api/v1/namespaces/default/configmaps/{name}").returncode == 1
    audited(world, "the user's own request", name=name)
    assert [one for one in world.audit_lines()[earlier:] if one.get("resource") == "secrets"] == []
