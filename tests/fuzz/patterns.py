"""Finds each regular expression of the package, and texts on which a backtracking matcher takes more than linear time.

A text is pumped at each repeat of a pattern: what stands before the repeat, then a character that the repeat takes,
many times, then something that the rest of the pattern does not take. A bounded repeat that takes 64 characters or more
is tried as if it had no bound: `[^\\s]{0,512}\\Z`, looked for from each position, takes 512 steps for each character.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from re import _compiler, _constants, _parser
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "arcbridge"

BOUND = 64
"""A repeat of at least as many is pumped as if it had no end."""
SHORT, LONG = 1500, 6000
"""Characters of the two texts that are compared."""
MOST_GROWTH = 9.0
"""Times more work for LONG: four is linear, sixteen quadratic."""
LEAST_SECONDS = 0.004
"""CPU seconds below which a text is no matter."""
PATIENCE = 1.0
"""CPU seconds after which a text has proved its point: a backtracking matcher looks for signals."""

_CALLS = ("compile", "match", "fullmatch", "search", "sub", "subn", "split", "findall", "finditer")
_ANYWHERE = ("search", "sub", "subn", "split", "findall", "finditer")
_SAMPLES = "aA0_- .:/\t=\"'\\,%+&e@\n\r!~*#<[({x5"
_BREAKERS = ("", "\0", "!", "\n", "é")


@dataclass(frozen=True, slots=True)
class Expression:
    """One regular expression of the package."""

    place: str
    """`arcbridge.module:NAME`, or `arcbridge.module:function` for one that is written where it is used."""
    pattern: re.Pattern[Any]
    anywhere: bool
    """Whether it is looked for at each position of a text."""


def expressions() -> Iterator[Expression]:
    """Yield those of module constants, and those that are literals in calls of `re`."""
    sources = {file: file.read_text(encoding="utf-8") for file in sorted(PACKAGE.rglob("*.py"))}
    package = "\n".join(sources.values())
    for file, source in sources.items():
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(source)
        constants = {
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name) and node.value is not None and "re.compile" in ast.unparse(node.value)
        }
        for name in sorted(constants):
            value = getattr(importlib.import_module(module), name)
            if isinstance(value, re.Pattern):
                used = re.findall(rf"\b{name}\.({'|'.join(_ANYWHERE)})\(", source if name.startswith("_") else package)
                yield Expression(f"{module}:{name}", value, bool(used))
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for call in ast.walk(function):
                if (found := _literal(call)) is not None:
                    yield Expression(f"{module}:{function.name}", *found)


def unread() -> list[str]:
    """Return the calls of `re` within functions whose pattern is no literal."""
    return [
        f"{file.relative_to(ROOT).as_posix()}: {ast.unparse(call)}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for call in ast.walk(function)
        if _is_call(call) and _literal(call) is None
    ]


def _is_call(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "re"
        and node.func.attr in _CALLS
    )


def _literal(node: ast.AST) -> tuple[re.Pattern[Any], bool] | None:
    if not _is_call(node):
        return None
    assert isinstance(node, ast.Call)
    assert isinstance(node.func, ast.Attribute)
    if not isinstance(node.args[0], ast.Constant):
        return None
    named = [one for one in ast.walk(node) if isinstance(one, ast.Attribute) and one.attr.isupper()]
    flags = 0
    for one in named:
        flags |= getattr(re, one.attr, 0)
    return re.compile(node.args[0].value, flags), node.func.attr in _ANYWHERE


# -- texts ------------------------------------------------------------------------------------------------------------


def texts(pattern: re.Pattern[Any]) -> Iterator[tuple[str, str, str]]:
    """Yield a beginning, a pump and an end for each repeat without a bound."""
    text = pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode("latin-1")
    seen: set[tuple[str, str]] = set()
    for before, body in _repeats(_parser.parse(text, pattern.flags & ~re.LOCALE), ""):
        for pump in dict.fromkeys(_pumps(body)):
            if pump and (before, pump) not in seen:
                seen.add((before, pump))
                for end in _BREAKERS:
                    yield before, pump, end
                    if before:
                        yield "", before + pump, end


def _repeats(tree: Any, before: str) -> Iterator[tuple[str, Any]]:
    """Yield each repeat with what a text needs to come to it."""
    for kind, value in tree:
        if kind in (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT):
            _, most, body = value
            if most >= BOUND:
                yield before, body
            yield from _repeats(body, before)
        elif kind == _constants.BRANCH:
            for branch in value[1]:
                yield from _repeats(branch, before)
        elif kind == _constants.SUBPATTERN:
            yield from _repeats(value[3], before)
        elif kind in (_constants.ASSERT, _constants.ASSERT_NOT):
            yield from _repeats(value[1], before)
        elif kind == _constants.ATOMIC_GROUP:
            yield from _repeats(value, before)
        before += _sample([(kind, value)])


def _pumps(body: Any) -> Iterator[str]:
    if len(body) == 1 and body[0][0] in (_constants.IN, _constants.ANY, _constants.NOT_LITERAL):
        yield from _taken(body[0])[:6]
    else:
        yield _sample(body)
        for kind, value in body:
            if kind == _constants.BRANCH:
                yield from (_sample(branch) for branch in value[1])
            elif kind == _constants.IN:
                yield from _taken((kind, value))[:4]


def _sample(tree: Any) -> str:
    """Return a short text that a pattern takes."""
    out = ""
    for kind, value in tree:
        if kind == _constants.LITERAL:
            out += chr(value)
        elif kind in (_constants.IN, _constants.ANY, _constants.NOT_LITERAL):
            out += _taken((kind, value))[0]
        elif kind in (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT):
            out += _sample(value[2]) * value[0]
        elif kind == _constants.BRANCH:
            out += _sample(value[1][0])
        elif kind == _constants.SUBPATTERN:
            out += _sample(value[3])
        elif kind == _constants.ATOMIC_GROUP:
            out += _sample(value)
        elif kind == _constants.ASSERT and value[0] < 0:
            out += _sample(value[1])  # what must stand before
    return out


def _taken(one: Any) -> list[str]:
    """Return the characters that one item of a pattern takes."""
    single = _compiler.compile(_tree([one]))
    found = [char for char in _SAMPLES if single.fullmatch(char)]
    return found or [chr(code) for code in range(0x2100) if single.fullmatch(chr(code))][:3] or ["a"]


def _tree(items: list[Any]) -> Any:
    return _parser.SubPattern(_parser.State(), items)


# -- work -------------------------------------------------------------------------------------------------------------


def unbounded(pattern: re.Pattern[Any]) -> Any:
    """Compile a pattern whose long repeats have no bound any more."""
    tree = _parser.parse(pattern.pattern, pattern.flags & ~re.DEBUG)

    def lift(items: Any) -> None:
        for at, (kind, value) in enumerate(items):
            if kind in (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT):
                least, most, body = value
                lift(body)
                items[at] = (kind, (least, _constants.MAXREPEAT if most >= BOUND else most, body))
            elif kind == _constants.BRANCH:
                for branch in value[1]:
                    lift(branch)
            elif kind == _constants.SUBPATTERN:
                lift(value[3])
            elif kind in (_constants.ASSERT, _constants.ASSERT_NOT):
                lift(value[1])
            elif kind == _constants.ATOMIC_GROUP:
                lift(value)

    lift(tree)
    return _compiler.compile(tree, pattern.flags & ~re.DEBUG)


def out_of_proportion(expression: Expression) -> str:
    """Return a text on which the work of an expression grows more than linearly; empty where none was found."""
    lifted = unbounded(expression.pattern)
    nothing = expression.pattern.pattern[:0]
    run = functools.partial(lifted.sub, nothing) if expression.anywhere else lifted.fullmatch
    for begin, pump, end in texts(expression.pattern):
        short, long = (_made(expression, begin, pump, end, size) for size in (SHORT, LONG))
        more = _seconds(run, long, 1)
        if more < LEAST_SECONDS:
            continue
        if more == float("inf"):
            return f"{begin!r} + {pump!r} × n + {end!r}: more than {PATIENCE} s for {LONG} characters"
        less = _seconds(run, short, 1)
        if more > MOST_GROWTH * less:  # tried again: others use the machine, too
            less, more = _seconds(run, short, 4), _seconds(run, long, 3)
        if more > MOST_GROWTH * less:
            times = f"{LONG // SHORT} times the text is {more / less:.0f} times the work"
            return f"{begin!r} + {pump!r} × n + {end!r}: {times}"
    return ""


def _made(expression: Expression, begin: str, pump: str, end: str, size: int) -> Any:
    text = begin + pump * (size // len(pump)) + end
    return text if isinstance(expression.pattern.pattern, str) else text.encode("latin-1", "replace")


def _seconds(run: Any, text: Any, repeats: int) -> float:
    """Return the CPU seconds of one run, the least of some; infinity where a run was cut off."""

    def over(*_: object) -> None:
        raise TimeoutError

    former = signal.signal(signal.SIGPROF, over)
    best = float("inf")
    try:
        for _ in range(repeats):
            signal.setitimer(signal.ITIMER_PROF, PATIENCE)
            begin = time.thread_time()  # that of the process has steps of milliseconds while the timer runs
            run(text)
            best = min(best, time.thread_time() - begin)
    except TimeoutError:
        pass
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, former)
    return best
