"""Programs that tests start: watched from their first line, ended with the test, explained when they fail.

Nothing here sleeps for a fixed time. A wait ends when the line has been written, when the URL answers, when the process
has ended (an error, with the end of its output) or at a deadline (the same).
"""

from __future__ import annotations

import asyncio
import codecs
import ctypes
import errno
import os
import queue
import re
import shutil
import signal
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from tests.support.stopping import Stopping

if sys.platform != "win32":  # where nothing here has a terminal
    import fcntl
    import termios

Stream = Literal["stdout", "stderr", "any"]


class Mark(NamedTuple):
    """A place in the output of a process: whole lines before it, and characters of the line of each stream it cuts."""

    lines: int = 0
    stdout: int = 0
    stderr: int = 0


START = Mark()

_POSIX = sys.platform != "win32"
KILL = signal.SIGKILL if _POSIX else signal.SIGTERM
_ASKED_FOR = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM) if _POSIX else ()
"""What tests send to end a program. A shell's job in the background, and `nohup`, leave some ignored, and every child
inherits that: kubectl would not hear its Ctrl-C."""
_PR_SET_PDEATHSIG = 1
# Loaded before any fork: between fork and exec nothing may be imported.
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_SETPRIV = shutil.which("setpriv") if sys.platform == "linux" else None
if (
    _SETPRIV is not None
    and subprocess.run([_SETPRIV, "--pdeathsig", "SIGKILL", "true"], capture_output=True).returncode
):
    _SETPRIV = None  # that of busybox, or an old one


def required() -> frozenset[str]:
    """Return the names in ARCBRIDGE_REQUIRE (separated by commas): what must not be left out; `all` stands for all."""
    return frozenset(name.strip() for name in os.environ.get("ARCBRIDGE_REQUIRE", "").split(",") if name.strip())


def require_or_skip(name: str, reason: str) -> NoReturn:
    """Skip the test, saying what is left out and why; fail instead when ARCBRIDGE_REQUIRE lists the name."""
    import pytest  # `make run` does without

    if required() & {name, "all"}:
        pytest.fail(f"ARCBRIDGE_REQUIRE lists {name!r}, but: {reason}", pytrace=False)
    pytest.skip(f"LEFT OUT: {name}: {reason}")


class ProcessFailed(AssertionError):
    """A process ended too early, was not ready in time, or did not write what was waited for."""


class ManagedProcess(Stopping):
    """One running program with its output.

    Output is kept in memory and, under `log_dir`, in NAME.stdout.log and NAME.stderr.log. The process leads a session
    of its own, so that a Ctrl-C at the test's terminal leaves its end to the fixtures; if the test process is killed
    outright, the kernel sends `death_signal` (Linux).

    With `terminal=(rows, columns)` the process runs on a terminal: all output counts as stdout, and `send` types.
    With `stdin=True`, `send` and `close_stdin` feed a pipe. Otherwise standard input is empty.
    `env` is merged into the environment; a value of None removes the variable. `heard` gets each piece of output as it
    comes, in a thread of its stream.
    """

    def __init__(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        log_dir: Path,
        name: str | None = None,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        stdin: bool = False,
        terminal: tuple[int, int] | None = None,
        death_signal: signal.Signals = KILL,
        heard: Callable[[str], None] | None = None,
    ) -> None:
        self._heard = heard
        self.argv = [os.fspath(arg) for arg in argv]
        self.name = name or Path(self.argv[0]).name
        self.stdout_path = log_dir / f"{self.name}.stdout.log"
        self.stderr_path = log_dir / f"{self.name}.stderr.log"
        self._changed = threading.Condition()
        self._lines: list[tuple[str, str]] = []
        self._partial = {"stdout": "", "stderr": ""}
        self._master: int | None = None
        log_dir.mkdir(parents=True, exist_ok=True)

        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        for key, value in (env or {}).items():
            if value is None:
                environment.pop(key, None)
            else:
                environment[key] = value
        ends: dict[str, int] = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        ends["stdin"] = subprocess.PIPE if stdin else subprocess.DEVNULL
        if terminal is not None:
            self._master, slave = os.openpty()
            self.resize(*terminal)
            ends = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        try:
            self._process = _start(
                self.argv,
                death_signal,
                terminal=terminal is not None,
                env=environment,
                cwd=cwd,
                start_new_session=True,
                **ends,
            )
        except BaseException:
            if self._master is not None:
                os.close(self._master)
            raise
        finally:
            if terminal is not None:
                os.close(slave)
        if self._master is not None:
            sources = [("stdout", self._master, self.stdout_path)]
        else:
            assert self._process.stdout is not None
            assert self._process.stderr is not None
            sources = [
                ("stdout", self._process.stdout.fileno(), self.stdout_path),
                ("stderr", self._process.stderr.fileno(), self.stderr_path),
            ]
        self._pumps = [
            threading.Thread(target=self._pump, args=source, daemon=True, name=f"{self.name} {source[0]}")
            for source in sources
        ]
        for pump in self._pumps:
            pump.start()
        threading.Thread(target=self._reap, daemon=True, name=f"{self.name} reaper").start()

    # Looking.

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal, or None while the process runs."""
        return self._process.poll()

    @property
    def running(self) -> bool:
        return self.returncode is None

    def output(self, stream: Stream = "any") -> str:
        """Return everything written so far."""
        with self._changed:
            text = "".join(line + "\n" for source, line in self._lines if stream in ("any", source))
            return text + "".join(part for source, part in self._partial.items() if stream in ("any", source))

    def mark(self) -> Mark:
        """Return the present end of the output, to the character, for `after=`."""
        with self._changed:
            return Mark(len(self._lines), len(self._partial["stdout"]), len(self._partial["stderr"]))

    def lines(self, *, after: Mark = START) -> list[str]:
        """Return the whole lines of both streams, in the order in which they came, since `after`."""
        before = {"stdout": after.stdout, "stderr": after.stderr}
        found = []
        with self._changed:
            for source, line in self._lines[after.lines :]:
                found.append(line[before[source] :])
                before[source] = 0
        return found

    def tail(self, lines: int = 25) -> str:
        """Return what a failure message should show: command, state, and the last lines of output."""
        with self._changed:
            last = [f"  {source}: {line[:400]}" for source, line in self._lines[-lines:]]
            last += [f"  {source}: {part}" for source, part in self._partial.items() if part]
        state = "running" if self.running else f"ended with {self.returncode}"
        return "\n".join([f"{self.name} (pid {self.pid}, {state}): {' '.join(self.argv)}", *(last or ["  no output"])])

    def __repr__(self) -> str:
        return f"<ManagedProcess {self.name} pid={self.pid} returncode={self.returncode}>"

    # Waiting.

    def wait_for_line(
        self, pattern: str | re.Pattern[str], *, stream: Stream = "any", timeout: float = 15, after: Mark = START
    ) -> re.Match[str]:
        """Return the first match in a line of the output, also in one that has no newline yet (a prompt).

        Looks at everything since the start, or since `after`, a value of `mark()`: of a line that had begun by then,
        only at what came later. Raises `ProcessFailed` at the deadline, and as soon as the process has ended without
        it.
        """
        expression = re.compile(pattern)
        deadline = time.monotonic() + timeout
        position = after.lines
        before = {"stdout": after.stdout, "stderr": after.stderr}  # characters of the line that the mark stands in
        while True:
            with self._changed:
                # Read before looking: if output was over by then, what we see is all there will be.
                over = not any(pump.is_alive() for pump in self._pumps) and not self.running
                while position < len(self._lines):
                    source, line = self._lines[position]
                    position += 1
                    line, before[source] = line[before[source] :], 0
                    if stream in ("any", source) and (match := expression.search(line)):
                        return match
                for source, line in self._partial.items():
                    line = line[before[source] :]
                    if line and stream in ("any", source) and (match := expression.search(line)):
                        return match
                if over:
                    raise ProcessFailed(f"ended without writing {expression.pattern!r}\n{self.tail()}")
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ProcessFailed(f"did not write {expression.pattern!r} within {timeout} s\n{self.tail()}")
                self._changed.wait(left)

    async def line(
        self, pattern: str | re.Pattern[str], *, stream: Stream = "any", timeout: float = 15, after: Mark = START
    ) -> re.Match[str]:
        """Do as `wait_for_line` does, without holding up the event loop."""
        return await asyncio.to_thread(self.wait_for_line, pattern, stream=stream, timeout=timeout, after=after)

    def wait_for_url(self, url: str, *, timeout: float = 15, context: ssl.SSLContext | None = None) -> str:
        """Return the body once the URL answers with 200. Raises `ProcessFailed` as `wait_for_line` does."""
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        deadline = time.monotonic() + timeout
        last = "no attempt"
        while self.running:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ProcessFailed(f"{url} not ready within {timeout} s (last: {last})\n{self.tail()}")
            try:
                with opener.open(url, timeout=max(left, 0.1)) as answer:
                    return str(answer.read().decode())
            except urllib.error.HTTPError as error:
                last = f"{error.code} {error.read()[:500].decode(errors='replace')}"
                error.close()
            except OSError as error:
                last = str(error)
            with self._changed:
                self._changed.wait(0.02)  # until output or the end, at most until the next attempt
        self._read_out()
        raise ProcessFailed(f"ended before {url} was ready (last: {last})\n{self.tail()}")

    def wait(self, timeout: float = 15) -> int:
        """Return the exit status once the process has ended and all of its output has been read."""
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ProcessFailed(f"still running after {timeout} s\n{self.tail()}") from None
        self._read_out()
        return status

    async def ended(self, timeout: float = 15) -> int:
        """Do as `wait` does, without holding up the event loop."""
        return await asyncio.to_thread(self.wait, timeout)

    # Acting.

    def send(self, text: str | bytes) -> None:
        """Write to standard input, or type on the terminal."""
        data = text.encode() if isinstance(text, str) else text
        if self._master is not None:
            while data:
                data = data[os.write(self._master, data) :]
        else:
            assert self._process.stdin is not None, "no stdin=True, or its terminal is gone"
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def close_stdin(self) -> None:
        """End standard input (on a terminal: type Ctrl-D)."""
        if self._master is not None:
            self.send(b"\x04")
        elif self._process.stdin is not None:
            self._process.stdin.close()

    def resize(self, rows: int, columns: int) -> None:
        """Change the terminal's size; the kernel tells the process by SIGWINCH."""
        assert self._master is not None, "start it with terminal="
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, unless it has ended."""
        self._process.send_signal(number)

    def kill(self) -> int:
        """Kill the process and return its exit status."""
        self._process.kill()
        return self._close()

    def stop(self, timeout: float = 10) -> int:
        """Ask the process to end, kill it at the deadline, and return its exit status. Harmless when it has ended."""
        self._process.terminate()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
        return self._close()

    def _close(self) -> int:
        status = self.wait(10)
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass  # it ended without reading what was buffered
        return status

    def _pump(self, stream: str, fd: int, path: Path) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        with path.open("ab", buffering=0) as log:
            while True:
                try:
                    chunk = os.read(fd, 65536)
                except OSError as error:
                    if error.errno != errno.EIO:  # EIO: no process has the terminal open any more
                        raise
                    chunk = b""
                log.write(chunk)
                text = decoder.decode(chunk, final=not chunk)
                if self._heard is not None:
                    self._heard(text)
                with self._changed:
                    *lines, self._partial[stream] = (self._partial[stream] + text).split("\n")
                    self._lines += [(stream, line.removesuffix("\r")) for line in lines]
                    self._changed.notify_all()
                if not chunk:
                    break
        if (master := self._master) is not None:
            # `rm` closes its streams before it exits: if the terminal went then, SIGHUP would end it.
            self._process.wait()
            self._master = None  # before closing: the number may soon be another file's
            os.close(master)
        else:
            getattr(self._process, stream).close()

    def _read_out(self) -> None:
        """Wait until all output of a process that has ended was read."""
        for pump in self._pumps:
            # A grandchild that holds on to the pipe must not hold up the test.
            pump.join(2)

    def _reap(self) -> None:
        self._process.wait()
        for pump in self._pumps:
            pump.join()
        with self._changed:
            self._changed.notify_all()


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    input: bytes | None = None,
    timeout: float = 60,
    check: bool = True,
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end: like `subprocess.run`, but it does not outlive us, and failures are told whole.

    Raises `ProcessFailed` at the deadline and, with `check`, for an exit status that is not 0.
    """
    command = [os.fspath(arg) for arg in argv]
    stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
    process = _start(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=cwd)
    with process:
        try:
            stdout, stderr = process.communicate(input, timeout)
            problem = f"exit status {process.returncode}" if check and process.returncode else None
        except subprocess.TimeoutExpired:
            process.kill()
            stdout, stderr = process.communicate()
            problem = f"not done within {timeout} s"
        except BaseException:
            process.kill()
            raise
    if problem:
        raise ProcessFailed(
            f"{' '.join(command)}: {problem}\n"
            f"stdout: {stdout[-4000:].decode(errors='replace')}\nstderr: {stderr[-4000:].decode(errors='replace')}"
        )
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def start_piped(argv: Sequence[str | os.PathLike[str]], *, cwd: Path | None = None) -> subprocess.Popen[bytes]:
    """Start a program whose whole output, errors too, comes out of its `stdout`; it does not outlive us."""
    command = [os.fspath(arg) for arg in argv]
    return _start(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0, cwd=cwd
    )


def _start(
    argv: list[str], death_signal: signal.Signals = KILL, *, terminal: bool = False, **options: Any
) -> subprocess.Popen[bytes]:
    if light := _without_a_copy(argv, death_signal, options.get("env")) if not terminal else None:
        return _spawn(lambda: subprocess.Popen(light, **options))
    prepare = prepare_child(death_signal, terminal) if _POSIX else None
    return _spawn(lambda: subprocess.Popen(argv, preexec_fn=prepare, **options))


def _without_a_copy(argv: list[str], death_signal: signal.Signals, env: Mapping[str, str] | None) -> list[str] | None:
    """Return the command line with which setpriv(1) does what `prepare_child` does, or None where it cannot.

    Without a function between fork and exec the child borrows our memory (vfork), and the kernel copies no page table:
    1 ms of CPU time instead of 27 in a process that has collected all tests.
    """
    ignored = any(signal.getsignal(number) is signal.SIG_IGN for number in _ASKED_FOR)
    path = (os.environ if env is None else env).get("PATH")
    if _SETPRIV is None or ignored or shutil.which(argv[0], path=path) is None:
        return None
    return [_SETPRIV, "--pdeathsig", death_signal.name, "--", *argv]


def prepare_child(death_signal: signal.Signals, terminal: bool) -> Callable[[], None]:
    """Return what the child does between fork and exec: no imports, no locks, no logging."""
    parent = os.getpid()

    def prepare() -> None:
        for number in _ASKED_FOR:
            signal.signal(number, signal.SIG_DFL)
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
            if os.getppid() != parent:  # it died before we asked
                os._exit(127)
        if terminal:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    return prepare


class _Spawner:
    """A thread that starts all processes and ends only with us.

    PR_SET_PDEATHSIG fires when the *thread* that forked ends: a process started from a pool's thread would be killed
    with that thread, in the middle of a test.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], subprocess.Popen[bytes]], Future[subprocess.Popen[bytes]]]] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._run, daemon=True, name="spawner").start()

    def __call__(self, start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        future: Future[subprocess.Popen[bytes]] = Future()
        self._work.put((start, future))
        return future.result()

    def _run(self) -> None:
        while True:
            start, future = self._work.get()
            try:
                future.set_result(start())
            except BaseException as error:
                future.set_exception(error)
            del start, future


_spawn = _Spawner()
