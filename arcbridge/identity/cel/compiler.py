"""Compiles the expressions of an AuthenticationConfiguration: parses, checks types, and checks what Kubernetes checks.

The library parses and type-checks; the functions and variables that Kubernetes has beside CEL's own are declared to it.
What kube-apiserver refuses besides when it loads a file is refused here: literals
that are no timestamp, duration or regular expression, lists and maps of mixed types, formats that do not fit their
arguments, constants that cannot be computed. Invariant: what is answered can be evaluated without the library, except
for regular expressions.
"""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from typing import Any

from cel_expr_python import cel

from arcbridge.identity.cel import formatting, regex, syntax
from arcbridge.identity.cel.evaluation import COST_LIMIT, Evaluation, Run, TimeLimit, build
from arcbridge.identity.cel.functions import ORDER, OVERLOADS
from arcbridge.identity.cel.values import Claims, EvaluationError, LimitExceeded, Memory, Value

_NAMED_TYPES = ("net.IP", "net.CIDR")
"""The types of Kubernetes that an expression can name, as in `type(x) == net.IP`."""

USER_TYPE = "kubernetes.UserInfo"
"""The type of the variable `user`."""
MAX_LENGTH = 100_000
"""Characters of an expression: the bound of kube-apiserver's parser."""
_LITERAL = re.compile(r"""(?s)(\"{3}|'{3})(?:\\.|[^\\])*?\1|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|//[^\n]*""")
"""Texts and comments. A backtick outside them quotes a field's name for the library, and is an error in Kubernetes."""
_MESSAGE = re.compile(r"ERROR: <input>:(\d+):(\d+): (.*)")
_EXISTS_ONE = re.compile(
    rf"{_LITERAL.pattern}|(?P<macro>\bexists_one)(?=\s*\(\s*[A-Za-z_]\w*\s*,\s*[A-Za-z_]\w*\s*,)", re.ASCII
)
"""`exists_one` with two variables. Kubernetes takes it as another name of `existsOne`; the library knows that alone."""
_UNDEFINED_FIELD = f"expression of type '{USER_TYPE}' cannot be the operand of a select operation"
_FIELD = re.compile(r"\.\s*+(?:\?\s*+)?(\w+)", re.ASCII)
_USER_PRESENCE = re.compile(
    rf"{_LITERAL.pattern}|\bhas\s*\(\s*user\s*\.\s*(?P<field>username|uid|groups|extra)\s*\)", re.ASCII
)


class ExpressionError(Exception):
    """An expression cannot be used. `line` and `column` count from 1 in the expression; 0: the whole of it."""

    def __init__(self, message: str, line: int = 0, column: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.line = line
        self.column = column


class Expression:
    """A compiled expression. It holds no state of an evaluation, so that several threads may evaluate it."""

    __slots__ = ("_read", "_run", "_selected", "_variable")

    def __init__(self, variable: str, checked: syntax.CheckedExpression, run: Run) -> None:
        self._variable = variable
        self._run = run
        self._read, self._selected = _fields_read(checked, variable)

    def evaluate(
        self, value: Claims, limit: int = COST_LIMIT, time_limit: TimeLimit | None = None, memory: Memory | None = None
    ) -> tuple[Value, int]:
        """Return the result, with `claims` or `user` as `value`, and what it cost.

        Raises EvaluationError, or LimitExceeded where it would cost more than `limit`, take longer than
        `time_limit` or make larger values than `memory` has left.
        """
        state = Evaluation({self._variable: value}, limit, time_limit, memory)
        try:
            return self._run(state), state.cost
        except RecursionError as error:
            raise LimitExceeded("a claim is nested too deeply", permanent=True) from error

    def selects(self, field: str) -> bool:
        """Return whether the expression reads `claims.field` or `claims.?field`; by Kubernetes' rule no other form."""
        return field in self._selected

    def may_read(self, field: str) -> bool:
        """Return whether the result may depend on `claims.field`: it is read in any form, or a name is computed, or the
        claims are used as a whole."""
        return None in self._read or field in self._read

    def names(self, field: str) -> bool:
        """Return whether the expression itself names `claims.field`, in any form."""
        return field in self._read


def compile_claims(source: str, *, rule: bool = False) -> Expression:
    """Compile an expression on `claims`; the result of a `rule` must be a bool. Raises ExpressionError."""
    return _compile(source, "claims", rule)


def compile_user(source: str) -> Expression:
    """Compile a rule on `user`. Raises ExpressionError."""
    return _compile(source, "user", True)


def functions() -> list[dict[str, Any]]:
    """Return the declarations of all overloads that the library does not have, as its configuration has them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for one in OVERLOADS:
        if one.result:
            overload: dict[str, Any] = {"id": f"k8s {one}", "return": _type(one.result)}
            if one.receiver:
                overload["target"] = _type(one.receiver)
            overload["args"] = list(map(_type, one.arguments))
            found.setdefault(one.name, []).append(overload)
    return [{"name": name, "overloads": overloads} for name, overloads in found.items()]


def _type(signature: str) -> dict[str, Any]:
    if signature.startswith("~"):
        return {"type_name": signature[1:], "is_type_param": True}
    name, bracket, inner = signature.partition("<")
    if not bracket:
        return {"type_name": name}
    parameters = inner[:-1].split(",", 1) if name == "map" else [inner[:-1]]
    return {"type_name": name, "params": list(map(_type, parameters))}


@lru_cache(maxsize=2)
def environment(variable: str) -> Any:
    """Return the environment of expressions on `claims`, a map of strings to `any`, as Kubernetes declares it, or on
    `user`, whose fields are declared by their paths and so have their types."""
    strings = cel.Type.List(cel.Type.STRING)
    variables = {
        "claims": {"claims": cel.Type.Map(cel.Type.STRING, cel.Type("any"))},
        "user": {
            "user": cel.Type.AbstractType(USER_TYPE),
            "user.username": cel.Type.STRING,
            "user.uid": cel.Type.STRING,
            "user.groups": strings,
            "user.extra": cel.Type.Map(cel.Type.STRING, strings),
        },
    }
    config = {
        "name": "kubernetes",
        "extensions": [{"name": name} for name in ("optional", "sets", "lists", "two-var-comprehensions")],
        # `functions` declares these, because Kubernetes has more overloads of them: the library takes a function once.
        "stdlib": {"exclude_functions": [{"name": name} for name in ("string", *ORDER)]},
        "functions": functions(),
        "variables": [{"name": name, "type_name": "type", "params": [{"type_name": name}]} for name in _NAMED_TYPES],
    }
    return cel.NewEnv(config=cel.NewEnvConfigFromYaml(json.dumps(config)), variables=variables[variable])


def _compile(source: str, variable: str, rule: bool) -> Expression:
    if len(source) > MAX_LENGTH:
        raise ExpressionError(f"longer than {MAX_LENGTH} characters")
    if "`" in _LITERAL.sub("", source):
        raise ExpressionError("unsupported syntax: '`'")
    try:
        source.encode()
        # As long as it was, so that every place in it stays where it is.
        known = _EXISTS_ONE.sub(lambda found: "existsOne " if found["macro"] else found[0], source)
        serialized = environment(variable).compile(known).serialize()
    except RuntimeError as error:
        raise _compile_error(str(error), source, variable) from None
    except UnicodeEncodeError as error:
        raise ExpressionError("not valid Unicode") from error
    try:
        checked = syntax.read(serialized)
        _Checks(source, checked).run(rule)
        run = _built(source, checked)
    except RecursionError:
        raise ExpressionError("nested too deeply") from None
    return Expression(variable, checked, run)


def _compile_error(text: str, source: str, variable: str) -> ExpressionError:
    """Return the error of a source that the library does not compile, in words that an operator can act on."""
    if "recursion" in text:
        return ExpressionError("nested deeper than the parser goes, which is 32 levels")
    match = _MESSAGE.search(text)
    if match is None:
        return ExpressionError(text.removeprefix("INVALID_ARGUMENT: ").partition(" [")[0].partition("\n")[0])
    # The library counts columns from 1, and marks what comes at the end one further.
    message, line, column = match[3], int(match[1]), int(match[2])
    if message == _UNDEFINED_FIELD:
        field = _FIELD.search(source.split("\n")[line - 1], column - 1)
        message = f"undefined field{f' {field[1]!r}' if field else ''}: a user has username, uid, groups and extra"
    elif variable == "user":
        # The checker takes the presence of a field for the field, which is no bool, and complains of what is around it.
        for found in _USER_PRESENCE.finditer(source):
            if found["field"]:
                before = source[: found.start("field")]
                line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
                return ExpressionError(_presence_message(f"user.{found['field']}"), line, column)
    return ExpressionError(message, line, column)


def _presence_message(name: str) -> str:
    return f"has({name}) is not carried out here: every user has the field"


def _built(source: str, checked: syntax.CheckedExpression) -> Run:
    try:
        return build(checked.root, checked.type_of)
    except (EvaluationError, LimitExceeded) as error:
        raise ExpressionError(str(error)) from error


def _read_by(node: syntax.Node) -> tuple[syntax.Node, object, bool] | None:
    """Return the operand and the field that a node reads, and whether it selects it (`.field`, `.?field`); the field is
    no text where it is computed."""
    if isinstance(node, syntax.Select):
        return node.operand, node.field, True
    if not isinstance(node, syntax.Call) or node.target is not None or len(node.arguments) != 2:
        return None
    if node.function not in ("_?._", "_[_]", "_[?_]", "@in"):
        return None
    operand, name = reversed(node.arguments) if node.function == "@in" else node.arguments
    return operand, name.value if isinstance(name, syntax.Literal) else None, node.function == "_?._"


def _fields_read(checked: syntax.CheckedExpression, variable: str) -> tuple[frozenset[str | None], frozenset[str]]:
    """Return the fields of `variable` that are named, and those that are selected; None is among the first where
    another one may be read as well."""
    found: set[str | None] = set()
    selected: set[str] = set()
    by_name: set[int] = set()
    nodes = list(syntax.descendants(checked.root))
    for read_by in map(_read_by, nodes):
        if read_by is not None:
            operand, field, selects = read_by
            if isinstance(operand, syntax.Identifier) and operand.name == variable and isinstance(field, str):
                found.add(field)
                by_name.add(id(operand))
                if selects:
                    selected.add(field)
    if any(isinstance(node, syntax.Identifier) and node.name == variable and id(node) not in by_name for node in nodes):
        found.add(None)
    return frozenset(found), frozenset(selected)


class _Checks:
    """The checks of one expression beyond its types; each raises ExpressionError at the node that is wrong."""

    __slots__ = ("_checked", "_source")

    def __init__(self, source: str, checked: syntax.CheckedExpression) -> None:
        self._source = source
        self._checked = checked

    def run(self, rule: bool) -> None:
        """Carry out all of them; a `rule` must be a bool."""
        root = self._checked.root
        exempt = self._in_formats(root)
        for node in syntax.descendants(root):
            if isinstance(node, syntax.Call):
                self._literals(node)
                self._format(node)
                self._flattened(node)
            elif isinstance(node, syntax.Literal) and isinstance(node.value, float) and math.isinf(node.value):
                raise self._error(node, "invalid double literal")
            elif isinstance(node, syntax.Identifier):
                self._presence(node)
                self._whole_user(node)
            elif isinstance(node, syntax.MessageLiteral):
                raise self._error(node, f"messages such as {node.name} are not carried out here")
            elif isinstance(node, syntax.ListLiteral) and node.id not in exempt:
                self._same_types([(item, index in node.optional) for index, item in enumerate(node.elements)])
            elif isinstance(node, syntax.MapLiteral) and node.id not in exempt:
                self._same_types([(entry.key, False) for entry in node.entries])
                self._same_types([(entry.value, entry.optional) for entry in node.entries])
        if rule and self._checked.type_of(root).name != syntax.BOOL:
            raise ExpressionError("must evaluate to bool")

    def _error(self, node: syntax.Node, message: str) -> ExpressionError:
        position = self._checked.positions.get(node.id, 0)
        before = self._source[:position]
        line = before.count("\n")
        return ExpressionError(message, line + 1, position - (before.rfind("\n") + 1) + 1)

    def _literals(self, call: syntax.Call) -> None:
        arguments = call.arguments
        if not arguments or not isinstance(arguments[0], syntax.Literal):
            return
        pattern = arguments[0].value
        try:
            if call.function in ("timestamp", "duration"):
                build(call, self._checked.type_of)
            elif call.function in ("matches", "find", "findAll"):
                regex.check(pattern if isinstance(pattern, str) else "")
        except EvaluationError:
            raise self._error(arguments[0], f"invalid {call.function} argument") from None

    def _presence(self, node: syntax.Identifier) -> None:
        # The checker reads `has(user.uid)` as `user.uid`; only the node's place, at the dot or not, tells them apart.
        position = self._checked.positions.get(node.id, 0)
        if "." in node.name and node.name.startswith("user.") and self._source[position : position + 1] != ".":
            raise self._error(node, _presence_message(node.name))

    def _whole_user(self, node: syntax.Identifier) -> None:
        # Only the fields are compared with kube-apiserver's results. A macro's variable may have the same name.
        if node.name == "user" and self._checked.type_of(node).name == USER_TYPE:
            raise self._error(node, "user is carried out here by its fields alone: username, uid, groups and extra")

    def _in_formats(self, root: syntax.Node) -> set[int]:
        """Return the ids of all nodes inside calls of `format`, whose arguments may be of mixed types."""
        return {
            inner.id
            for node in syntax.descendants(root)
            if isinstance(node, syntax.Call) and node.function == "format"
            for inner in syntax.descendants(node)
            if inner is not node
        }

    def _same_types(self, items: list[tuple[syntax.Node, bool]]) -> None:
        expected: syntax.Type | None = None
        for node, optional in items:
            found = self._checked.type_of(node)
            if optional and found.parameters:
                found = found.parameters[0]
            if expected is None:
                expected = found
            elif not _equivalent(expected, found):
                raise self._error(node, f"expected type '{expected}' but found '{found}'")

    def _format(self, call: syntax.Call) -> None:
        if (
            call.function != "format"
            or not isinstance(call.target, syntax.Literal)
            or not isinstance(call.target.value, str)
        ):
            return
        if len(call.arguments) != 1 or not isinstance(call.arguments[0], syntax.ListLiteral):
            return
        arguments = call.arguments[0].elements
        try:
            clauses = [clause for clause in formatting.clauses(call.target.value) if clause.kind]
        except EvaluationError as error:
            raise self._error(call, str(error)) from None
        for index, clause in enumerate(clauses):
            if index >= len(arguments):
                raise self._error(call, f"index {index} out of range")
            wrong = self._unformattable(arguments[index], formatting.ACCEPTED[clause.kind], deep=clause.kind == "s")
            if wrong is not None:
                kind = self._checked.type_of(wrong)
                raise self._error(wrong, f"error during formatting: %{clause.kind} does not take the type {kind}")
        if len(arguments) > len(clauses):
            raise self._error(call, f"too many arguments supplied to string.format (expected {len(clauses)})")

    def _flattened(self, call: syntax.Call) -> None:
        # The library takes any list, Kubernetes one whose elements may be lists.
        if call.function == "flatten" and call.target is not None and not call.arguments:
            inner = self._checked.type_of(call.target).parameters
            if inner and inner[0].name not in ("list", "dyn", "any"):
                raise self._error(call, f"flatten() takes no list of {inner[0]}: none of its elements is a list")

    def _unformattable(self, node: syntax.Node, accepted: frozenset[str], *, deep: bool) -> syntax.Node | None:
        """Return the node, of `node` and what is inside it, that a clause does not take."""
        if self._checked.type_of(node).name not in accepted:
            return node
        if not deep or not isinstance(node, syntax.ListLiteral | syntax.MapLiteral):
            return None
        for inner in syntax.children(node):
            wrong = self._unformattable(inner, accepted, deep=True)
            if wrong is not None:
                return wrong
        return None


def _equivalent(left: syntax.Type, right: syntax.Type) -> bool:
    if left.name != right.name or len(left.parameters) != len(right.parameters):
        return False
    return all(map(_equivalent, left.parameters, right.parameters))
