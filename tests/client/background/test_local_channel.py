"""The channel between two processes of one user: whose the other end is, descriptors, and a system without it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from arcbridge.client.background import local_channel


@pytest.mark.skipif(sys.platform != "linux", reason="SO_PEERCRED")
def test_the_kernel_says_whose_a_peer_is(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = socket.socketpair()
    with one, other:
        assert local_channel.foreign_user(one) is None
        owner = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
        assert local_channel.foreign_user(one) == owner


def test_descriptors_go_over_with_their_bytes(tmp_path: Path) -> None:
    one, other = socket.socketpair()
    reading, writing = os.pipe()
    with one, other:
        local_channel.send_descriptors(one, b"+", [writing])
        os.close(writing)
        (copy,) = local_channel.receive_descriptors(other, 8)
        os.write(copy, b"x")
        assert os.read(reading, 9) == b"x"
    os.close(copy)
    os.close(reading)


def test_a_program_is_started_without_a_terminal(tmp_path: Path) -> None:
    said = tmp_path / "said"
    code = f"import os; open({str(said)!r}, 'w').write(f'{{os.getsid(0) == os.getpid()}} {{os.isatty(0)}}')"
    child = local_channel.spawn([sys.executable, "-c", code], os.environ)
    os.waitpid(child, 0)
    assert said.read_text() == "True False"
    local_channel.reap(child)  # it is gone already, and that is no error


def test_a_program_that_is_started_keeps_no_descriptor_of_a_script(tmp_path: Path) -> None:
    """`exec 9>LOCK; flock 9; arcbridge connect prod`: the lock is the script's, and ends with it."""
    said, (reading, writing) = tmp_path / "said", os.pipe()
    lock = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
    for one in (lock, writing):
        os.set_inheritable(one, True)
    code = (
        "import os\ndef there(one):\n    try: return bool(os.fstat(one))\n    except OSError: return False\n"
        f"found = [there({lock}), there({writing})]\nopen({str(said)!r}, 'w').write(str(found))"
    )
    os.waitpid(local_channel.spawn([sys.executable, "-c", code], os.environ, writing), 0)
    assert said.read_text() == "[False, True]"
    for one in (lock, reading, writing):
        os.close(one)


def test_elsewhere_each_part_says_that_there_is_none() -> None:
    code = (
        "from tests.support.windows import pretend; pretend(windows=True)\n"
        "from arcbridge.client.background import local_channel as channel\n"
        "from arcbridge.errors import ConfigError\n"
        "calls = [channel.quick_socket, channel.new_socket, lambda: channel.foreign_user(None),\n"
        "    lambda: channel.send_descriptors(None, b'', []), lambda: channel.receive_descriptors(None, 1),\n"
        "    lambda: channel.spawn([], {}), lambda: channel.reap(1), channel.leave_terminal]\n"
        "for call in calls:\n"
        "    try: call()\n"
        "    except ConfigError as error: print(error.message)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == [local_channel.NOT_HERE] * 8
