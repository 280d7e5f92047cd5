"""Nothing in arcbridge/ is there for tests alone: each name of a module or class is read somewhere in it.

Names are compared and not types: a name is used where any code of the package reads one that is spelt so, or names it
in a text of one word (`getattr`). So what is found has no user; what is not found may still have none. For that, and
for readers, no two classes of the package have one name.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "arcbridge"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_NAMING = r"\S{1,200}|[a-z ]+ = \w+:\w+"
"""A word, or a sub-command and its function."""

# What a library calls or reads by its name, or what is read by a name that is put together.
FROM_OUTSIDE: dict[str, str] = {
    "_check_value": "argparse",
    "_missing_": "enum",
    "_create_connection": "aiohttp's connector",
    "_wrap_create_connection": "aiohttp's connector",
    "emit": "logging's handler",
    "print_help": "argparse",
    "get_protocol": "asyncio's transport",
    "get_write_buffer_limits": "asyncio's transport",
    "handle_error": "aiohttp's server",
    "log_debug": "aiohttp's server",
    "log_exception": "aiohttp's server",
    "makefile": "http.client",
    "yaml_implicit_resolvers": "PyYAML's loader",
    **{f"code_{number}xx": "`getattr(stats, f'code_{code}')` in agent/metrics.py" for number in range(1, 6)},
}


def defined(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Find what a module defines: functions, classes, constants, and methods, fields and attributes of classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, (*FUNCTIONS, ast.ClassDef)):
                    yield inner.name, inner.lineno
                elif isinstance(inner, ast.AnnAssign | ast.Assign):
                    targets = [inner.target] if isinstance(inner, ast.AnnAssign) else inner.targets
                    names = (name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
                    yield from ((name.id, inner.lineno) for name in names)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr, node.lineno


def used(tree: ast.Module) -> Iterator[str]:
    """Find the names that a module reads. An import alone is no use, and neither is a place in `__slots__`."""
    slots = {
        id(text)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__"
        for text in ast.walk(node.value)
    }
    for node in ast.walk(tree):
        if id(node) in slots:
            continue
        if isinstance(node, ast.Name | ast.Attribute) and not isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(_NAMING, node.value):
            yield from re.findall(r"\w+", node.value)


def unused(sources: dict[str, str]) -> list[str]:
    trees = {name: ast.parse(source) for name, source in sources.items()}
    known = {word for tree in trees.values() for word in used(tree)}
    return sorted(
        {
            f"{module}:{line} {name}"
            for module, tree in trees.items()
            for name, line in defined(tree)
            if name not in known and not re.fullmatch(r"__\w+__|_", name)
        }
    )


def test_everything_is_used() -> None:
    sources = {file.relative_to(PACKAGE).as_posix(): file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py")}
    found = unused(sources)
    wrong = [one for one in found if one.rpartition(" ")[2] not in FROM_OUTSIDE]
    assert not wrong, "read by nothing in arcbridge/: drop it, or say in FROM_OUTSIDE who reads it\n" + "\n".join(wrong)
    assert {one.rpartition(" ")[2] for one in found} == set(FROM_OUTSIDE)


def test_one_name_is_one_class() -> None:
    names = Counter(
        node.name
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    )
    assert {name for name, count in names.items() if count > 1} == set(), "name the classes apart"


def test_the_check_finds_what_it_should() -> None:
    one = """
from other import imported
LIMIT = 1
def called(): return LIMIT
def forgotten(): called()
class Part:
    __slots__ = ("count", "size")
    field: int
    def __init__(self):
        self.counted = 0
    def add(self):
        self.counted += 1
Part().add()
"""
    other = "def imported(): pass\nsize: int\ncount = getattr(1, 'size')\n"
    assert unused({"one": one, "other": other}) == [
        "one:10 counted", "one:12 counted", "one:5 forgotten", "one:8 field", "other:1 imported", "other:3 count",
    ]  # fmt: skip
