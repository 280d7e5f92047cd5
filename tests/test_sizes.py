"""The sizes of classes and functions stay within bounds, so that each can be read at once and tested alone.

A function's lines are those from `def` to its end without its docstring. An attribute is a slot, a field, or what a
method sets on `self`; a method is one that the class defines itself. `EXCEPTIONS` lists what is larger and why, and an
exception that is none any more fails too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1] / "arcbridge"

MOST = {"attributes": 29, "methods": 39, "lines": 60, "parameters": 10}

# What is larger: module, name, and what of it; and the reason.
EXCEPTIONS: dict[tuple[str, str, str], str] = {
    ("mux/stream", "StreamTransport", "methods"): "17 of them are the interface of an asyncio transport",
    ("net/tlstransport", "TlsTransport", "methods"): "17 of them are the interface of an asyncio transport",
    ("wire/decoder", "Decoder.feed", "lines"): "one loop over what a read brought: a part would be a call a frame",
}


class Size(NamedTuple):
    module: str
    name: str
    what: str
    size: int


def attributes(node: ast.ClassDef) -> set[str]:
    """Find the attributes of a class: its slots, its fields, and what its methods set on `self`."""
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and ast.unparse(inner.value) == "self":
            found.add(inner.attr)
        elif isinstance(inner, ast.Assign) and ast.unparse(inner.targets[0]) == "__slots__":
            found |= set(ast.literal_eval(inner.value))
    return found | {ast.unparse(field.target) for field in node.body if isinstance(field, ast.AnnAssign)}


def sizes(source: str, module: str = "") -> Iterator[Size]:
    """Find the sizes of all classes and functions, nested ones included."""

    def visit(parent: ast.AST, prefix: str) -> Iterator[Size]:
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.ClassDef):
                name = prefix + node.name
                methods = [one for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
                yield Size(module, name, "attributes", len(attributes(node)))
                yield Size(module, name, "methods", len(methods))
                yield from visit(node, f"{name}.")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = prefix + node.name
                assert node.end_lineno is not None
                first = node.body[0]
                documented = ast.get_docstring(node) is not None and first.end_lineno is not None
                docstring = first.end_lineno - first.lineno + 1 if documented else 0
                yield Size(module, name, "lines", node.end_lineno - node.lineno + 1 - docstring)
                if node.name == "__init__":
                    given = node.args
                    parameters = (*given.posonlyargs, *given.args, *given.kwonlyargs)
                    yield Size(module, name, "parameters", len(parameters) - 1)
                yield from visit(node, f"{name}.")
            else:
                yield from visit(node, prefix)

    yield from visit(ast.parse(source), "")


def all_sizes() -> Iterator[Size]:
    for file in sorted(PACKAGE.rglob("*.py")):
        yield from sizes(file.read_text(encoding="utf-8"), file.relative_to(PACKAGE).with_suffix("").as_posix())


def test_classes_and_functions_are_small() -> None:
    large = {(one.module, one.name, one.what): one.size for one in all_sizes() if one.size > MOST[one.what]}
    new = [f"{key}: {size}, and {MOST[key[2]]} at most" for key, size in large.items() if key not in EXCEPTIONS]
    assert not new, "larger than the bounds (cut them into parts with names of their own):\n" + "\n".join(new)
    gone = [str(key) for key in EXCEPTIONS if key not in large]
    assert not gone, "these exceptions are none any more; take them out:\n" + "\n".join(gone)
    assert all(EXCEPTIONS.values()), "an exception has a reason"


def test_the_check_finds_what_it_should() -> None:
    source = '''
class Part:
    __slots__ = ("a", "b")
    c: int = 0
    def __init__(self, x: int, *, y: int) -> None:
        """Two lines
        of a docstring do not count."""
        self.a = x
        self.d: int = y
        self.a.e = y
    @property
    def both(self) -> int:
        def inner() -> int:
            return 1
        return inner()
    class Inner:
        f: int
'''
    found = {(one.name, one.what): one.size for one in sizes(source)}
    assert found == {
        ("Part", "attributes"): 4,
        ("Part", "methods"): 2,
        ("Part.__init__", "lines"): 4,
        ("Part.__init__", "parameters"): 2,
        ("Part.both", "lines"): 4,
        ("Part.both.inner", "lines"): 2,
        ("Part.Inner", "attributes"): 1,
        ("Part.Inner", "methods"): 0,
    }
