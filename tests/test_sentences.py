"""No sentence decides anything: what one part has to know of another one's refusal is a field, a code or a class.

A sentence is for people and may be improved any day. The check reads the source: it finds each place that searches,
splits or compares an attribute that holds a sentence, or the text of an exception.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "arcbridge"
SENTENCES = frozenset({"message", "reason", "detail", "text", "told"})
NAMES = frozenset({"message", "words", "sentence"})
SEARCHES = frozenset(
    {
        "startswith",
        "endswith",
        "find",
        "rfind",
        "index",
        "rindex",
        "count",
        "partition",
        "rpartition",
        "split",
        "rsplit",
    }
)
PATTERNS = frozenset({"search", "match", "fullmatch", "findall", "finditer"})

# Where a text is read after all. A message about settings begins with the path of one (`limits.sessions: …`).
_PATH = "the path of a setting, with which a message about settings begins"
READERS: dict[str, str] = {
    "agent/settings.py: message.partition(':')": _PATH,
    "identity/authentication.py: error.message.partition(': ')": _PATH,
    "identity/policy.py: message.partition(':')": _PATH,
    "settings/problems.py: _SETTING.match(error.message)": _PATH,
    "settings/problems.py: message.startswith((f'{root}:', f'{root}.', f'{root}[', f'{root} '))": _PATH,
    "agent/kube/own_refusal.py: _FORBIDDEN.match(message)": "a Status of Kubernetes names the refused user in no field",
    "settings/toml_lines.py: _AT.search(message)": "tomllib says the place of a mistake in no other way",
    "cli/parser.py: message.partition('the following arguments are required: ')": "argparse has no codes",
    "cli/parser.py: message.endswith(': ')": "argparse has no codes",
    "client/doctor/relay_hops.py: error.reason != 'TLSV1_ALERT_NO_APPLICATION_PROTOCOL'": "OpenSSL's name of an alert",
    "client/serving/pod_ports/tunnel.py: 'connection refused' in str(error).lower()": "a kubelet has no code for it",
    "net/dialer.py: 'uthentication' in str(error)": "python-socks has no code for it",
}


def decisions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Find the line, and the text, of each decision by a sentence."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            searched = node.func.attr in SEARCHES and is_sentence(node.func.value)
            if searched or (node.func.attr in PATTERNS and any(is_sentence(one) for one in node.args)):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            number = isinstance(node.left, ast.Constant) and isinstance(node.left.value, int)
            contained = isinstance(node.ops[0], ast.In | ast.NotIn) and is_sentence(sides[1]) and not number
            if contained or (any(map(is_sentence, sides)) and any(map(is_text, sides))):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Match) and is_sentence(node.subject):
            yield node.lineno, f"match {ast.unparse(node.subject)}"


def is_sentence(node: ast.expr) -> bool:
    """Return whether an expression is an attribute that holds a sentence, or the text of an exception."""
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id == "str":
            return any(isinstance(one, ast.Name) and one.id in ("error", "exception", "failure") for one in node.args)
        # What is made of a sentence is still one: `error.message.lower()`.
        return isinstance(node.func, ast.Attribute) and is_sentence(node.func.value)
    if isinstance(node, ast.Name):
        return node.id in NAMES
    return isinstance(node, ast.Attribute) and node.attr in SENTENCES


def is_text(node: ast.expr) -> bool:
    """Return whether an expression is a text of some length, or a row of such: `error.message == ""` asks for none."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return any(map(is_text, node.elts))
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and bool(node.value) and isinstance(node.value, str)
    )


def test_no_sentence_decides() -> None:
    found = [
        f"{file.relative_to(PACKAGE).as_posix()}: {text}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if file.name != "legacy_refusals.py"
        for _, text in decisions(ast.parse(file.read_text(encoding="utf-8")))
    ]
    wrong = [one for one in found if one not in READERS]
    assert not wrong, "decides by a sentence: give it a field, a code or a class\n" + "\n".join(wrong)
    assert set(READERS) <= set(found), "a reader that is no more"


def test_the_check_finds_what_it_should() -> None:
    found = """
error.message.startswith("a session lasts")
error.message.lower().endswith("(issuer.keys)")
"cannot impersonate" in facts.message
name not in error.detail
error.message == "revoked"
f"{path}: x" != error.message
held.reason in ("secret", "subject")
re.search("expired", error.text)
_KNOWN.match(str(error))
message.partition(": ")
match error.message:
    case "revoked": pass
"""
    assert [line for line, _ in sorted(decisions(ast.parse(found)))] == list(range(2, 13))
    right = """
error.message == ""
error.code == GoawayCode.REVOKED
error.refusal.rule is RefusalRule.TOKEN_EXP
path.startswith("/")
message.subject.rpartition(".")
log.warning("refused", reason=error.message)
line.text.encode()
4 in message
"""
    assert not list(decisions(ast.parse(right)))
