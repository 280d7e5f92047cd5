"""Everyday use: `connect` once, then kubectl and others from any terminal, through a background process.

Everything is real: the executable as kubectl runs it, kubectl of both versions, Helm, the official Python client, and
k9s in a terminal. Each person has a home of their own, and so a background process of their own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.errors import ExitCode
from arcbridge.installation import own_path
from tests.support.cluster import Cluster, Kubectl, Unavailable, helm, k9s
from tests.support.processes import ManagedProcess, require_or_skip, run
from tests.support.reports import until
from tests.support.world import (
    ALICE,
    CLUSTER,
    CLUSTER_AUDIENCE,
    RELAY_AUDIENCE,
    ApiServer,
    World,
    arcbridge,
    fixed_port,
)

SECOND = "munich"


class Person:
    """A user with a home, whose PATH has the executable."""

    def __init__(self, world: World, directory: Path) -> None:
        self.world = world
        self.directory = directory
        self.kubeconfig = directory / "kube" / "config"
        self.kubeconfig.parent.mkdir(parents=True)
        self.env = {
            **os.environ,
            **world.client_env(directory),
            "KUBECONFIG": str(self.kubeconfig),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        words = world.client_arguments(ALICE, directory)
        cluster, trust = words.index("--cluster"), words.index("--trust-first-use")
        self.flags = [*words[2:cluster], *words[trust + 1 :]]
        """How to reach the relay and who this is, without names of clusters."""

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = run(arcbridge(*words), env=self.env, check=check, timeout=60)
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    def connect(self, *words: str) -> str:
        return self.run("connect", *words, *self.flags, "--trust-first-use").stdout

    def status(self) -> Any:
        return json.loads(self.run("status", "-o", "json").stdout)

    def pid(self) -> int:
        """The background process's."""
        return int(self.status()["process"]["pid"])

    def kill_everything(self) -> None:
        """What a power cut does."""
        pid = self.pid()
        os.kill(pid, signal.SIGKILL)
        until(lambda: not alive(pid), f"process {pid} is gone")

    def document(self) -> Any:
        return yaml.safe_load(self.kubeconfig.read_text())

    def log(self) -> str:
        return self.run("logs").stdout

    def stop(self) -> None:
        self.run("stop", check=False)


def alive(pid: int) -> bool:
    """Whether a thread of a process runs, and so holds its ports; what has ended and was not waited for does not."""
    gone = (FileNotFoundError, ProcessLookupError)  # before a file was opened, and before it was read
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except gone:
        return False
    for thread in threads:
        with suppress(*gone):
            if Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                return True
    return False


@pytest.fixture(scope="module")
def everyday(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An organisation with two clusters."""
    world = World(api, directory=tmp_path_factory.mktemp("everyday"), agents=2)
    world.agent_clusters[1] = SECOND
    with world:
        yield world.start()


@contextmanager
def a_person(world: World, directory: Path) -> Iterator[Person]:
    person = Person(world, directory)
    try:
        yield person
    finally:
        person.stop()
        shutil.rmtree(BackgroundPaths.find(person.env).runtime, ignore_errors=True)  # it may be outside the home


@pytest.fixture
def person(everyday: World, tmp_path: Path) -> Iterator[Person]:
    with a_person(everyday, tmp_path / "home") as person:
        yield person


@pytest.fixture(scope="module")
def alice_at_home(everyday: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    """A user who has connected both clusters."""
    with a_person(everyday, tmp_path_factory.mktemp("alice") / "home") as person:
        # Ports that no other test takes while the process is away.
        person.connect(CLUSTER, "--port", str(fixed_port()))
        person.connect(SECOND, "--port", str(fixed_port()), "--no-context-switch")
        yield person


def names(text: str) -> set[str]:
    return {line.partition("/")[2] or line.split()[0] for line in text.splitlines() if line}


def test_connect_status_disconnect_as_a_person_sees_them(person: Person) -> None:
    person.kubeconfig.write_text("current-context: home\n")
    told = person.connect(CLUSTER, SECOND).splitlines()
    ports = {one["name"]: one["port"] for one in person.status()["clusters"]}
    first, second = ports[CLUSTER], ports[SECOND]
    assert told == [
        f'{CLUSTER}   port {first}   context "{CLUSTER}" (current)',
        f'{SECOND.ljust(len(CLUSTER))}   port {second}   context "{SECOND}"',
    ]
    table = person.run("status").stdout.splitlines()
    assert table[0].startswith(f"Background process {person.pid()}, version ")
    assert table[1] == f"Logged in at {person.world.relay_url} as alice@example.com" or table[1] == "Not logged in"
    titles = "CLUSTER USER PORT CONTEXT STATE ROUND TRIP RELAY SINCE SENT RECEIVED TOKEN ENDS"
    assert " ".join(table[2].split()) == titles
    assert [line.split()[:5] for line in table[3:]] == [
        [CLUSTER, "alice@example.com", str(first), CLUSTER, "connected"],
        [SECOND, "alice@example.com", str(second), SECOND, "connected"],
    ]
    pid = person.pid()
    assert person.run("disconnect", CLUSTER).stdout == f'{CLUSTER} disconnected; context "{CLUSTER}" is gone\n'
    assert person.document()["current-context"] == "home"
    assert alive(pid)
    person.run("disconnect", "--all")
    until(lambda: not alive(pid), "the process ends with its last cluster")
    assert person.document()["contexts"] == []
    assert person.status() == {"process": None, "clusters": [], "logins": []}
    state = Path(person.env["XDG_STATE_HOME"]) / "arcbridge"
    assert json.loads((state / "ports.json").read_text()) == {}, "ports are given back"


def test_kubectl_answers_in_a_fresh_shell_after_everything_was_killed(
    alice_at_home: Person, cluster: Cluster, kubectl_version: str, tmp_path: Path
) -> None:
    binary = cluster.kubectl_for(kubectl_version).binary
    kubectl = Kubectl(binary, alice_at_home.kubeconfig, tmp_path / "kubectl", env=alice_at_home.env)
    before = names(kubectl.run("get", "ns", "-o", "name").stdout)
    alice_at_home.kill_everything()
    shell = ["sh", "-c", f"{binary} get ns -o name && {binary} --context {SECOND} get ns -o name"]
    done = subprocess.run(shell, env=alice_at_home.env, capture_output=True, text=True, check=True, timeout=60)
    assert names(done.stdout) == before >= {"default", "kube-system"}


def test_helm_answers_too(alice_at_home: Person, tmp_path: Path) -> None:
    try:
        binary = helm()
    except Unavailable as error:
        require_or_skip("helm", str(error))
    alice_at_home.kill_everything()
    done = run([binary, "list", "-A", "-o", "json"], env={**alice_at_home.env, "HOME": str(tmp_path)}, timeout=60)
    assert json.loads(done.stdout) == []


def test_k9s_too(alice_at_home: Person, tmp_path: Path) -> None:
    """In a terminal of its own, as a person sees it."""
    try:
        binary = k9s()
    except Unavailable as error:
        require_or_skip("k9s", str(error))
    tmux = shutil.which("tmux")
    if tmux is None:
        require_or_skip("tmux", "tmux is not on this machine")
    (tmp_path / "config.yaml").write_text("k9s:\n  skipLatestRevCheck: true\n")
    alice_at_home.kill_everything()
    env = {**alice_at_home.env, "K9S_CONFIG_DIR": str(tmp_path), "TERM": "xterm-256color"}
    of_ours = [tmux, "-S", str(tmp_path / "tmux"), "-f", os.devnull]
    run([*of_ours, "new-session", "-d", "-x", "150", "-y", "40", str(binary), "-c", "ns", "--readonly"], env=env)
    try:
        until(
            lambda: "kube-system" in run([*of_ours, "capture-pane", "-p"], env=env).stdout.decode(),
            "k9s shows the namespaces",
            timeout=60,
        )
    finally:
        run([*of_ours, "kill-server"], env=env, check=False)


@contextmanager
def suspended(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.timeout(240)
def test_a_process_that_hangs_is_named_and_ended(alice_at_home: Person, cluster: Cluster, tmp_path: Path) -> None:
    """Suspended, as by a debugger or by a kernel that is short of memory."""
    arguments = alice_at_home.document()["users"][0]["user"]["exec"]["args"]
    kubectl = Kubectl(cluster.binaries.kubectl, alice_at_home.kubeconfig, tmp_path / "kubectl", env=alice_at_home.env)
    pid = alice_at_home.pid()
    said = rf"the background process \(pid {pid}\) does not answer since \d\d:\d\d:\d\d"
    commands = (("status",), ("disconnect", SECOND), ("connect", SECOND, *alice_at_home.flags), tuple(arguments))
    with suspended(pid):
        for words in commands:
            done = alice_at_home.run(*words, check=False)
            assert done.returncode == ExitCode.UNREACHABLE, done
            assert re.search(said, done.stderr), done.stderr
            assert f"`kill -CONT {pid}` lets it go on" in done.stderr
            assert "`arcbridge stop` ends it" in done.stderr
        assert re.search(said, alice_at_home.run("logs").stderr)
        doctor = json.loads(alice_at_home.run("doctor", "-o", "json", *alice_at_home.flags, check=False).stdout)
        hops = {one["hop"]: one for one in doctor["hops"]}
        assert doctor["cause"] == "background_silent"
        assert re.search(said, hops["background process"]["detail"])
        assert hops["kubeconfig"]["code"] == "", "its own port is not another program's"
        done = kubectl.run("get", "ns", check=False)
        assert done.returncode == 1
        assert len(re.findall(said, done.stderr)) == 1, done.stderr
    # It goes on as if nothing had been, and so does kubectl.
    assert "namespace/default" in kubectl.run("get", "ns", "-o", "name").stdout
    with suspended(pid):
        done = alice_at_home.run("stop")
    assert re.search(rf"warning: {said}.*; it gets SIGTERM now", done.stderr)
    assert done.stdout.startswith("Stopped.")
    assert not alive(pid)
    assert "namespace/default" in kubectl.run("get", "ns", "-o", "name").stdout


@pytest.mark.timeout(240)
def test_a_process_that_does_not_end_is_killed_once_the_user_says_so(person: Person, tmp_path: Path) -> None:
    """SIGTERM is blocked in it, which stands for a system call that never comes back."""
    deaf = (
        "import os, signal, sys\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    connect = arcbridge("connect", CLUSTER, *person.flags, "--trust-first-use")
    run([sys.executable, "-c", deaf, *connect], env=person.env)
    pid = person.pid()
    os.kill(pid, signal.SIGSTOP)
    done = person.run("stop", check=False)
    assert done.returncode == ExitCode.FAILURE
    assert "`arcbridge stop --force` kills it (SIGKILL), and what runs through it is cut" in done.stderr
    assert alive(pid)
    os.kill(pid, signal.SIGSTOP)
    with ManagedProcess(
        arcbridge("stop"), log_dir=tmp_path / "logs", name="stop", env=person.env, terminal=(40, 120)
    ) as stop:
        stop.wait_for_line(r"Kill it \(SIGKILL\)\? What runs through it is cut", timeout=30)
        stop.send("n\n")
        assert stop.wait() == ExitCode.FAILURE
    assert alive(pid)
    os.kill(pid, signal.SIGSTOP)
    person.run("stop", "--force")
    assert not alive(pid)
    assert person.run("status").stdout.startswith("No background process runs")


def test_twenty_at_once_start_one_process(alice_at_home: Person) -> None:
    arguments = alice_at_home.document()["users"][0]["user"]["exec"]["args"]
    alice_at_home.kill_everything()
    before = alice_at_home.log().count("background process serves")
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: alice_at_home.run(*arguments), range(20)))
    assert {json.loads(answer.stdout)["kind"] for answer in answers} == {"ExecCredential"}
    # A thread writes the log, and callers have their answers before.
    until(lambda: alice_at_home.log().count("background process serves") > before, "the log has the start", timeout=30)
    log = alice_at_home.log()
    assert log.count("background process serves") == before + 1
    assert "another background process" not in log


def test_an_upgrade_replaces_it_and_what_runs_goes_on(alice_at_home: Person, cluster: Cluster, tmp_path: Path) -> None:
    """The next version is a copy of this one that calls itself so."""
    import arcbridge as package

    shutil.copytree(Path(package.__file__).parent, tmp_path / "arcbridge", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "arcbridge" / "__init__.py").write_text('__version__ = "999.0"\n')
    script = tmp_path / "bin" / "arcbridge"
    script.parent.mkdir()
    script.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
        "from arcbridge.__main__ import main\nsys.exit(main())\n"
    )
    script.chmod(0o755)
    link = tmp_path / "stable" / "arcbridge"  # as package managers have one
    link.parent.mkdir()

    def point_at(program: Path) -> None:
        (tmp_path / "next").symlink_to(program)
        (tmp_path / "next").replace(link)

    present = Path(own_path())
    point_at(present)
    before = alice_at_home.kubeconfig.read_text()
    alice_at_home.kubeconfig.write_text(before.replace(str(present), str(link)))
    newer = {**alice_at_home.env, "PATH": f"{script.parent}:{alice_at_home.env['PATH']}"}
    through = Kubectl(cluster.binaries.kubectl, alice_at_home.kubeconfig, tmp_path / "kubectl", env=alice_at_home.env)
    former = alice_at_home.pid()
    through.run("create", "configmap", "before-the-upgrade", "-n", "default")
    with through.start("get", "configmaps", "-n", "default", "--watch", "-o", "name") as watch:
        watch.wait_for_line("configmap/before-the-upgrade", timeout=30)
        point_at(script)
        assert "namespace/default" in through.run("get", "ns", "-o", "name", env=newer).stdout
        status = json.loads(run([script, "status", "-o", "json"], env=newer).stdout)
        assert (status["process"]["version"], status["process"]["former_versions"]) == ("999.0", 1)
        assert {one["name"] for one in status["clusters"]} == {CLUSTER, SECOND}
        through.run("create", "configmap", "seen-during-the-upgrade", "-n", "default", env=newer)
        watch.wait_for_line("configmap/seen-during-the-upgrade", timeout=30)
        assert alive(former)
    until(lambda: not alive(former), "the former process ends with its last stream", timeout=30)
    through.run("delete", "configmap", "before-the-upgrade", "seen-during-the-upgrade", "-n", "default", env=newer)
    # And back: this version takes the place of the other one.
    point_at(present)
    assert "namespace/default" in through.run("get", "ns", "-o", "name").stdout
    assert alice_at_home.status()["process"]["version"] == package.__version__
    # Uninstalled, and installed elsewhere: the next command lets kubectl find it.
    link.unlink()
    done = alice_at_home.run("status")
    assert f'context "{CLUSTER}" runs arcbridge where it is installed now' in done.stderr
    assert (
        "namespace/default"
        in through.run("get", "ns", "-o", "name", env={**alice_at_home.env, "PATH": "/usr/bin:/bin"}).stdout
    )


def test_it_survives_its_terminal(person: Person, tmp_path: Path) -> None:
    """Asked for the pin at a terminal, which is closed then."""
    shell = ManagedProcess(["sh", "-i"], log_dir=tmp_path / "logs", name="shell", env=person.env, terminal=(40, 120))
    with shell:
        words = " ".join(arcbridge("connect", CLUSTER, *person.flags))
        shell.send(f"{words}\n")
        shell.wait_for_line(r"Trust it from now on\? \[y/N\] ", timeout=30)
        shell.send("y\n")
        shell.wait_for_line(rf'{CLUSTER}   port \d+   context "{CLUSTER}" \(current\)', timeout=30)
        pid = person.pid()
        assert os.getsid(pid) == pid
        shell.kill()  # the kernel sends SIGHUP to the sessions of its terminal
    os.kill(pid, signal.SIGHUP)
    assert person.pid() == pid
    assert "trust-first-use" not in person.kubeconfig.read_text()


def test_a_login_is_asked_for_where_there_is_a_terminal(person: Person, cluster: Cluster, tmp_path: Path) -> None:
    """By `connect`, and by the plugin in the terminal of kubectl; without a terminal kubectl shows what to do."""
    issuer = person.world.issuer
    relay = person.flags[: person.flags.index("--access-token-file")]
    flags = [
        *("--oidc-issuer-url", issuer.url, "--oidc-client-id", "cli", "--oidc-ca-file", str(issuer.ca_file)),
        *("--oidc-audience", RELAY_AUDIENCE, "--cluster-audience", CLUSTER_AUDIENCE, "--grant-type", "device-code"),
    ]

    def log_in(process: ManagedProcess) -> None:
        issuer.approve(process.wait_for_line(r"enter the code (\S+)", timeout=30)[1])

    # A port that no other test takes while the process is away.
    argv = arcbridge("connect", CLUSTER, "--port", str(fixed_port()), *relay, *flags, "--trust-first-use")
    with ManagedProcess(argv, log_dir=tmp_path, name="connect", env=person.env, terminal=(40, 120)) as connect:
        log_in(connect)
        connect.wait_for_line(rf'{CLUSTER}   port \d+   context "{CLUSTER}" \(current\)', timeout=30)
        assert connect.wait() == 0
    kubectl = Kubectl(cluster.binaries.kubectl, person.kubeconfig, tmp_path / "kubectl", env=person.env)
    assert "alice@example.com" in kubectl.run("auth", "whoami").stdout
    person.run("--role", "client", *relay, *flags, "logout")
    person.kill_everything()
    done = kubectl.run("auth", "whoami", check=False)
    assert done.returncode == 1
    assert "you are not logged in at" in done.stderr
    codes = issuer.requests("/device_authorization")
    with ExitStack() as stack:
        # Of several at once one asks, and the others go on with its login.
        asking = [stack.enter_context(kubectl.start("auth", "whoami", terminal=(40, 120))) for _ in range(4)]

        def code() -> str:
            found = [re.search(r"enter the code (\S+)", process.output()) for process in asking]
            return next((one[1] for one in found if one is not None), "")

        until(lambda: bool(code()), "a code is shown", timeout=60)
        issuer.approve(code())
        for process in asking:
            process.wait_for_line("alice@example.com", timeout=60)
            assert process.wait() == 0
    assert issuer.requests("/device_authorization") == codes + 1
    assert "alice@example.com" in kubectl.run("auth", "whoami").stdout


def test_the_log_is_followed_until_an_interrupt(person: Person, tmp_path: Path) -> None:
    person.connect(CLUSTER)
    with ManagedProcess(arcbridge("logs", "-f"), log_dir=tmp_path, name="logs", env=person.env) as logs:
        logs.wait_for_line("background process serves", timeout=30)
        person.run("connect", SECOND, *person.flags, "--trust-first-use")
        logs.wait_for_line(rf"session established.*cluster={SECOND}", timeout=30)
        logs.signal(signal.SIGINT)
        assert logs.wait() in (ExitCode.DONE, ExitCode.INTERRUPTED)


class TestProxy:
    """`proxy` in the foreground beside all that."""

    @contextmanager
    def proxy(self, person: Person, directory: Path, *words: str) -> Iterator[ManagedProcess]:
        argv = arcbridge("--role", "client", *person.flags, "--trust-first-use", *words)
        with ManagedProcess(argv, log_dir=directory, name=f"proxy-{fixed_port()}", env=person.env) as process:
            yield process

    @pytest.mark.parametrize(
        ("number", "command"), [(signal.SIGKILL, "status"), (signal.SIGQUIT, "clusters")], ids=["kill", "quit"]
    )
    def test_after_a_kill_the_next_command_puts_it_right(
        self, person: Person, cluster: Cluster, tmp_path: Path, number: signal.Signals, command: str
    ) -> None:
        person.kubeconfig.write_text("current-context: home\n")
        with self.proxy(person, tmp_path, "-n", CLUSTER) as proxy:
            proxy.wait_for_line("Press Ctrl", timeout=30)
            proxy.signal(number)
            proxy.wait()
        told = person.run(command, *(person.flags if command == "clusters" else ()))
        assert told.stderr == f'what served context "{CLUSTER}" had ended; the kubeconfig says so now\n'
        assert person.document()["current-context"] == "home"
        kubectl = Kubectl(cluster.binaries.kubectl, person.kubeconfig, tmp_path / "kubectl", env=person.env)
        done = kubectl.run("--context", CLUSTER, "get", "ns", check=False)
        assert done.returncode == 1
        assert f"run `arcbridge connect {CLUSTER}`" in done.stderr

    def test_a_second_one_says_so_and_the_end_restores_the_context(self, person: Person, tmp_path: Path) -> None:
        person.kubeconfig.write_text("current-context: home\n")
        with self.proxy(person, tmp_path, "-n", CLUSTER) as proxy:
            port = proxy.wait_for_line(r"listening on port (\d+)", timeout=30)[1]
            proxy.wait_for_line("Press Ctrl", timeout=30)
            before = person.kubeconfig.read_text()
            with self.proxy(person, tmp_path, "-n", CLUSTER, "--port", "0") as second:
                assert second.wait(30) == 0
                assert second.output() == (
                    f'Cluster "{CLUSTER}" is served by another proxy already: port {port}, context "{CLUSTER}"\n'
                )
            assert person.kubeconfig.read_text() == before
            done = person.run("connect", CLUSTER, *person.flags, check=False)
            assert done.returncode == 2
            assert f'context "{CLUSTER}" belongs to a proxy in the foreground' in done.stderr
            assert person.document()["current-context"] == CLUSTER
            proxy.signal(signal.SIGHUP)  # of a terminal that is closed
            assert proxy.wait() == 0
        assert person.document()["current-context"] == "home"
