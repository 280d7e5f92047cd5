"""A docstring says what a module or a function does: a module is no question, and a function begins with an imperative.

`Return the next deadline` and not `The next deadline`: a reader sees at once what is a value and what an action.
Properties are values and keep their nouns; callbacks that return nothing may say what happened when they are called.
A module of ours that a docstring or a comment names exists.
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


REFERENCE = re.compile(r"`([a-z_0-9]+(?:[./][A-Za-z_0-9]+)+)`")

NO_MODULES = {
    "arcbridge.io/managed": "a name in a kubeconfig file",
    "client.directory": "a setting",
    "net/netip": "a package of Go",
    "net/url": "a package of Go",
    "observe.listen": "a setting",
    "observe.log_format": "a setting",
    "observe.log_level": "a setting",
    "relay.questions": "a subject of NATS",
}


def missing(source: str, folder: Path = PACKAGE) -> list[str]:
    """Find the names in backticks that look like a module of ours, or a name in one, and lead nowhere."""
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    found = []
    for name in REFERENCE.findall(source):
        if name.endswith(".py"):
            exists = any((base / name).exists() for base in (folder, PACKAGE, PACKAGE.parent))
            exists = exists or ("/" not in name and any(PACKAGE.glob(f"*/{name}")))
        else:
            of_ours, parts = False, name.replace("/", ".").split(".")
            if parts[0] == PACKAGE.name:
                of_ours, parts = True, parts[1:]
            exists = name in NO_MODULES
            if of_ours or parts[0] in packages:
                exists = exists or _leads_somewhere(PACKAGE, parts)
            else:  # `session.Pacer`, of any module of this name; `session.max_age` is a setting
                homes = [] if parts[1].islower() else [path.parent for path in PACKAGE.rglob(f"{parts[0]}.py")]
                exists = exists or not homes or any(_leads_somewhere(home, parts) for home in homes)
        if not exists:
            found.append(name)
    return found


def _leads_somewhere(at: Path, parts: list[str]) -> bool:
    """Return whether a package has these parts: the names of packages, of a module, and then of what is in it."""
    for number, part in enumerate(parts):
        module = at / f"{part}.py"
        if module.exists():
            rest = parts[number + 1 :]
            return not rest or re.search(rf"\b{rest[0]}\b", module.read_text(encoding="utf-8")) is not None
        at /= part
        if not at.is_dir():
            return False
    return True


def test_modules_that_are_named_exist() -> None:
    lost = [
        f"{file.relative_to(PACKAGE).as_posix()}: {name}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for name in missing(file.read_text(encoding="utf-8"), file.parent)
    ]
    assert not lost, "name the module with its package:\n" + "\n".join(lost)


def test_the_check_finds_modules_that_are_gone() -> None:
    source = """
    `relay.http.server` `relay.api_server` `relay/pump.py` `relay/pumping.py` `relay.pump.Pumps` `relay.pump.Pipes`
    `net/urls` `net/url` `arcbridge.limiters` `arcbridge.relay.nothing` `asyncio.Lock` `settings.py` `client.directory`
    `pump.Pumps` `pump.Pipes` `session.max_age`
    """
    gone = "relay.api_server relay/pumping.py relay.pump.Pipes net/urls arcbridge.relay.nothing pump.Pipes"
    assert missing(source) == gone.split()
