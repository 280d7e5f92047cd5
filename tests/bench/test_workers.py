"""The study of several workers: what is made of its runs, and the program that pours."""

from __future__ import annotations

import json
import socket
import subprocess

import pytest

from bench.herd.pour import POUR
from bench.load.build import NoCompiler, build
from bench.studies.workers import _limits, _values
from tests.support.processes import require_or_skip


def run(held: bool, workers: int, speed: float) -> dict[str, object]:
    return {
        "held": held,
        "workers": workers,
        "mb_per_s": speed,
        "relay_cpu_s_per_gb": 0.25,
        "ends_cpu_s_per_gb": 0.5,
    }


def test_medians_and_ratios() -> None:
    runs = [run(False, 1, speed) for speed in (900, 1000, 5000)] + [
        run(False, 2, 1500),
        run(True, 1, 400),
        run(True, 2, 800),
    ]
    values = _values(runs)
    assert (values["one_mb_per_s"], values["two_mb_per_s"], values["ratio"]) == (1000, 1500, 1.5)
    assert values["held_ratio"] == 2
    assert values["two_relay_cpu_s_per_gb"] == 0.25
    notes = _limits(values)
    assert notes[0].startswith("one: the relay used 0.25 cores and the ends 0.50, of ")
    assert notes[-1].endswith("ratio 2.00")
    assert "held_ratio" not in _values(runs[:4])


@pytest.fixture(scope="module")
def program() -> str:
    try:
        return str(build(POUR))
    except NoCompiler as error:
        require_or_skip("compiler", str(error))


def pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        near = socket.create_connection(listening.getsockname())
        return near, listening.accept()[0]


def pour(program: str, source: socket.socket, sink: socket.socket) -> subprocess.CompletedProcess[str]:
    numbers = (source.fileno(), sink.fileno())
    argv = [program, "0.5", "0", *map(str, numbers)]
    return subprocess.run(argv, pass_fds=numbers, capture_output=True, text=True, check=False, timeout=30)


def test_all_that_is_poured_comes(program: str) -> None:
    near, far = pair()
    with near, far:
        for _ in range(2):  # the sessions serve again
            told = json.loads(pour(program, near, far).stdout)
            assert told["total_bytes"] > 0
            assert told["mb_per_s"] > 0


def test_an_end_that_breaks_is_told(program: str) -> None:
    near, far = pair()
    with near, far:
        far.shutdown(socket.SHUT_RDWR)
        done = pour(program, near, far)
        assert done.returncode == 1
        assert done.stderr.startswith("pour: ")
