"""A second user of the machine, a real one, attacks the client of the first: its files, processes, login and ports.

The client runs as `OWNER` in the worst of homes: open to every reader, with umask 0. The attacker runs as `OTHER`; what
it got is what it prints. Only a test that runs as root can start both.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import ManagedProcess, require_or_skip, run
from tests.support.reports import until
from tests.support.second_user import OTHER, OWNER, as_user, require_users
from tests.support.world import ALICE, CLUSTER, World, arcbridge, fixed_port, login_ports

KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
ENVIRONMENT_CANARY = "canary-in-the-environment"


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """The home of the first user, beside a directory `tmp` that all users share."""
    require_users()
    with tempfile.TemporaryDirectory(prefix="arcbridge-users-") as name:
        home, shared = Path(name) / "home", Path(name) / "tmp"
        for directory, mode in ((home.parent, 0o755), (home, 0o755), (shared, 0o1777)):
            directory.mkdir(exist_ok=True)
            directory.chmod(mode)
        os.chown(home, OWNER, OWNER)
        yield home


def of_the_owner(
    world: World, home: Path, name: str, *words: str, arguments: Sequence[str] = (), awaited: str = "Press Ctrl"
) -> ManagedProcess:
    """Start a client of the first user and wait until it says that it serves."""
    arguments = arguments or world.client_arguments(ALICE, home / "login")
    argv = [*as_user(OWNER, umask=0), *arcbridge(*arguments, *words)]
    for path in (home / "login", *(home / "login").iterdir()):
        os.chown(path, OWNER, OWNER)
        if path.is_file():
            path.chmod(0o600)
    unset = ("ARCBRIDGE_TOKEN", "KUBECONFIG", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
    env = {**dict.fromkeys(unset), "HOME": str(home), "CANARY": ENVIRONMENT_CANARY, "BROWSER": "/bin/false"}
    client = ManagedProcess(argv, log_dir=world.logs, name=name, env=env)
    client.wait_for_line(awaited, timeout=60)
    return client


@pytest.fixture(scope="module")
def client(world: World, home: Path) -> Iterator[ManagedProcess]:
    """The first user's client: every file of it is made here, and every directory but that of its login."""
    words = (*("--file", str(home / "new/kube/config")), *("--log-format", "json", "--log-level", "debug"))
    with of_the_owner(world, home, "first-user", *words) as client:
        yield client


def as_other(script: str, *arguments: str, uid: int = OTHER, timeout: float = 60) -> Any:
    """Run a script as the attacker, or as `uid`; what it prints is JSON."""
    done = subprocess.run(
        [*as_user(uid), sys.executable, "-c", script, *arguments], capture_output=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def kubectl(home: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    if KUBECTL is None:
        require_or_skip("kubectl", "no kubectl: install the dev dependencies")
    command = [KUBECTL, "--kubeconfig", str(home / "new/kube/config"), "--cache-dir", str(home / "kubectl")]
    return run([*as_user(OWNER), *command, *words], env={"HOME": str(home), "PATH": os.environ["PATH"]}, check=False)


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


def test_w11_no_file_is_read_and_none_is_replaced(client: ManagedProcess, home: Path) -> None:
    assert kubectl(home, "get", "--raw", "/version").returncode == 0, "the client works"
    paths = sorted(home.rglob("*"))
    names = {path.name for path in paths}
    assert {"config", "ca.key", "pins.toml", "ports.json"} <= names
    assert [name for name in names if name.startswith(f"{CLUSTER}@")]
    before = {path: (path.lstat().st_ino, path.lstat().st_mode) for path in paths}
    assert as_other(FILES, *map(str, paths)) == []
    assert {path: (path.lstat().st_ino, path.lstat().st_mode) for path in sorted(home.rglob("*"))} == before
    for path in paths:
        status = path.lstat()
        assert status.st_uid == OWNER
        assert not status.st_mode & stat.S_IWOTH, path
        if path.is_file() and "kubectl" not in path.parts:
            assert stat.S_IMODE(status.st_mode) == 0o600, path
    # The attack is one that succeeds where files are open.
    (home.parent / "tmp" / "open").write_text("")
    (home.parent / "tmp" / "open").chmod(0o666)
    got = as_other(FILES, str(home.parent / "tmp" / "open"), str(home.parent / "tmp"))
    assert {what for what, _ in got} == {"read", "wrote", "made a file in", "made a link in"}
    for left in ("planted", "link", "open"):
        (home.parent / "tmp" / left).unlink()


ASK = """
import json, socket, sys
try:
    with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=10) as sock:
        sock.sendall(b"anyone there?")
        print(json.dumps(sock.recv(100).decode()))
except ConnectionError:
    print(json.dumps("refused"))
"""


@pytest.mark.parametrize("flags", [(), ("--any-user",)], ids=["this user alone", "any user"])
def test_w13_a_forwarded_port(world: World, home: Path, flags: tuple[str, ...]) -> None:
    port = str(fixed_port())
    words = ("forward", "echo", "--listen", f"127.0.0.1:{port}", *flags)
    with of_the_owner(world, home, f"forward-of-the-first-user-{len(flags)}", *words):
        assert as_other(ASK, port) == ("anyone there?" if flags else "refused")
        assert as_other(ASK, port, uid=OWNER) == "anyone there?"


ANSWER = """
import json, socket, sys, urllib.parse
url, got = urllib.parse.urlsplit(sys.argv[1]), []
query = dict(urllib.parse.parse_qsl(url.query))
answer = {"state": query["state"], "code": "planted", "iss": f"{url.scheme}://{url.netloc}"}
line = "GET /?" + urllib.parse.urlencode(answer) + " HTTP/1.1"
for host in ("127.0.0.1", "::1"):
    try:
        with socket.create_connection((host, urllib.parse.urlsplit(query["redirect_uri"]).port), timeout=10) as sock:
            sock.sendall(line.encode() + b"\\r\\n\\r\\n")
            got.append(sock.recv(1000).decode())
    except ConnectionError:
        got.append("")
print(json.dumps(got))
"""


def test_w12_another_user_cannot_answer_a_login(world: World, home: Path) -> None:
    """It has read the browser's command line, so it knows the state."""
    arguments = ["authcode" if word == "device-code" else word for word in world.login_arguments()]
    ca_file = home / "issuer.pem"
    ca_file.write_text(Path(world.issuer.ca_file).read_text())
    arguments = [str(ca_file) if word == str(world.issuer.ca_file) else word for word in arguments]
    with (
        login_ports(),
        of_the_owner(
            world, home, "login", "login", "--wait", "100s", arguments=arguments, awaited="To log in, open"
        ) as login,
    ):
        url = login.wait_for_line(r"To log in, open (\S+)")[1]
        assert as_other(ANSWER, url) == ["", ""]
        login.wait_for_line("a program of another user asked for the answer to the login")
        assert login.running
        # The user's own program is answered; its code is none of the issuer's.
        assert "You are logged in" in as_other(ANSWER, url, uid=OWNER)[0]
        assert login.wait(30) != 0


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


def test_w10_nothing_is_seen_of_the_process(client: ManagedProcess, home: Path) -> None:
    got, seen = as_other(PROCESS, str(client.pid))
    assert got == []
    text = json.dumps(seen)
    assert f"--cluster\\u0000{CLUSTER}" in text, "the command line of the client itself was looked at"
    for path in (home / "login").iterdir():
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
