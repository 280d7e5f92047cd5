"""`bundle`: one file for a report of a fault, alike for the three roles.

Doctor, check of the settings and lists are this program's own commands, run as a user would run them, so that there is
one implementation of each, and one that hangs can be ended. What of it is let into the file is for `arcbridge.bundle`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from shutil import which

from arcbridge.bundle.archive import pack, try_directory, write_new
from arcbridge.bundle.contents import Contents
from arcbridge.bundle.log_lines import last_lines, read_lines
from arcbridge.bundle.sources import BUDGET, FILE, OUTPUT, Collector, SourceFailed, listing, read_tail, versions
from arcbridge.checks.running import read_page
from arcbridge.cli.output import plain, print_note, print_prose
from arcbridge.cli.parser import Invocation
from arcbridge.cli.screen import Waiting
from arcbridge.cli.settings import read_settings
from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.errors import ConfigError, ExitCode, StateError
from arcbridge.installation import program
from arcbridge.settings.flags import AGENT, CLIENT, RELAY, flags_of
from arcbridge.settings.user_directories import user_directory
from arcbridge.units import rfc3339, size
from arcbridge.untrusted_json import read_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_COMMANDS = {
    CLIENT: ("config check", "status", "doctor"),
    RELAY: ("config check", "ca status", "cluster list", "session list", "policy list", "doctor"),
    AGENT: ("config check", "ca status", "doctor"),
}
"""The commands whose documents are in the bundle of a role; the one that takes longest is the last."""
_DEADLINES = {"doctor.json": 60.0}
"""Seconds. A doctor waits for each thing that does not answer."""
_VARIABLES = ("HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "https_proxy", "all_proxy", "no_proxy", "KUBECONFIG",
              "SSL_CERT_FILE", "KUBERNETES_SERVICE_HOST", "ARCBRIDGE_CONFIG")  # fmt: skip
"""Variables of which the bundle says that they are set, besides those of flags."""


def bundle(invocation: Invocation) -> int:
    """Write the file, and say where it is, what is not in it, and what to look at."""
    if invocation.text("token"):
        raise ConfigError("flag --token: give the token in a file with --token-file, or in ARCBRIDGE_TOKEN")
    now = time.time()
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    name = invocation.text("archive") or f"arcbridge-{invocation.role}-{stamp}.tar.gz"
    if name != "-" and os.path.lexists(name):
        raise StateError(f"{name} is there already, and a bundle replaces nothing: give another name")
    if name != "-":
        try_directory(Path(name))
    elif sys.stdout.isatty():
        raise ConfigError("a terminal cannot take a bundle: give a file, or send standard output to one (`- > FILE`)")
    # So that what was started is ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored under nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    asked = _Sources(invocation)
    with Waiting(sys.stderr, "Collecting …", BUDGET):
        files, missing = asked.collector.collect(asked.readers(), _DEADLINES)
    manifest = {
        "made": rfc3339(now),
        "role": invocation.role,
        "without_names": invocation.switch("without_names"),
        "bytes": {file: len(data) for file, data in files.items()},
        "missing": missing,
        "log_lines_left_out": asked.strange,
    }
    packed = pack({"manifest.json": _encoded(manifest), **files}, now)
    if name == "-":
        sys.stdout.buffer.write(packed)
    else:
        write_new(Path(name), packed)
    say = print_note if name == "-" else print_prose
    names = (
        "Names of users, groups and clusters are numbers in it, and texts that may have one are left out."
        if manifest["without_names"]
        else "Names of users, clusters, hosts and paths are in it; --without-names leaves them out."
    )
    say(
        f"{'Standard output' if name == '-' else plain(name)} has the bundle ({size(len(packed))}).\n"
        + "".join(f"Not in it: {file}: {plain(reason)}\n" for file, reason in missing.items())
        + f"There is no token, no key, and no content of your files in it. {names} Before you send it, unpack it "
        f"(`tar -xzf {'FILE' if name == '-' else plain(name)}`) and look at log.jsonl, doctor.json and settings.json.\n"
    )
    return ExitCode.DONE


def _encoded(document: Any) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()


class _Sources:
    """The sources of one role's bundle."""

    def __init__(self, invocation: Invocation) -> None:
        self._invocation = invocation
        self._contents = Contents(without_names=invocation.switch("without_names"))
        self.collector = Collector(self._contents)
        self.strange = 0
        """Lines of the log that are left out."""
        self._config: Any = None

    def readers(self) -> dict[str, Callable[[], bytes]]:
        """Return what reads each file, in the order in which they are asked: settings first, because others need
        them."""
        return {
            "versions.json": lambda: _encoded(versions()),
            "settings.json": self._settings,
            "state.json": self._listing,
            "metrics.txt": self._metrics,
            "log.jsonl": self._log,
            **{f"{command.replace(' ', '-')}.json": partial(self._command, command)
               for command in _COMMANDS[self._invocation.role]},
        }  # fmt: skip

    def _settings(self) -> bytes:
        self._config, wrong = read_settings(self._invocation, os.environ)
        known = {*_VARIABLES, *(flag.variable for flag in flags_of(self._invocation.role))}
        document = {"mistakes": len(wrong), "settings": self._contents.settings(self._config)}
        return _encoded({**document, "variables_set": sorted(known.intersection(os.environ))})

    def _setting(self) -> Any:
        if self._config is None:
            raise SourceFailed("the settings could not be read")
        return self._config

    def _listing(self) -> bytes:
        config, role = self._setting(), self._invocation.role
        if role == RELAY:
            found = {"data_dir": config.data_dir}
        elif role == AGENT:
            found = {"state.directory": config.state.directory}
        elif config.state_dir is not None:
            found = {"state_dir": config.state_dir}
        else:
            found = {kind: user_directory(kind, os.environ) for kind in ("state", "cache")}
        if None in found.values():
            raise SourceFailed("the settings name no directory")
        return _encoded(listing(found, self._contents))

    def _metrics(self) -> bytes:
        listen = self._setting().observe.listen
        if not listen:
            raise SourceFailed("observe.listen is not set, so that no metrics are served")
        page = asyncio.run(read_page(listen, "/metrics"))
        if page is None or not (text := self._contents.metrics(page.text)):
            raise SourceFailed("nothing of arcbridge answers at observe.listen")
        return text.encode()

    def _log(self) -> bytes:
        text, self.strange = read_lines(self._log_bytes(), self._contents)
        if not text:
            raise SourceFailed(f"it has no line ({self.strange} of other programs); --log FILE names its file")
        return last_lines(text, FILE)

    def _log_bytes(self) -> bytes:
        given = self._invocation.text("log")
        files: list[int | Path] = [0 if given == "-" else Path(given)] if given else []
        if not given and self._invocation.role == CLIENT:
            log = Path(BackgroundPaths.find(os.environ).log)
            files = [one for one in (log.with_name(f"{log.name}.1"), log) if one.exists()]
        elif not given and which("journalctl"):
            unit = f"--unit=arcbridge-{self._invocation.role}"
            return self.collector.run(("journalctl", unit, "--lines=5000", "--output=cat", "--quiet"), os.environ)[0]
        data = b""
        for file in files:
            # Without a buffer, whose lock a thread that hangs would hold at the end of the process.
            with open(file, "rb", buffering=0, closefd=file != 0) as opened:
                data += read_tail(opened)
        return data

    def _command(self, command: str) -> bytes:
        """Return the document of one of this role's commands."""
        given = ((flag, self._invocation.given.get(flag.dest)) for flag in flags_of(self._invocation.role))
        flags = [
            flag.long if one is True else f"{flag.long}={one}"
            for flag, value in given
            if value is not None and flag.dest != "role"
            for one in (value if isinstance(value, list) else [value])
        ]
        # The role is in the environment, because `status` takes no flag of it.
        environment = {**os.environ, "ARCBRIDGE_ROLE": self._invocation.role}
        output, errors = self.collector.run([*program(), *command.split(), *flags, "-o", "json"], environment)
        try:
            document = read_json(output, OUTPUT)
        except ValueError as error:
            # Other programs write there too, as that of a login. The command's own error is the last; a Traceback takes
            # its place where the command is to be verbose.
            lines = [one for one in errors.splitlines() if one.startswith(("error:", "Traceback "))]
            said = lines[-1] if lines and lines[-1].startswith("error:") else ""
            raise SourceFailed(self._contents.text(said) or "it printed no document") from error
        return _encoded(self._contents.document(command, document))
