"""Asking the background process, and starting it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from arcbridge import __version__
from arcbridge.client.background import caller, local_channel, lock_holder
from arcbridge.client.background.caller import NoAnswer, NotRunning, OtherVersion, answer_of, exchange, request
from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.errors import ArcbridgeError, ExitCode, StateError, Unreachable
from arcbridge.pki.private_files import try_lock


@pytest.fixture
def listener(place: BackgroundPaths) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(place.socket)
        sock.listen()
        yield sock


def answering(listener: socket.socket, *answers: bytes) -> threading.Thread:
    """Answer one request after the other."""

    def serve() -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread


def test_a_request_is_json_however_odd_its_texts_are() -> None:
    words = ['a "quoted" one', "zwölf\n\t", "\\", "\U0001f600"]
    line = request("credential", words, server="x")
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert json.loads(line) == {
        "protocol": caller.PROTOCOL,
        "version": __version__,
        "operation": "credential",
        "server": "x",
        "arguments": words,
    }


def test_an_answer_in_pieces(place: BackgroundPaths, listener: socket.socket) -> None:
    answering(listener, b'{"a": "' + b"x" * 100_000 + b'"}\n')
    assert answer_of(exchange(place, request("status")))["a"] == "x" * 100_000


def test_no_process_listens(place: BackgroundPaths, listener: socket.socket) -> None:
    with pytest.raises(NotRunning):
        exchange(BackgroundPaths("/nonexistent", "/"), request("status"))
    listener.close()  # as after SIGKILL: the file is there
    with pytest.raises(NotRunning):
        exchange(place, request("status"))


def test_a_process_that_ends_or_is_silent(place: BackgroundPaths, listener: socket.socket) -> None:
    answering(listener, b"")
    with pytest.raises(NotRunning):
        exchange(place, request("status"))
    with pytest.raises(NoAnswer, match=r"does not answer since \d\d:\d\d:\d\d; `arcbridge stop` ends it"):
        exchange(place, request("status"), timeout=0.05)


def test_silence_is_between_two_bytes_and_an_answer_has_its_own_time(
    place: BackgroundPaths, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that prepares an answer shows that it lives; one that is heard of no more has stopped."""
    monkeypatch.setattr(caller, "SILENCE", 0.5)
    gate, heard = threading.Event(), threading.Event()

    def serve() -> None:
        for answer in (b"", b"{}\n"):
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                for _ in range(8):
                    connection.sendall(b" ")
                    gate.wait(0.1)  # the pace
                if answer:
                    connection.sendall(answer)
                else:
                    heard.wait(10)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with pytest.raises(NoAnswer):
        exchange(place, request("status"))
    os.unlink(place.silent)
    heard.set()
    assert exchange(place, request("status")) == b"{}\n"
    thread.join(10)


def test_the_second_caller_waits_no_more(
    place: BackgroundPaths, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kubectl runs the plugin six times."""
    Path(place.silent).touch()
    os.utime(place.silent, (0, 1_000_000))
    monkeypatch.setattr(caller, "SILENCE", 60.0)
    with pytest.raises(NoAnswer, match="since 1970-01-1"):
        exchange(place, request("status"))


def test_the_first_byte_ends_that(place: BackgroundPaths, listener: socket.socket) -> None:
    """The process goes on, and removes the mark only when it looks for its socket the next time."""
    Path(place.silent).touch()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b" ")
            threading.Event().wait(2 * caller.SILENT_ALREADY)
            connection.sendall(b"{}\n")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert exchange(place, request("status")) == b"{}\n"
    thread.join(10)


def test_a_stop_sends_none_to_a_process_that_is_suspended(place: BackgroundPaths, listener: socket.socket) -> None:
    """It would end by it when it goes on, also where the user has said no."""
    Path(place.silent).touch()
    with pytest.raises(NoAnswer):
        caller.stop(place)
    connection, _ = listener.accept()
    with connection:
        assert b'"stop"' not in connection.recv(65536)


def test_a_stop_that_ends_nothing(
    place: BackgroundPaths, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands then end it by force, as one that never answered."""
    monkeypatch.setattr(caller, "STOP_TIMEOUT", 0.1)
    lock = try_lock(Path(place.process_lock))
    assert lock is not None
    lock_holder.sign(lock)
    answering(listener, b'{"version": "1"}\n', b'{"stopped": true}\n')
    with pytest.raises(NoAnswer, match=f"process {os.getpid()} has not ended; `arcbridge stop --force` kills it"):
        caller.stop(place)
    os.close(lock)


def test_one_that_hangs_without_its_socket_is_waited_for_once(
    place: BackgroundPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that is started first waits for the lock, and leaves the mark."""
    started: list[object] = []
    monkeypatch.setattr(caller, "_start", started.append)
    lock = try_lock(Path(place.process_lock))
    assert lock is not None
    caller.ensure_started(place, {})
    assert len(started) == 1
    Path(place.silent).touch()
    with pytest.raises(NoAnswer, match=r"does not answer since .*; `arcbridge stop` ends it"):
        caller.ensure_started(place, {})
    os.close(lock)
    caller.ensure_started(place, {})
    assert len(started) == 2


def test_a_start_that_does_not_end_is_not_waited_for_without_limit(
    place: BackgroundPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller, "START_TIMEOUT", 0.05)
    lock = try_lock(Path(place.start_lock))
    assert lock is not None
    with pytest.raises(StateError, match="another process has held the lock"):
        caller.ensure_started(place, {})
    os.close(lock)


def test_a_full_queue_is_waited_for(place: BackgroundPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses at once what it cannot queue."""
    monkeypatch.setattr(caller, "SILENCE", 0.2)
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(place.socket)
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.setblocking(False)
                sock.connect(place.socket)
        with pytest.raises(NoAnswer):
            exchange(place, request("status"))
        os.unlink(place.silent)
        monkeypatch.setattr(caller, "SILENCE", 10.0)
        threading.Timer(0.1, lambda: [listener.accept()[0].close() for _ in range(2)]).start()
        with pytest.raises(NotRunning):  # it was taken, and closed
            exchange(place, request("status"))


def test_w14_a_socket_of_another_user_is_not_spoken_to(
    place: BackgroundPaths, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_channel, "foreign_user", lambda sock: os.geteuid() + 1)
    with pytest.raises(StateError, match="and not by this user"):
        exchange(place, request("status"))


@pytest.mark.parametrize("planted", ["open", "link", "another user's"])
def test_b45_nothing_is_sent_into_a_directory_that_others_can_change(
    place: BackgroundPaths, listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    """Where the kernel does not say whose process answers, as on macOS, the directory in /tmp is all that does."""
    monkeypatch.setattr(local_channel, "foreign_user", lambda sock: None)
    listener.settimeout(0)
    if planted == "open":
        tmp_path.chmod(0o777)
    elif planted == "link":
        (tmp_path / "link").symlink_to(tmp_path)
        place = BackgroundPaths(str(tmp_path / "link"), str(tmp_path))
    else:
        monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(StateError, match="is not a directory of this user alone: remove it"):
        exchange(place, request("status"))
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_errors_come_back_as_they_were() -> None:
    with pytest.raises(ArcbridgeError) as caught:
        answer_of(b'{"error": "log in", "exit_code": 3}')
    assert (caught.value.message, caught.value.exit_code) == ("log in", ExitCode.LOGIN)
    with pytest.raises(ArcbridgeError) as caught:
        answer_of(b'{"error": "new", "exit_code": 99}')
    assert caught.value.exit_code == ExitCode.FAILURE
    with pytest.raises(OtherVersion, match="9"):
        answer_of(b'{"error": "x", "code": "version", "version": "9"}')


def test_who_may_start_nothing_is_told_so(place: BackgroundPaths) -> None:
    with pytest.raises(NotRunning):
        caller.ask(place, request("status"), {}, start=False)


def test_what_is_answered_at_no_time_is_told(place: BackgroundPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends and one that lets its caller ask again look alike from here."""
    started: list[object] = []
    monkeypatch.setattr(caller, "ensure_started", lambda *arguments: started.append(arguments))
    with pytest.raises(Unreachable, match="ended, or the connection was taken off, before each of 5 answers"):
        caller.ask(place, request("status"), {})
    assert len(started) == 5


def test_a_process_that_does_not_start_is_told(place: BackgroundPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        caller,
        "program",
        lambda: [
            sys.executable,
            "-c",
            "import os; os.write(int(os.environ['ARCBRIDGE_READY_DESCRIPTOR']), b'no room')",
        ],
    )
    with pytest.raises(StateError, match="did not start: no room"):
        caller.ask(place, request("status"), os.environ)
    monkeypatch.setattr(caller, "program", lambda: ["/bin/false"])
    with pytest.raises(StateError, match="it ended without a word"):
        caller.ask(place, request("status"), os.environ)
    monkeypatch.setattr(caller, "program", lambda: ["/bin/sh", "-c", "sleep 5"])
    monkeypatch.setattr(caller, "START_TIMEOUT", 0.1)
    with pytest.raises(StateError, match="it runs, and does not serve within 0 s"):
        caller.ask(place, request("status"), os.environ)


def test_what_a_process_that_is_started_has_of_the_environment() -> None:
    given = {"HOME": "/h", "ARCBRIDGE_RELAY": "https://r", "ARCBRIDGE_LOOP": "asyncio", "NOTIFY_SOCKET": "/run/n"}
    assert caller._kept(given) == {"HOME": "/h", "ARCBRIDGE_LOOP": "asyncio"}


def test_what_a_question_imports() -> None:
    """kubectl waits for it."""
    code = (
        "import sys\n"
        "from arcbridge.client import background_paths as place\nfrom arcbridge.client.background import caller\n"
        "caller.request('credential', ['x'])\n"
        "try:\n    caller.exchange(place.BackgroundPaths.find({'HOME': '/nonexistent'}), b'')\n"
        "except caller.NotRunning:\n    pass\n"
        "print(*sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    heavy = {"json", "socket", "argparse", "dataclasses", "typing", "asyncio", "ssl", "subprocess", "pathlib", "re"}
    assert not heavy & set(done.stdout.split())
