"""The machines of a page's reader: directories of this one, with a loopback address for the one that others dial.

What a test replaces in a command, and nothing else, is in `Machines.replaced`. In place of SSH between the machines a
stand-in for `scp` copies between the directories. Everything else is real.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import ssl
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.readme.blocks import Block, missing
from tests.readme.recording import COLUMNS, ROWS, Recording
from tests.support.layered_machine import ENVIRONMENT, LayeredMachine
from tests.support.processes import ManagedProcess, ProcessFailed
from tests.support.reports import until

ROOT = Path(__file__).resolve().parents[2]
_SCP = """\
#!/bin/sh
# Copies between the directories that stand for machines: HOST:arcbridge/PATH is PATH of the one that others dial.
set -eu
here=$PWD
for to; do :; done
while [ $# -gt 1 ]; do
    (cd {vm} && cp "${{1#*:arcbridge/}}" "$here/$to")
    shift
done
"""


class Machines:
    """The machines of one page. Use as a context manager; all that was started ends with it."""

    def __init__(
        self,
        directory: Path,
        kubectl: Path,
        *,
        dialled: str,
        replaced: dict[str, str],
        names: Iterable[str],
        path: str = str(Path(sys.executable).parent),
        issuer_ca: Path | None = None,
        environment: Mapping[str, str] | None = None,
        recording: Recording | None = None,
        layered: Mapping[str, LayeredMachine] | None = None,
    ) -> None:
        """`dialled` is the machine whose files `scp` copies; `replaced` is what a command says -> what is run.

        `path` is where `arcbridge` is, and `issuer_ca` the CA of the issuer's page if the reader did not start one;
        `environment` is what a reader's machine has besides. `recording` hears what `run_command` runs to its end.
        `layered`: those machines that are more than a directory; a command of theirs begins in root's home, and finds
        what that machine has installed.
        """
        self.replaced = replaced
        self.recording = recording
        self._directory = directory
        self._environment = dict(environment or {})
        self._running: dict[str, list[ManagedProcess]] = {}
        self._last: ManagedProcess | None = None
        self._layered = dict(layered or {})
        self._issuer_ca = issuer_ca or self.at(dialled) / "issuer" / "ca.pem"
        programs = directory / "programs"
        programs.mkdir()
        (programs / "kubectl").symlink_to(kubectl)
        (programs / "scp").write_text(_SCP.format(vm=shlex.quote(str(self.at(dialled)))))
        (programs / "scp").chmod(0o755)
        self._path = os.pathsep.join([str(programs), path, os.environ["PATH"]])
        for name in names:
            (self.at(name) / "home").mkdir(parents=True)
            for part in ("config", "tests"):  # a clone, as far as commands use it
                (self.at(name) / part).symlink_to(ROOT / part)

    def at(self, name: str) -> Path:
        """Return the directory of a machine, which is a clone of the repository for the reader."""
        return self._directory / name

    def running(self, name: str) -> ManagedProcess:
        """Return the process of a machine that was started last, of those that stay."""
        return self._running[name][-1]

    @property
    def output(self) -> str:
        """What the last command has written."""
        assert self._last is not None
        return self._last.output()

    def run(self, block: Block) -> None:
        """Do what a block says. Raises AssertionError that names the block."""
        if block.kind == "not run":
            return
        if block.kind == "shows":
            self._compare(block)
            return
        process = self.run_command(block, block.text)
        self._last = process
        assert block.stays or process.returncode == 0, f"{block.place}: {process.tail()}"

    def run_command(self, block: Block, text: str) -> ManagedProcess:
        """Run a command as its mark says, to its end or until what is waited for, and return its process."""
        if block.ends:
            self._interrupt(block.machine)
        process = self._start(block, text)
        if block.types:
            process.wait_for_line(re.escape(block.after), timeout=30)
            process.send(f"{self._replace(block.types)}\n")
        if block.logs_in:
            self._log_in(process)
        if block.stays:
            process.wait_for_line(re.escape(block.until), timeout=60)
            self._running.setdefault(block.machine, []).append(process)
        else:
            process.wait(120)
        return process

    def _replace(self, text: str) -> str:
        for said, run in self.replaced.items():
            text = text.replace(said, run)
        return text

    def _start(self, block: Block, text: str) -> ManagedProcess:
        text = self._replace(text)
        directory = self.at(block.machine)
        environment: dict[str, str | None] = dict.fromkeys(
            (name for name in os.environ if name.startswith("XDG_") or name == "COLUMNS"), None
        )
        environment |= {
            "PATH": self._path,
            "HOME": str(directory / "home"),
            "KUBECONFIG": None,
            # A free port instead of 47011, which another test may have.
            "ARCBRIDGE_PORT": "0",
            **self._environment,
        }
        argv = ["bash", "-euo", "pipefail", "-c", f"exec {text}" if block.stays else text]
        if layered := self._layered.get(block.machine):
            environment |= ENVIRONMENT
            argv = layered.command("env", "--chdir=/root", *argv)
        process = ManagedProcess(
            argv,
            log_dir=self._directory / "logs" / f"line-{block.line}",
            name=block.machine,
            env=environment,
            cwd=directory,
            terminal=(ROWS, COLUMNS),
            heard=self.recording.hear if self.recording and not block.stays else None,
        )
        if not (block.stays or block.types):
            process.close_stdin()
        return process

    def _compare(self, block: Block) -> None:
        assert self._last is not None, f"{block.place}: there is no block before it"
        process = self._last
        shown = self._replace(block.text)
        with contextlib.suppress(ProcessFailed):  # of a process that stays, some lines may come a moment later
            until(lambda: not (process.running and missing(shown, process.lines())), block.place, timeout=30)
        line = missing(shown, process.lines())
        assert not line, f"{block.place}: not shown: {line!r}\n{process.tail(60)}"

    def _log_in(self, process: ManagedProcess) -> None:
        """Do what the reader does: open the page, type the code, choose alice."""
        page = process.wait_for_line(r"open (https://\S+) in a browser", timeout=30)[1]
        code = process.wait_for_line(r"enter the code (\S+)", timeout=30)[1]
        context = ssl.create_default_context(cafile=self._issuer_ca)
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        form = urllib.parse.urlencode({"user_code": code, "user": "alice"}).encode()
        with opener.open(page, form, timeout=30) as answer:
            assert answer.status == 200

    def _interrupt(self, machine: str) -> None:
        """Type Ctrl-C in every terminal of a machine, the last one first."""
        for process in reversed(self._running.pop(machine, [])):
            process.signal(signal.SIGINT)
            process.wait(60)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for processes in reversed(self._running.values()):
            for process in reversed(processes):
                process.stop()
