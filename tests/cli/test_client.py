"""The client as people start it: a process, its streams, its exit code, its terminal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml

from arcbridge.cli import client
from arcbridge.cli.client import _ago, _parallel, without_token
from arcbridge.cli.parser import parse
from arcbridge.client.commands import forward as forward_module
from arcbridge.client.credentials import proof_keys
from arcbridge.errors import ConfigError, ExitCode
from arcbridge.net.join import JoinCode
from arcbridge.settings.config import ClientConfig
from arcbridge.wire.records import JoinReply
from tests.client.far_side import CLUSTER, CLUSTER_CA, RELAY_CA, FarSide
from tests.client.session.test_session_manager import login

ROOT = Path(__file__).parents[2]


@pytest.fixture
async def far() -> AsyncIterator[FarSide]:
    async with FarSide() as side:
        yield side


class Shell:
    """A person's directory and the flags they always give."""

    def __init__(self, far: FarSide, directory: Path) -> None:
        (directory / "ca.pem").write_text(RELAY_CA.certificate_pem)
        login(directory)
        self.directory = directory
        self.kubeconfig = directory / "kubeconfig"
        self.far = far
        self.always = [
            *("--role", "client", "--relay", far.address, "--relay-ca-file", str(directory / "ca.pem")),
            *("-n", CLUSTER, "--port", "0", "-f", str(self.kubeconfig), "--state-dir", str(directory / "state")),
            *("--access-token-file", str(directory / "access"), "--id-token-file", str(directory / "id")),
        ]
        self.trusting = ["--cluster-ca-pin", CLUSTER_CA.pin]
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(directory), "PYTHONPATH": str(ROOT)}

    async def start(self, *arguments: str, **options: object) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "arcbridge", *self.always, *arguments),
            **{
                "stdin": asyncio.subprocess.DEVNULL,
                "stdout": asyncio.subprocess.PIPE,
                "stderr": asyncio.subprocess.PIPE,
            }
            | options,
            env=self.environment,
        )

    async def run(self, *arguments: str, stdin: bytes | None = None) -> tuple[int | None, str, str]:
        process = await self.start(*arguments, **({} if stdin is None else {"stdin": asyncio.subprocess.PIPE}))
        out, err = await asyncio.wait_for(process.communicate(stdin), 30)
        return process.returncode, out.decode(), err.decode()

    @contextlib.asynccontextmanager
    async def proxy(self, *arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, list[str]]]:
        """A running proxy and what it wrote until its last line."""
        process = await self.start(*self.trusting, *arguments)
        lines: list[str] = []
        try:
            source = process.stderr if "-" in arguments else process.stdout
            assert source is not None
            async with asyncio.timeout(30):
                while not lines or "Press Ctrl+C" not in lines[-1]:
                    line = (await source.readline()).decode()
                    assert line, (lines, await process.stderr.read() if process.stderr else b"")
                    lines.append(line.rstrip("\n"))
            yield process, lines
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()


@pytest.fixture
def shell(far: FarSide, tmp_path: Path) -> Shell:
    return Shell(far, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_proxy_ends_with_0(shell: Shell, number: signal.Signals) -> None:
    async with shell.proxy() as (process, lines):
        assert [line.split()[0] for line in lines] == ["Proxy", "Merged", "Start", "Press"]
        process.send_signal(number)
        assert await asyncio.wait_for(process.wait(), 30) == ExitCode.DONE
    assert "current-context" not in yaml.safe_load(shell.kubeconfig.read_text())


async def test_a_kubeconfig_on_standard_output(shell: Shell) -> None:
    async with shell.proxy("-f", "-") as (process, lines):
        assert [line.split()[0] for line in lines if not line.startswith("{")] == ["Proxy", "Press"]
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        document = yaml.safe_load(await process.stdout.read())
    assert document["current-context"] == CLUSTER


async def test_no_terminal_to_ask_for_the_pin(shell: Shell) -> None:
    got, _, err = await shell.run()
    assert got == ExitCode.FAILURE
    assert "--trust-first-use" in err
    assert CLUSTER_CA.pin in err


@pytest.mark.parametrize(("answer", "exit_code"), [("y", ExitCode.DONE), ("n", ExitCode.FAILURE)])
async def test_the_person_is_asked_once(shell: Shell, far: FarSide, answer: str, exit_code: ExitCode) -> None:
    import pty  # not on Windows

    near, terminal = pty.openpty()
    loop = asyncio.get_running_loop()
    process = await shell.start(stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    text, answered, ended = "", False, False

    def readable() -> None:
        nonlocal text
        try:
            text += os.read(near, 4096).decode()
        except OSError:
            loop.remove_reader(near)

    loop.add_reader(near, readable)
    try:
        async with asyncio.timeout(30):
            while process.returncode is None:
                if "[y/N]" in text and not answered:
                    answered = True
                    os.write(near, f"{answer}\n".encode())
                if "Press Ctrl+C" in text and not ended:
                    ended = True
                    process.send_signal(signal.SIGINT)
                await asyncio.sleep(0.02)
    finally:
        loop.remove_reader(near)
        os.close(near)
    assert process.returncode == exit_code
    assert CLUSTER_CA.pin in text
    assert len(far.auths) == (1 if answer == "y" else 0)
    if answer == "y":
        assert CLUSTER_CA.pin in (shell.directory / "state/pins.toml").read_text()


def test_a_doctor_without_a_relay_names_each_hop_once(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "arcbridge", "doctor", "-o", "json"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, check=False, timeout=60)
    hops = [one["hop"] for one in json.loads(done.stdout)["hops"]]
    assert "state directory" in hops
    assert len(hops) == len(set(hops))


async def test_tokens_on_the_command_line_are_warned_of(shell: Shell, far: FarSide) -> None:
    far.reply = JoinReply(code=JoinCode.NO_AGENT)
    _, _, err = await shell.run(*shell.trusting, "--token", "literal-token")
    assert "warning: other users of this machine can see" in err
    assert "literal-token" not in err
    _, _, err = await shell.run(*shell.trusting, "--token", "-", stdin=b"from-stdin\n")
    assert "warning: other users" not in err
    got, _, err = await shell.run(*shell.trusting, "--token", "-", stdin=b"")
    assert got == ExitCode.USAGE


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", ["--token SECRET-TOKEN", "--token=SECRET-TOKEN"])
async def test_a_token_does_not_stay_on_the_command_line(shell: Shell, far: FarSide, form: str) -> None:
    """docs/threats.md#W4: every user of the machine reads /proc/PID/cmdline; /proc/PID/environ is the owner's alone."""
    process = await shell.start(*shell.trusting, *form.split(" "), "--port", "0", "--file", str(shell.directory / "k"))
    assert process.stdout is not None
    assert b"Proxy is listening" in await asyncio.wait_for(process.stdout.readline(), 30)
    proc = Path(f"/proc/{process.pid}")
    assert b"SECRET" not in (proc / "cmdline").read_bytes()
    assert b"--port\0000\0" in (proc / "cmdline").read_bytes(), "the rest of it is as it was"
    assert (proc / "environ").stat().st_mode & 0o077 == 0
    async with asyncio.timeout(30):
        while not far.auths:
            await asyncio.sleep(0.02)
    assert (far.auths[0].kind, far.auths[0].token) == ("bearer", "SECRET-TOKEN")
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), 30)
    assert err.decode().count("warning: other users of this machine can see") == 1
    assert b"SECRET" not in err


@pytest.mark.parametrize(
    ("command", "rest"),
    [
        (["python", "-m", "arcbridge", "--token", "t", "-n", "a"], ["python", "-m", "arcbridge", "-n", "a"]),
        (["python", "x", "-n", "a", "--token=t"], ["python", "x", "-n", "a"]),
        (["python", "x", "--token", "s", "--token", "t", "login"], ["python", "x", "login"]),
        (["python", "x", "--token=s", "login", "--token=t"], ["python", "x", "login"]),
        (["x", "--token=t", "run", "--", "curl", "--token", "u"], ["x", "run", "--", "curl", "--token", "u"]),
        (["python", "x", "--token", "other"], None),
        (["python", "x", "t"], None),
        (["python", "x", "--token"], None),
    ],
)
def test_a_command_line_without_its_token(command: list[str], rest: list[str] | None) -> None:
    assert without_token(command, "t") == rest


async def test_one_token_for_both_reaches_no_relay_unless_a_setting_says_so(shell: Shell, far: FarSide) -> None:
    """docs/threats.md#T10: the sentence, the exit code, and that nothing was sent."""
    login(shell.directory, access="SECRET", cluster="SECRET")
    got, _, err = await shell.run(*shell.trusting)
    assert got == ExitCode.USAGE
    assert err.startswith("error: relay and cluster would get the same token")
    assert "one_token = true under [login]" in err
    assert "SECRET" not in err
    got, out, _ = await shell.run(*shell.trusting, "doctor", "-o", "json")
    assert got == ExitCode.USAGE
    assert json.loads(out)["cause"] == "one_token"
    assert far.requests == []

    settings = shell.directory / "client.toml"
    settings.write_text("[login]\none_token = true\n")
    _, out, _ = await shell.run(*shell.trusting, "--config", str(settings), "doctor")
    assert "; one token for both" in out
    async with shell.proxy("--config", str(settings)):
        assert (far.requests[0].token, far.auths[0].token) == ("SECRET", "SECRET")


@pytest.mark.parametrize(
    ("command", "words"), [("login", "there is nothing to log in at"), ("logout", "there is nothing to forget")]
)
async def test_login_needs_an_issuer(shell: Shell, command: str, words: str) -> None:
    got, _, err = await shell.run(command)
    assert got == ExitCode.USAGE
    assert words in err


async def test_a_key_is_made_once_and_its_names_are_printed(shell: Shell) -> None:
    file = shell.directory / "keys" / "key.jwk"
    got, out, _ = await shell.run("--proof-key-file", str(file), "key", "-o", "json")
    names = json.loads(out)
    key = proof_keys.load(file)
    assert got == ExitCode.DONE
    assert key is not None
    assert names == {"thumbprint": key.thumbprint, "audience": key.audience(), "nonce": key.nonce()}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    got, out, _ = await shell.run("--proof-key-file", str(file), "key")
    assert out.splitlines()[2].split() == ["audience", key.audience()]
    assert key.to_jwk().decode() not in out
    got, _, err = await shell.run("key")
    assert got == ExitCode.USAGE
    assert "--proof-key-file" in err


def test_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    assert [_ago(now - age) for age in (5, 600, 7300, 200000)] == ["5 s ago", "10 min ago", "2 h ago", "2.3 d ago"]
    assert _ago(0) == _ago(None) == _ago(10**400) == _ago(float("inf")) == "never"


@pytest.mark.parametrize(("text", "seconds"), [("1h", 3600), ("90", 90), ("1h30m", 5400), ("", 0)])
def test_times_of_commands(text: str, seconds: float) -> None:
    assert client.time_limit(parse(["run", f"--for={text}", "--", "true"], "client")) == seconds


@pytest.mark.parametrize("text", ["0", "-1h", "soon", "1y", "500d", "0.5"])
def test_what_is_no_time_of_a_command(text: str) -> None:
    with pytest.raises(ConfigError, match="flag --for: "):
        client.time_limit(parse(["run", f"--for={text}", "--", "true"], "client"))


def test_numbers_of_clusters() -> None:
    assert (_parallel(""), _parallel("1"), _parallel("1000")) == (0, 1, 1000)
    for text in ("0", "-1", "1.5", "many", "1001", "\u0663"):
        with pytest.raises(ConfigError, match="--parallel"):
            _parallel(text)


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("svc/web 80", ((), "default")),
        ("-n shop svc/web 80 --cluster c", (("c",), "shop")),
        ("svc/web 80 --namespace shop", ((), "shop")),
        ("db -n c", (("c",), None)),
        ("db -n c --cluster d", (("d", "c"), None)),
        ("db --namespace shop", "flag --namespace is for things of Kubernetes"),
        ("-n shop svc/web 80 -n other", "flag --namespace"),
        ("-n shop svc/web 80 --namespace shop", "flag --namespace"),
    ],
)
def test_what_n_means_to_forward(line: str, meant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    invocation = parse(["forward", *line.split()], "client")
    monkeypatch.setattr(client, "_start", lambda invocation, **_: (ClientConfig(), ""))
    monkeypatch.setattr(client, "configure_logging", lambda config: None)
    monkeypatch.setattr(client, "_serve", lambda begin: begin(lambda: None))
    for name in ("run_forward", "run_pod_forward"):
        monkeypatch.setattr(forward_module, name, lambda *_, **given: given.get("namespace"))
    if isinstance(meant, str):
        with pytest.raises(ConfigError, match=meant):
            client.forward(invocation)
        return
    namespace = client.forward(invocation)
    assert (invocation.texts("cluster"), namespace) == meant


@pytest.mark.parametrize(
    ("line", "token", "says"),
    [
        ("--certificate a --key b", "t", "each request to a gateway has its caller's own tokens"),
        ("--certificate a", "", "flags --certificate and --key: required"),
        ("--key b", "", "flags --certificate and --key: required"),
    ],
)
def test_what_a_gateway_cannot_be_started_with(
    line: str, token: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_start", lambda invocation: (ClientConfig(), token))
    with pytest.raises(ConfigError, match=says):
        client.gateway(parse(["gateway", *line.split()], "client"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--gateway https://a", "flag --gateway: needs -o clusterprofile"),
        ("--gateway https://a -o json", "flag --gateway: needs -o clusterprofile"),
        ("--gateway-ca-file ca -o clusterprofile", "flag --gateway-ca-file: needs --gateway"),
    ],
)
def test_flags_of_profiles_that_would_have_no_effect(line: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        client.check_gateway_flags(parse(["clusters", *line.split()], "client"))
    client.check_gateway_flags(parse(["clusters", "-o", "clusterprofile", "--gateway", "https://a"], "client"))


@pytest.mark.skipif(sys.platform == "win32", reason="select(2) knows sockets alone there")
def test_output_waits_for_a_reader_that_is_slower() -> None:
    """While a question is open at the terminal of `run`, writing to it does not block."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    whole, found = b"line\n" * 100_000, bytearray()

    def read() -> None:
        while len(found) < len(whole):
            found.extend(os.read(reading, 65536))

    reader = threading.Thread(target=read)
    reader.start()
    client._write_all(writing, whole)
    reader.join()
    assert found == whole
    os.close(reading)
    os.close(writing)
