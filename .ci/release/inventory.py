"""What the program shows of itself, found in its source: metrics, log events, and codes of what `doctor` finds.

A name counts where a call has it as a literal, or a table from which calls are made. `manual` makes tables of it. A
call whose name cannot be read fails, so that nothing is left out in silence.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

PACKAGE: Final = Path(__file__).resolve().parents[2] / "arcbridge"
ROLES: Final = ("client", "relay", "agent")
LEVELS: Final = ("error", "warning", "info")
"""Those that are logged without being asked for."""
_LEVEL_OF: Final = {"exception": "error"}
_LOGGERS: Final = re.compile(r"(?:^|\.)_?log$|^log(?:ger)?$|get_logger\(.*\)$")


@dataclass
class Metric:
    """One metric: its name without prefix, its labels with their values where those are constants, its help."""

    name: str
    kind: str
    help: str
    labels: dict[str, tuple[str, ...]]
    roles: set[str] = field(default_factory=set)


@dataclass
class Event:
    """One log event, with the levels and the fields that it has in any of its places."""

    name: str
    levels: set[str] = field(default_factory=set)
    fields: set[str] = field(default_factory=set)
    roles: set[str] = field(default_factory=set)


def metrics() -> list[Metric]:
    """Return the metrics of all roles, each once for the roles that register it, as they stand in the source."""
    found: dict[tuple[str, str], Metric] = {}
    for module in _modules():
        for kind, name, help, labels in module.metrics():
            one = found.setdefault((name, help), Metric(name, kind, help, labels))
            one.roles |= module.roles
    return list(found.values())


def events() -> list[Event]:
    """Return the log events in the order of their names."""
    found: dict[str, Event] = {}
    for module in _modules():
        for name, level, fields in module.events():
            one = found.setdefault(name, Event(name))
            one.levels.add(level)
            one.fields |= fields
            one.roles |= module.roles
    return [found[name] for name in sorted(found, key=str.lower)]


def codes() -> dict[str, dict[str, str]]:
    """Return, for the client's doctor and for that of relay and agent, the codes of findings with what to do."""
    found: dict[str, dict[str, str]] = {"client": {}, "operator": {}}
    for module in _modules():
        table = found["client" if module.roles == {"client"} else "operator"]
        for code, remedy in module.codes():
            table[code] = table.get(code) or remedy
    return {of: dict(sorted(table.items())) for of, table in found.items()}


@dataclass
class _Module:
    path: Path
    tree: ast.Module

    @property
    def roles(self) -> set[str]:
        """Return the roles that it is part of: what no role has for itself is part of all."""
        part = self.path.relative_to(PACKAGE).parts[0]
        if part in ROLES:
            return {part}
        return {"relay", "agent"} if part == "audit" else set(ROLES)

    @property
    def name(self) -> str:
        return ".".join(("arcbridge", *self.path.relative_to(PACKAGE).with_suffix("").parts))

    @functools.cached_property
    def names(self) -> dict[str, Any]:
        """What the module's expressions may name."""
        return dict(vars(importlib.import_module(self.name)))

    def codes(self) -> Iterator[tuple[str, str]]:
        """Return codes of findings with what to do, from the module's tables, its pairs, and the findings it makes."""
        tables = [
            self.names.get("_REMEDIES", {}),
            {row[0]: row[2] for row in self.names.get("_EXPLAINED", {}).values()},
        ]
        for code, remedy in (pair for table in tables for pair in table.items()):
            yield from remedy.items() if isinstance(remedy, dict) else [(code, remedy)]
        for one in ast.walk(self.tree):
            if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) in ("code, remedy", "(code, remedy)"):
                yield tuple(self.value(one.value, {}))
        for call, known in self.calls:
            if _last(call.func) in ("failed", "warning", "make") and len(call.args) == 4:
                for text in _choices(call.args[3]):
                    code, remedy = self.value(text, known), self.value(call.args[2], known)
                    if isinstance(code, str):
                        yield code, remedy if isinstance(remedy, str) else ""

    @functools.cached_property
    def calls(self) -> list[tuple[ast.Call, dict[str, ast.expr]]]:
        """Every call, with what is assigned in the innermost function that it stands in."""
        found: list[tuple[ast.Call, dict[str, ast.expr]]] = []

        def look(node: ast.AST, known: dict[str, ast.expr]) -> None:
            for one in ast.iter_child_nodes(node):
                if isinstance(one, ast.Call):
                    found.append((one, known))
                look(one, known | _assigned(one) if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) else known)

        look(self.tree, {})
        return sorted(found, key=lambda one: one[0].lineno)

    def metrics(self) -> Iterator[tuple[str, str, str, dict[str, tuple[str, ...]]]]:
        for call, known in self.calls:
            called = _last(call.func)
            if called not in ("counter", "gauge", "histogram") or len(call.args) < 4:
                continue
            name, help = self.value(call.args[0], known), self.value(call.args[1], known)
            if isinstance(name, str):
                yield called, name, str(help), self.labels(call.args[2], known)
                continue
            rows = [
                one for one in self.tree.body if isinstance(one, ast.AnnAssign) and isinstance(one.value, ast.Tuple)
            ]
            tables = [self.names[one.target.id] for one in rows if isinstance(one.target, ast.Name)]
            told = [row for table in tables for row in table if isinstance(row, tuple) and len(row) == 3]
            if not told:
                raise ValueError(f"{self.path}:{call.lineno}: a metric whose name cannot be read")
            for row in told:
                yield called, row[0], max(row[1:], key=len), {}

    def labels(self, node: ast.expr, known: dict[str, ast.expr]) -> dict[str, tuple[str, ...]]:
        found = node
        while isinstance(found, ast.Name) and found.id in known:
            found = known[found.id]
        if not isinstance(found, ast.Dict):
            value = self.value(found, known)
            return {key: _values(of) for key, of in value.items()} if isinstance(value, dict) else {}
        labels: dict[str, tuple[str, ...]] = {}
        for key, value in zip(found.keys, found.values, strict=True):
            more = (
                {str(self.value(key, known)): _values(self.value(value, known))} if key else self.labels(value, known)
            )
            labels |= more
        return labels

    def events(self) -> Iterator[tuple[str, str, set[str]]]:
        for call, known in self.calls:
            for level in _levels(call.func, known) if call.args else ():
                yield from self.told(call, known, level)

    def told(self, call: ast.Call, known: dict[str, ast.expr], level: str) -> Iterator[tuple[str, str, set[str]]]:
        """Return the events of one call: with `%` it is a sentence of another library's kind."""
        if level in LEVELS:
            for value in self.event_names(call, known):
                if not isinstance(value, str):
                    raise ValueError(f"{self.path}:{call.lineno}: an event whose name cannot be read")
                if "%" not in value:
                    yield value, level, {word.arg for word in call.keywords if word.arg} - {"exc_info"}

    def event_names(self, call: ast.Call, known: dict[str, ast.expr]) -> Iterator[Any]:
        """Return the names that an event may have: also what the module's callers of its function give, and what the
        classes of the package have as the attribute that is named."""
        first = call.args[0]
        if isinstance(first, ast.Name) and first.id in known:
            first = known[first.id]
        for text in _choices(first):
            value = self.value(text, known)
            if value is None and isinstance(text, ast.Name):
                for function in ast.walk(self.tree):
                    if isinstance(function, ast.FunctionDef) and call in ast.walk(function):
                        at = [one.arg for one in function.args.args].index(text.id) - 1
                        asked = [one for one, _ in self.calls if _last(one.func) == function.name]
                        yield from (self.value(one.args[at], {}) for one in asked)
            elif value is None and isinstance(text, ast.Attribute):
                yield from _attributes(text.attr)
            else:
                yield value

    def value(self, node: ast.expr, known: dict[str, ast.expr]) -> Any:
        """Return what an expression of constants is, or None."""
        if isinstance(node, ast.Constant):
            return node.value
        local: dict[str, Any] = {}
        for name in {one.id for one in ast.walk(node) if isinstance(one, ast.Name)} & set(known):
            if name not in {one.id for one in ast.walk(known[name]) if isinstance(one, ast.Name)}:
                local[name] = self.value(known[name], known)
        try:
            # Our own source, which was imported anyway.
            return eval(compile(ast.Expression(node), str(self.path), "eval"), {**self.names, **local})
        except Exception:
            return None


@functools.cache
def _modules() -> tuple[_Module, ...]:
    return tuple(_Module(path, ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(PACKAGE.rglob("*.py")))


def _assigned(function: ast.AST) -> dict[str, ast.expr]:
    """Return the names that a function assigns to, each with the last of what it may be."""
    found: dict[str, ast.expr] = {}
    for one in ast.walk(function):
        if isinstance(one, ast.Assign):
            target, value = one.targets[0], one.value
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=True))
            found |= {name.id: what for name, what in pairs if isinstance(name, ast.Name)}
        elif isinstance(one, ast.AnnAssign) and one.value is not None and isinstance(one.target, ast.Name):
            found[one.target.id] = one.value
    return found


def _levels(function: ast.expr, known: dict[str, ast.expr]) -> list[str]:
    """Return the levels at which a call logs: none where what it calls is no logger, several where it chooses."""
    if isinstance(function, ast.IfExp):
        return [*_levels(function.body, known), *_levels(function.orelse, known)]
    if isinstance(function, ast.Name) and function.id in known:
        return _levels(known[function.id], {})
    if isinstance(function, ast.Attribute) and _LOGGERS.search(ast.unparse(function.value)):
        return [_LEVEL_OF.get(function.attr, function.attr)]
    return []


def _attributes(name: str) -> Iterator[str]:
    for module in _modules():
        for one in ast.walk(module.tree):
            if (
                isinstance(one, ast.Assign)
                and ast.unparse(one.targets[0]) == name
                and isinstance(one.value, ast.Constant)
            ):
                yield str(one.value.value)


def _last(function: ast.expr) -> str:
    return (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )


def _choices(node: ast.expr) -> list[ast.expr]:
    return [*_choices(node.body), *_choices(node.orelse)] if isinstance(node, ast.IfExp) else [node]


def _values(found: Any) -> tuple[str, ...]:
    if found is None or callable(found):
        return ()
    return tuple(str(one) for one in (sorted(found) if isinstance(found, set | frozenset) else found))
