from __future__ import annotations

import os

from arcbridge.relay.pipes import Pipe, PipePool


def test_a_pipe_is_used_again_when_it_is_empty() -> None:
    pool = PipePool(1)
    pipe = pool.take()
    assert isinstance(pipe, Pipe)
    assert pool.take() is None
    assert pool.refused == 1
    pool.give(pipe)
    assert pool.take() is pipe
    pool.give(pipe)
    pool.close()
    assert pool.open == 0


def test_a_pipe_with_bytes_in_it_never_serves_another_pair() -> None:
    pool = PipePool(1)
    pipe = pool.take()
    os.write(pipe.writer, b"left over")
    pool.discard(pipe)
    again = pool.take()
    try:
        os.read(again.reader, 100)
        raise AssertionError("a new pipe has no bytes")
    except BlockingIOError:
        pass
    pool.discard(again)
    assert pool.open == 0


def test_no_descriptors_left_means_copying() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    pool = PipePool()
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        assert used >= 3
        assert pool.take() is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert pool.open == 0
