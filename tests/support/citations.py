"""Which tests a page names for a claim or for a class of attack, and whether they exist.

`python -m tests.support.citations C1` prints the tests of one entry as pytest takes them.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path
from typing import Final, NamedTuple

from tests.support import pages

ROOT: Final = Path(__file__).resolve().parents[2]
THREATS: Final = ROOT / "docs" / "threats.md"
SECURITY: Final = ROOT / "docs" / "security.md"

_TEST: Final = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
_ROW: Final = re.compile(r'^\| <a id="([A-Z]\d+)"></a>\1 \|(.*)\|$', re.MULTILINE)
_CLAIM: Final = re.compile(r'^<a id="(C\d+)"></a>\*\*\1\. (.+?)(?=^<a id=|^## |\Z)', re.MULTILINE | re.DOTALL)


class Class(NamedTuple):
    """A class of a file of tests, as far as names of tests ask for it."""

    name: str
    methods: frozenset[str]
    bases: tuple[str, ...]


@functools.cache
def rows() -> list[tuple[str, str]]:
    """Code and cells of each row of docs/threats.md."""
    return _ROW.findall(pages.read(THREATS))


@functools.cache
def claims() -> list[tuple[str, str]]:
    """Code and text of each claim of docs/security.md."""
    return _CLAIM.findall(pages.read(SECURITY))


def tests(text: str) -> list[tuple[str, str]]:
    """File and name of each test that a text cites; the name is empty where the whole file is meant."""
    return _TEST.findall(text)


def missing(text: str) -> list[str]:
    """Say which of the tests that a text cites do not exist."""
    found = []
    for path, name in tests(text):
        file = ROOT / path
        if not file.is_file():
            found.append(f"{path} does not exist")
        elif name and not re.search(rf"\b(def|class) {name}\b", file.read_text(encoding="utf-8")):
            found.append(f"{path} has no {name}")
    return found


def source(path: str, name: str) -> str:
    """The text of a cited test, with its parameters."""
    text = (ROOT / path).read_text(encoding="utf-8")
    found = next(node for node in ast.walk(ast.parse(text)) if getattr(node, "name", "") == name)
    assert isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef)
    begin = min(node.lineno for node in (found, *found.decorator_list))
    return "\n".join(text.splitlines()[begin - 1 : found.end_lineno])


def arguments(code: str) -> list[str]:
    """The tests of an entry as arguments of pytest. Raises `KeyError` for a code that neither page has."""
    text = dict([*rows(), *claims()])[code]
    return list(dict.fromkeys(node for path, name in tests(text) for node in _nodes(ROOT / path, name)))


def _nodes(file: Path, name: str) -> list[str]:
    """How pytest names a test: by its class too where it is in one, and by the classes that derive from a suite's."""
    if not name:
        return [_node(file)]
    for owner in _classes(file):
        if owner.name == name:
            return [_node(file, name)]
        if name in owner.methods:
            if file.name.startswith("test_"):
                return [_node(file, owner.name, name)]
            return [
                _node(other, derived.name, name)
                for other in sorted(file.parent.glob("test_*.py"))
                for derived in _classes(other)
                if owner.name in derived.bases
            ]
    return [_node(file, name)]


@functools.cache
def _classes(file: Path) -> list[Class]:
    """The classes of a file, which is parsed once however many citations lead to it."""
    return [
        Class(
            node.name,
            frozenset(part.name for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)),
            tuple(map(ast.unparse, node.bases)),
        )
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    ]


def _node(file: Path, *names: str) -> str:
    return "::".join([file.relative_to(ROOT).as_posix(), *names])


if __name__ == "__main__":
    try:
        print(" ".join(arguments(sys.argv[1])))
    except KeyError:
        sys.exit(f"error: neither docs/security.md nor docs/threats.md has {sys.argv[1]}")
