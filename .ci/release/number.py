"""The version: in one place, `arcbridge/__init__.py`, and in the files that programs without Python read.

`set_version` moves all of them (`make number VERSION=0.2.0`); `check` says whether a tag can release what is there. The
changelog's words are people's: nothing here writes it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
_SOURCE: Final = ("arcbridge/__init__.py", r'(?m)^(__version__ = ")([^"]+)(")$')
PLACES: Final = (
    _SOURCE,
    ("Dockerfile", r"(?m)^(ARG VERSION=)(\S+)()$"),
    ("config/helm/arcbridge-agent/Chart.yaml", r"(?m)^(version: )(\S+)()$"),
    ("config/helm/arcbridge-agent/Chart.yaml", r"(?m)^(appVersion: )(\S+)()$"),
    ("config/helm/arcbridge-relay/Chart.yaml", r"(?m)^(version: )(\S+)()$"),
    ("config/helm/arcbridge-relay/Chart.yaml", r"(?m)^(appVersion: )(\S+)()$"),
    ("config/prometheus/rules.yaml", r"(runbook_url: https://\S+/v)([0-9][^/]*)(/)"),
    ("config/kubernetes/base/kustomization.yaml", r"(?m)^( *newTag: )(\S+)()$"),
    ("config/kubernetes/relay/kustomization.yaml", r"(?m)^( *newTag: )(\S+)()$"),
)
"""File, and a pattern with the version as its second group."""
_VERSION: Final = re.compile(r"\d+\.\d+\.\d+((a|b|rc)\d+)?")


def version(root: Path = ROOT) -> str:
    """Return the version of the tree at `root`."""
    return _found(root, *_SOURCE)


def set_version(number: str, root: Path = ROOT) -> list[str]:
    """Write `number` to each of PLACES and return their paths. Raises `ValueError` for what is no version."""
    if not _VERSION.fullmatch(number):
        raise ValueError(f"{number!r} is no version: give it as make number VERSION=0.2.0 (or 0.2.0rc1)")
    for path, pattern in PLACES:
        _found(root, path, pattern)
        file = root / path
        file.write_text(re.sub(pattern, rf"\g<1>{number}\g<3>", file.read_text()))
    return sorted({path for path, _ in PLACES})


def notes(number: str, root: Path = ROOT) -> str:
    """Return what the changelog says of a version. Raises `ValueError` where it does not name it with a date."""
    sections = re.split(r"(?m)^## ", (root / "CHANGELOG.md").read_text())[1:]
    for section in sections:
        heading, _, text = section.partition("\n")
        if re.fullmatch(rf"{re.escape(number)} \(\d{{4}}-\d\d-\d\d\)", heading) and text.strip():
            return text.strip() + "\n"
    raise ValueError(f"CHANGELOG.md has no section `## {number} (YYYY-MM-DD)`: a release says what is new, and its day")


def check(tag: str, root: Path = ROOT) -> str:
    """Return the version that `tag` releases. Raises `ValueError` where the tree is not that version in every place."""
    number = version(root)
    if tag != f"v{number}":
        raise ValueError(f"the tag {tag!r} is not v{number}, the version of {_SOURCE[0]}")
    for path, pattern in PLACES:
        if (found := _found(root, path, pattern)) != number:
            raise ValueError(f"{path} says {found} where {_SOURCE[0]} says {number}: make number VERSION={number}")
    notes(number, root)
    return number


def _found(root: Path, path: str, pattern: str) -> str:
    found = re.search(pattern, (root / path).read_text())
    if found is None:
        raise ValueError(f"{path} names no version any more: see PLACES in .ci/release/number.py")
    return found[2]


if __name__ == "__main__":
    try:
        print("\n".join(set_version(sys.argv[1])))
    except ValueError as error:
        sys.exit(f"error: {error}")
