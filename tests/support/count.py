"""Counts lines of code of folders of Python: `python -m tests.support.count arcbridge`.

A line counts when a token stands on it that is neither a comment nor a docstring; blank lines do not count.
"""

from __future__ import annotations

import ast
import collections
import sys
import tokenize
from pathlib import Path

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def lines(file: Path) -> int:
    """Return how many lines of code a file has."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            docstrings.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    code: set[int] = set()
    with tokenize.open(file) as source:
        for token in tokenize.generate_tokens(source.readline):
            if token.type not in LAYOUT:
                code.update(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings)


def main(roots: list[str]) -> None:
    """Print the lines of each root, and of the folders in it down to the second level."""
    for root in map(Path, roots):
        folders: collections.Counter[str] = collections.Counter()
        for file in root.rglob("*.py"):
            folders["/".join(file.relative_to(root).parts[:-1][:2]) or "."] += lines(file)
        print(f"{folders.total():7} {root}")
        for folder, count in folders.most_common():
            print(f"{count:11} {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
