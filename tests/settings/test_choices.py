"""Each choice stands once: no other module types the words again."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from arcbridge.cli import commands
from arcbridge.settings import choices

PACKAGE = Path(choices.__file__).parents[1]
# A word that means nothing else is looked for alone, the others where two of them stand in one list.
WORDS = frozenset(choices.GRANTS)
LISTS = tuple(
    frozenset(words) for words in (choices.LOG_LEVELS, choices.LOG_FORMATS, choices.GRANT_TYPES, commands.LIST_OUTPUTS)
)
HOMES = {"settings/choices.py", "cli/commands.py"}


def retyped(source: str) -> Iterator[str]:
    """Find each grant that is written out, and each tuple, list or set with two words of one list of choices."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value in WORDS:
            yield str(node.value)
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            words = [item.value for item in node.elts if isinstance(item, ast.Constant)]
            if any(len(known.intersection(words)) > 1 for known in LISTS):
                yield ", ".join(map(str, words))


def test_no_module_writes_a_choice_out_again() -> None:
    found = {
        (name, words)
        for file in sorted(PACKAGE.rglob("*.py"))
        if (name := file.relative_to(PACKAGE).as_posix()) not in HOMES
        for words in retyped(file.read_text(encoding="utf-8"))
    }
    assert found == set()


def test_the_check_finds_what_it_should() -> None:
    assert list(
        retyped('a = "authcode"\nb = ("json", "yaml")\nc = ("info", "json")\n"""authcode, or device-code"""')
    ) == ["authcode", "json, yaml"]
