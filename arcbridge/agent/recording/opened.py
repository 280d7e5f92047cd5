"""Finds recordings in audit logs, checks their files, and opens them with a recipient's identity.

An agent does none of this: it is for the machine of a person who has the identity, and needs no agent's settings. The
audit log says which files there are and what their SHA-256 is; a file says by itself only whether it broke off.
Invariant: what is yielded was sealed to a recipient that the identity belongs to, member by member; that members were
neither left out nor exchanged is what the SHA-256 says (`compare`).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from arcbridge.agent.recording.sealed_file import ENDING, PART, members, sealed_part, sha256_of
from arcbridge.audit.query import Wanted, find_records
from arcbridge.errors import ConfigError, SealingError
from arcbridge.sealing.age import open_sealed, parse_identities
from arcbridge.sealing.recipients import AgeIdentity

MAX_IDENTITY: Final = 1024 * 1024
"""Bytes of a file with identities."""

_WHOSE: Final = ("user", "namespace", "name", "container", "command")

Row = dict[str, object]


def find_recordings(files: Iterable[Path], user: str = "", since: str = "") -> Iterator[Row]:
    """Yield the recordings of which audit logs have a record, the oldest first. Raises ConfigError.

    `user`: whose; `since`: RFC 3339. Both empty: all.
    """
    begun: dict[object, dict[str, object]] = {}
    """Of requests without a record of their recording: one that was left behind has no other word on whose it is."""
    for fields in find_records(files, Wanted()):
        stage, request = fields.get("stage"), fields.get("request")
        if stage == "begun" and fields.get("subresource") in ("exec", "attach"):
            begun[request] = {key: fields[key] for key in _WHOSE if key in fields}
        elif stage == "recorded":
            row = _row({**begun.get(request, {}), **fields})
            if row["file"]:  # else the start of an agent may still find it
                begun.pop(request, None)
            if (not user or row["user"] == user) and (not since or str(row["time"]) >= since):
                yield row


def _row(fields: dict[str, object]) -> Row:
    recording = fields.get("recording")
    found = recording if isinstance(recording, dict) else {}
    command = fields.get("command")
    return {
        "time": fields.get("ts", ""),
        "user": fields.get("user", ""),
        "pod": f"{fields.get('namespace', '')}/{fields.get('name', '')}",
        "container": fields.get("container", ""),
        "command": " ".join(map(str, command)) if isinstance(command, list) else "",
        "seconds": found.get("seconds"),
        "bytes": found.get("bytes"),
        "exit": found.get("exit"),
        "failure": found.get("failure", ""),
        "file": found.get("file", ""),
        "sha256": found.get("sha256", ""),
    }


@dataclass(frozen=True, slots=True)
class Difference:
    """A file that is not what the audit log says."""

    file: str
    kind: str
    """`changed`, `unknown` (no record names it), or `missing`."""
    text: str


def compare(paths: Sequence[Path], recorded: Iterable[Row]) -> tuple[int, list[Difference]]:
    """Compare files, and all recordings in directories, with their records; return how many are as they were, and the
    differences. Raises ConfigError for a path that cannot be read.

    A recording is missing where a directory is given and neither it nor any other path has the file, those included
    that went to a bucket: a directory stands for all of them.
    """
    wanted = {str(row["file"]).rpartition("/")[2]: row for row in recorded if row["file"]}
    found: list[Difference] = []
    seen: set[str] = set()
    good = 0
    for path in _files(paths):
        seen.add(path.name)
        row = wanted.get(path.name)
        try:
            digest, _ = sha256_of(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        if row is None:
            found.append(Difference(str(path), "unknown", "no record of these audit logs names it"))
        elif digest != row["sha256"]:
            found.append(Difference(str(path), "changed", f"its SHA-256 is {digest}, and was {row['sha256']}"))
        else:
            good += 1
    if any(path.is_dir() for path in paths):
        for name, row in wanted.items():
            if name not in seen:
                found.append(Difference(name, "missing", f"{row['user']} in {row['pod']}, finished {row['time']}"))
    return good, found


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        yield from sorted(path.rglob("*" + ENDING))


def unfinished(paths: Iterable[Path]) -> list[Path]:
    """Return the files in directories that are still written, or that an agent has left and not finished."""
    return sorted(one for path in paths if path.is_dir() for one in path.rglob("*" + ENDING + PART))


def read_identities(path: Path) -> list[AgeIdentity]:
    """Read a file of age identities. Raises ConfigError, SealingError."""
    try:
        with path.open("rb") as file:
            return parse_identities(file.read(MAX_IDENTITY))
    except OSError as error:
        raise ConfigError(f"--identity: {path} cannot be read: {error.strerror}") from error


def open_recording(path: Path, identities: Sequence[AgeIdentity]) -> Iterator[bytes]:
    """Yield the text of a recording in portions, up to its end or to where it broke off. Raises ConfigError,
    SealingError."""
    any_member = False
    try:
        with path.open("rb") as file:
            for member in members(file):
                any_member = True
                yield from open_sealed(io.BytesIO(sealed_part(member)).read, identities)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if not any_member:
        raise SealingError(f"{path} is no recording: it has the ending {ENDING}, or {ENDING}{PART} while it is written")
