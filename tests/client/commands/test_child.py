"""What another program finds in its environment, and how its end is told."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.client.commands import child
from arcbridge.client.commands.child import LONGEST, LinePrefix, Signals, environment_for, exit_code, not_found
from arcbridge.errors import CommandNotFound
from arcbridge.settings.config import LoginConfig

DIRECTORY = Path("/private")


def test_environment() -> None:
    found = environment_for({"PATH": "/bin", "KUBECONFIG": "/home/a/.kube/config"}, DIRECTORY, "prod")
    assert found == {
        "PATH": "/bin",
        "KUBECONFIG": "/private/kubeconfig",
        "KUBECACHEDIR": "/private/cache",
        "ARCBRIDGE_CLUSTER": "prod",
    }


def test_a_proxy_is_not_for_the_local_endpoint() -> None:
    found = environment_for({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": ".example.org"}, DIRECTORY, "prod")
    assert (found["NO_PROXY"], found["no_proxy"]) == (".example.org,127.0.0.1", "127.0.0.1")


@pytest.mark.parametrize(
    ("login", "kept"),
    [
        (LoginConfig(workload="github"), {"A_TOKEN", "OTHER_TOKEN"}),
        (LoginConfig(client_assertion_workload="github-actions"), {"A_TOKEN", "OTHER_TOKEN"}),
        (LoginConfig(workload="azure-pipelines:x"), {"A_TOKEN", "OTHER_TOKEN"}),
        (LoginConfig(workload="env:A_TOKEN, OTHER_TOKEN"), set()),
        (LoginConfig(), {"A_TOKEN", "OTHER_TOKEN", "JWT", "TWO", *child._TOKEN_SERVICES}),
    ],
    ids=lambda one: one.workload if isinstance(one, LoginConfig) else "",
)
def test_w32_a_restricted_program_gets_nothing_with_which_tokens_are_asked_for(
    login: LoginConfig, kept: set[str]
) -> None:
    jwt = ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (b"{}", b'{"iss": "i"}', b"s"))
    environment = dict.fromkeys(child._TOKEN_SERVICES, "opaque")
    environment |= {"A_TOKEN": "opaque", "OTHER_TOKEN": "opaque", "JWT": jwt, "TWO": f"{jwt} {jwt}", "PATH": "/a.b.c"}
    assert child.without_tokens(environment, login).keys() == {*kept, "PATH"}


def test_exit_codes() -> None:
    assert [exit_code(status) for status in (0, 3, -9, -15)] == [0, 3, 137, 143]
    assert not_found("kubectl").exit_code == 127


async def test_a_program_that_cannot_be_started() -> None:
    with Signals() as signals, pytest.raises(CommandNotFound, match="cannot run '/no/such'"):
        await child.run(["/no/such"], {}, signals)


async def test_output_gets_its_prefix() -> None:
    written: list[tuple[int, bytes]] = []
    with Signals() as signals:
        code = await child.run(
            ["sh", "-c", "echo one; printf two >&2; cat; exit 3"],
            dict(os.environ),
            signals,
            prefix="a | ",
            write=lambda descriptor, data: written.append((descriptor, data)),
        )
    assert code == 3
    assert sorted(written) == [(1, b"a | one\n"), (2, b"a | two\n")]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGHUP")
def test_under_nohup_the_program_goes_on_without_its_terminal() -> None:
    """A shell whose terminal is closed sends SIGHUP to each process group of its own."""
    code = (
        "import asyncio, os, sys\nfrom arcbridge.cli.loop import loop_factory\n"
        "from arcbridge.client.commands import child\n"
        "async def main():\n    with child.Signals() as signals:\n"
        "        return await child.run(sys.argv[1:], dict(os.environ), signals)\n"
        "with asyncio.Runner(loop_factory=loop_factory()) as runner:\n    sys.exit(runner.run(main()))\n"
    )
    program = ["sh", "-c", "echo ready; read line; echo went on with $1; exit 3", "sh", "a b"]
    process = subprocess.Popen(
        ["sh", "-c", 'trap "" HUP; exec "$0" "$@"', sys.executable, "-c", code, *program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGHUP)
    assert process.communicate("\n", timeout=30)[0] == "went on with a b\n"
    assert process.returncode == 3


async def test_a_cancelled_run_ends_its_program() -> None:
    first = asyncio.Event()
    loop = asyncio.get_running_loop()
    written: list[bytes] = []

    def write(descriptor: int, data: bytes) -> None:
        written.append(data)
        loop.call_soon_threadsafe(first.set)

    with Signals() as signals:
        task = asyncio.create_task(
            child.run(["sh", "-c", "echo $$; exec sleep 60"], dict(os.environ), signals, prefix="", write=write)
        )
        await first.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    with pytest.raises(ProcessLookupError):
        os.kill(int(written[0]), 0)


async def test_a_signal_cancels_what_has_not_started() -> None:
    async def starts() -> int:
        with signals.starting():
            await asyncio.Event().wait()
        return 0

    with Signals() as signals:
        task = asyncio.create_task(starts())
        await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert signals.received == signal.SIGTERM
        with pytest.raises(asyncio.CancelledError):
            await starts()
    os.kill(os.getpid(), signal.SIGTERM)  # what ends in order now is not killed half-way
    await asyncio.sleep(0)


@given(st.lists(st.binary(max_size=20)))
def test_pieces_do_not_matter(pieces: list[bytes]) -> None:
    lines = LinePrefix("a | ")
    out = b"".join(lines.feed(piece) for piece in pieces) + lines.end()
    whole = b"".join(pieces)
    expected = whole.split(b"\n")
    if expected[-1] == b"":
        expected.pop()
    assert out == b"".join(b"a | " + line + b"\n" for line in expected)


def test_a_line_that_does_not_end_is_given_out_in_pieces() -> None:
    lines = LinePrefix("a | ")
    out = lines.feed(b"x" * (2 * LONGEST + 1))
    assert out == (b"a | " + b"x" * LONGEST + b"\n") * 2
    assert lines.end() == b"a | x\n"
    assert lines.end() == b""
