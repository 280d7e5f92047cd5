"""Regular expressions: RE2, as in kube-apiserver, through the library's own engine, which runs in linear time.

Python's `re` would be another language and could run for hours. The library has `matches` and, in its extension for
regular expressions, `regex.extract` and `regex.extractAll`; an extraction gives the whole match where the pattern has
no capturing group, so the groups of a pattern are made non-capturing first.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from cel_expr_python import cel

from arcbridge.identity.cel.values import EvaluationError, LimitExceeded, StringList

_CONFIG = """
name: regex
extensions:
  - name: optional
  - name: regex
"""


@lru_cache(maxsize=1)
def _programs() -> dict[str, Any]:
    environment = cel.NewEnv(
        config=cel.NewEnvConfigFromYaml(_CONFIG), variables={"s": cel.Type.STRING, "p": cel.Type.STRING}
    )
    return {
        "matches": environment.compile("s.matches(p)"),
        "find": environment.compile("regex.extract(s, p).orValue('')"),
        "all": environment.compile("regex.extractAll(s, p)"),
    }


MAX_WORK = 50_000_000
"""The bound of a pattern's weight times a text's length. A match at the bound takes 0.1 s: RE2's slowest engine takes
20 ns for each state and character, and the library does not let other threads run meanwhile."""
_REPETITION = re.compile(r"\{(\d+)(?:,(\d*))?\}")


@lru_cache(maxsize=256)
def weight(pattern: str) -> int:
    """Return an upper bound of a pattern's states: its length times its repetitions, which RE2 bounds by 1,000
    together."""
    repeated = 1
    for match in _REPETITION.finditer(pattern):
        repeated *= max(1, *(int(count[:5]) for count in match.groups() if count))
        if repeated >= 1000:
            return len(pattern) * 1000
    return len(pattern) * repeated


_NOT_OF_GO = re.compile(r"\\Q(?:(?!\\E).)*+|\\(?P<escaped>.)|\(\?P?<\w*+(?P<name>[^\w>=!])", re.DOTALL | re.ASCII)


@lru_cache(maxsize=256)
def _is_foreign(pattern: str) -> bool:
    """Return whether a pattern has what Go's engine refuses and the library takes: `\\C`, names in other scripts."""
    return any(found["escaped"] == "C" or found["name"] for found in _NOT_OF_GO.finditer(pattern))


def _run(name: str, text: str, pattern: str) -> Any:
    if _is_foreign(pattern):
        raise EvaluationError("not a regular expression")
    if weight(pattern) * len(text) > MAX_WORK:
        raise LimitExceeded("a regular expression is too expensive for this text", permanent=True)
    try:
        result = _programs()[name].eval(data={"s": text, "p": pattern})
        if result.type() == cel.Type.ERROR:
            raise EvaluationError("not a regular expression")
        return result.plain_value()
    except (RuntimeError, UnicodeEncodeError) as error:
        raise EvaluationError("not a regular expression") from error


def matches(text: str, pattern: str) -> bool:
    """Return whether `pattern` matches somewhere in `text`. Raises EvaluationError for what is no pattern."""
    return bool(_run("matches", text, pattern))


def check(pattern: str) -> None:
    """Raise EvaluationError unless `pattern` is a regular expression."""
    matches("", pattern)


def find(text: str, pattern: str) -> str:
    """Return the first match, or "". Raises EvaluationError."""
    return str(_run("find", text, without_groups(pattern)))


def find_all(text: str, pattern: str, limit: int = -1) -> StringList:
    """Return all matches, at most `limit` of them unless it is negative. Raises EvaluationError.

    A pattern that matches the empty text is refused: the library leaves out empty matches, and kube-apiserver does not.
    """
    if matches("", pattern):
        raise EvaluationError("findAll with a pattern that matches the empty text is not carried out here")
    found = [str(item) for item in _run("all", text, without_groups(pattern))]
    return StringList(found if limit < 0 else found[:limit])


_PART = re.compile(
    r"\\Q(?:(?!\\E).)*+(?:\\E)?|\\.|\[\^?\]?(?:\[:\^?[a-z]*+:\]|\\.|[^\]\\])*+\]?|\((?P<group>\?P?<\w++>|(?!\?))",
    re.DOTALL | re.ASCII,
)
"""A quoted text, an escape, a class of characters (of which a bracket that comes first is one), or a capturing group's
beginning."""


@lru_cache(maxsize=256)
def without_groups(pattern: str) -> str:
    """`pattern` with its capturing groups made non-capturing; what it matches stays the same."""
    return _PART.sub(lambda part: part[0] if part["group"] is None else "(?:", pattern)
