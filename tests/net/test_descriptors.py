"""Descriptors by a limit that a child process has, because a lowered hard limit cannot be raised again."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import textwrap

import pytest

from arcbridge.net.descriptors import UNLIMITED, advice, explain, limit, raise_limit

pytest.importorskip("resource")


def child(soft: int, hard: int, code: str) -> dict[str, object]:
    """What `code` leaves in `told`, run by a process with these limits."""
    program = (
        f"import json, resource\nresource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        f"told = {{}}\n{textwrap.dedent(code)}\nprint(json.dumps(told))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_the_soft_limit_becomes_the_hard_one() -> None:
    told = child(
        64,
        200,
        """
        from arcbridge.net.descriptors import limit, raise_limit
        told["before"] = limit()
        told["after"] = raise_limit()
        told["again"] = raise_limit()
        told["kernel"] = resource.getrlimit(resource.RLIMIT_NOFILE)
        """,
    )
    assert told == {"before": 64, "after": 200, "again": 200, "kernel": [200, 200]}


def test_a_dial_without_a_descriptor_says_so() -> None:
    told = child(
        40,
        40,
        """
        import asyncio, os
        from arcbridge.errors import Unreachable
        from arcbridge.net.address import Address
        from arcbridge.net.dialer import connect

        async def main():
            held = []
            try:
                while True:
                    held.append(os.dup(0))
            except OSError:
                pass
            try:
                await connect(Address("127.0.0.1", 1), deadline=2)
            except Unreachable as error:
                told["words"] = error.message
            for descriptor in held:
                os.close(descriptor)

        asyncio.run(main())
        """,
    )
    for words in ("no file descriptor left of the 40 it may open", "LimitNOFILE", "ulimit"):
        assert words in str(told["words"])


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENFILE, "fs.file-max"), (errno.ECONNREFUSED, "Connection refused"), (None, "odd")]
)
def test_other_errors_keep_their_words(code: int | None, words: str) -> None:
    assert words in explain(OSError("odd") if code is None else OSError(code, "Connection refused"))


def test_advice_names_the_number_wherever_it_can_be_set() -> None:
    words = advice(51_192)
    assert "LimitNOFILE=51192" in words
    assert "--ulimit nofile=51192:51192" in words
    assert "Kubernetes" in words


def test_this_process_has_a_limit() -> None:
    assert 0 < limit() <= raise_limit() <= UNLIMITED
