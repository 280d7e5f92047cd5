"""A docstring says what a module or a function does: a module is no question, and a function begins with an imperative.

`Return the next deadline` and not `The next deadline`: a reader sees at once what is a value and what an action.
Properties are values and keep their nouns; callbacks that return nothing may say what happened when they are called.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "arcbridge"

# Words with which no imperative begins.
NOUNS = frozenset(
    ("A", "All", "An", "Another", "Any", "Both", "Bytes", "Each", "Every", "Everything", "How", "No", "Nothing", "One",
     "Rows", "Seconds", "The", "This", "Two", "What", "When", "Where", "Whether", "Which", "Whom", "Who", "Why")
)  # fmt: skip


def of_functions(source: str) -> Iterator[tuple[str, int, str]]:
    """Find each function that returns a value and is no property: its name, line and docstring."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("__"):
            continue
        returns = "" if node.returns is None else ast.unparse(node.returns)
        decorators = {ast.unparse(one).rpartition(".")[2] for one in node.decorator_list}
        if returns not in ("", "None", "NoReturn") and not decorators & {"property", "cached_property"}:
            yield node.name, node.lineno, ast.get_docstring(node) or ""


def begins_with_noun(docstring: str) -> bool:
    return bool(docstring) and re.split(r"[\s,:;.]", docstring)[0] in NOUNS


def test_functions_say_what_they_do() -> None:
    wrong, seen = [], 0
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        for function, line, docstring in of_functions(file.read_text(encoding="utf-8")):
            seen += bool(docstring)
            if begins_with_noun(docstring):
                wrong.append(f"{name}:{line} {function}: {docstring.splitlines()[0]}")
    assert seen > 1000
    assert not wrong, "say what they do (`Return the …`):\n" + "\n".join(wrong)


def test_the_check_finds_what_it_should() -> None:
    source = '''
class Part:
    @property
    def size(self) -> int:
        """The size."""
    def count(self) -> int:
        """The count."""
    def fits(self) -> bool:
        """Return whether it fits."""
    def closed(self) -> None:
        """The part is over."""
async def read() -> bytes:
    """Whether, and what."""
'''
    assert [name for name, _, docstring in of_functions(source) if begins_with_noun(docstring)] == ["read", "count"]


QUESTION = re.compile(r"(What|Which|How|When|Who|Whose|Whom|Whether|Where|Why)\b")


def test_no_docstring_of_a_module_is_a_question() -> None:
    found = [
        file.relative_to(PACKAGE).as_posix().removesuffix(".py")
        for file in PACKAGE.rglob("*.py")
        if QUESTION.match(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "")
    ]
    assert not found, "say what the module does, in a sentence"
