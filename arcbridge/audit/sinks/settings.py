"""Checks the settings of rotation and sinks, and looks at collectors and at what the sinks of a role have come to."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Final

from arcbridge.audit.sinks.collector import HTTP, STDOUT, SYSLOG, address_of, probe, token_of
from arcbridge.audit.sinks.http import ARRAY, LINES
from arcbridge.audit.sinks.sender import LATE, Sinks, words_of
from arcbridge.checks.diagnosis import Finding, failed, ok, warning
from arcbridge.errors import ConfigError
from arcbridge.settings import named_files
from arcbridge.settings.config import AuditFilesConfig, AuditSinkConfig
from arcbridge.settings.problems import Problems

MOST_SINKS: Final = 8
"""Each has a thread."""
LEAST_ROTATED: Final = 64 * 1024
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,32}")
_KINDS: Final[Mapping[str, frozenset[str]]] = {
    "ca_file": frozenset({HTTP, SYSLOG}),
    "certificate": frozenset({HTTP, SYSLOG}),
    "key": frozenset({HTTP, SYSLOG}),
    "address": frozenset({HTTP, SYSLOG}),
    **dict.fromkeys(("token_file", "token_scheme", "format", "gzip"), frozenset({HTTP})),
    **dict.fromkeys(("facility", "severity", "max_message", "close_notify"), frozenset({SYSLOG})),
}
"""For which kinds a setting is; one that is not here is for all."""
_BOUNDS: Final[Mapping[str, tuple[float, float]]] = {
    "facility": (0, 23),
    "severity": (0, 7),
    "max_message": (2048, 65536),
    "batch_records": (1, 10000),
    "batch_bytes": (1024, 16 * 1024**2),
    "interval": (0.1, 3600),
    "timeout": (1, 600),
}
_REMEDY: Final = "check the sink's table under [audit.sinks], the collector, and that this place may connect to it"
_LOOK: Final = 10.0
"""Seconds for a collector to answer a look."""
_UNREADABLE: Final = (
    "let the role's user read the file, or move it to another directory: its name is one of a rotated log"
)


def check_sinks(audit: AuditFilesConfig, file: str, problems: Problems) -> None:
    """Check what carries the records of the log `file` on, and what renames that."""
    if audit.rotate_bytes and audit.rotate_bytes < LEAST_ROTATED:
        problems.error("audit.rotate_bytes", f"must be at least {LEAST_ROTATED}, or 0 where logrotate renames the file")
    if audit.rotate_bytes and audit.keep_bytes < audit.rotate_bytes:
        problems.error("audit.keep_bytes", "must be at least audit.rotate_bytes")
    if file in ("", "-"):
        if audit.rotate_bytes:
            problems.error("audit.rotate_bytes", "renames a file: set audit.file to a path")
        if audit.sinks:
            problems.error("audit.sinks", "sinks carry on what a file holds: set audit.file to a path (to have records "
                           'on standard output too, give a sink of kind "stdout")')  # fmt: skip
    elif (audit.sinks or audit.rotate_bytes) and named_files.is_directory(Path(file).parent):
        setting = "audit.sinks" if audit.sinks else "audit.rotate_bytes"
        named_files.check_directory(problems, setting, Path(file).parent)
    if len(audit.sinks) > MOST_SINKS:
        problems.error("audit.sinks", f"{MOST_SINKS} at most; let a collector pass records on")
    for name, sink in audit.sinks.items():
        where = f"audit.sinks.{name}"
        with problems.collect(where):
            if _NAME.fullmatch(name) is None:
                raise ConfigError(f"{where}: a name has 1 to 32 letters, digits, - or _")
            _check_values(where, sink)
        _check_files(where, sink, problems)


def _check_values(where: str, sink: AuditSinkConfig) -> None:
    """Raise ConfigError where a value is none that works."""
    if sink.kind not in (HTTP, SYSLOG, STDOUT):
        raise ConfigError(f'{where}.kind: "{HTTP}", "{SYSLOG}" or "{STDOUT}" is needed')
    for one in fields(sink):
        value = getattr(sink, one.name)
        if value != one.default and sink.kind not in _KINDS.get(one.name, (sink.kind,)):
            raise ConfigError(f"{where}.{one.name}: is not for kind {sink.kind}; take it out")
        if one.name in _BOUNDS and not _BOUNDS[one.name][0] <= value <= _BOUNDS[one.name][1]:
            least, most = _BOUNDS[one.name]
            raise ConfigError(f"{where}.{one.name}: must be from {least:g} to {most:g}")
    if sink.format not in (LINES, ARRAY):
        raise ConfigError(f'{where}.format: "{LINES}" or "{ARRAY}" is needed')
    if re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}", sink.token_scheme) is None:
        raise ConfigError(f"{where}.token_scheme: is one word, such as Bearer")
    if sink.kind != STDOUT:
        try:
            address_of(sink)
        except ConfigError as error:
            raise ConfigError(f"{where}.address: {error.message}") from error


def _check_files(where: str, sink: AuditSinkConfig, problems: Problems) -> None:
    if sink.ca_file is not None:
        named_files.check_ca(problems, f"{where}.ca_file", sink.ca_file)
    named_files.check_pair(problems, (f"{where}.certificate", sink.certificate), (f"{where}.key", sink.key))
    if sink.token_file is not None:
        named_files.check_secret(problems, f"{where}.token_file", sink.token_file, missing="warning")


def sink_findings(sinks: Sinks) -> list[Finding]:
    """Return what each sink of this process has come to, and why the log's file cannot be renamed."""
    found = []
    if failure := sinks.rotation.failure:
        detail = f"the file cannot be renamed at audit.rotate_bytes ({failure}), and grows"
        found.append(failed("audit rotation", detail, "let the role's user write its directory", "audit_rotation"))
    for sender in sinks.senders:
        hop, lag = f"audit sink {sender.name}", sender.lag
        waits = f"{sender.waiting_bytes} bytes wait on disk, the oldest record for {lag:.0f} s"
        if sender.failure:
            remedy = _REMEDY if sender.readable else _UNREADABLE
            found.append(failed(hop, f"records are not delivered ({sender.failure}); {waits}", remedy, "audit_sink"))
        elif lag > LATE:
            found.append(warning(hop, f"it is late: {waits}", _REMEDY, "audit_sink_late"))
        else:
            found.append(ok(hop, f"{sender.delivered} records delivered"))
    return found


async def look_at_collectors(settings: Mapping[str, AuditSinkConfig]) -> list[Finding]:
    """Return whether each collector answers and is the one that is trusted; nothing is sent to it."""

    async def look(name: str, sink: AuditSinkConfig) -> Finding:
        hop = f"audit sink {name}"
        if sink.kind == STDOUT:
            return ok(hop, "it writes to standard output")
        if reason := await unreachable(sink):
            return failed(hop, reason, _REMEDY, "audit_sink")
        return ok(hop, "the collector answers, and is trusted")

    return await asyncio.gather(*(look(name, sink) for name, sink in settings.items()))


async def unreachable(sink: AuditSinkConfig) -> str:
    """Return why a collector cannot be sent to; empty where it answers, is trusted, and there is a token for it."""
    try:
        async with asyncio.timeout(_LOOK):
            await probe(sink)
        if sink.token_file is not None:
            token_of(sink.token_file)
    except Exception as error:
        return words_of(error)
    return ""
