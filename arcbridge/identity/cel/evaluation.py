"""Runs a checked expression: its tree becomes a closure per node, once, which each evaluation calls.

An evaluation is bounded by `limit`, in the units in which kube-apiserver counts (its own limit is 1,000,000 for an
expression), by `time_limit`, because units are no seconds, and by `memory`, because units are no bytes; beyond any of
them it raises LimitExceeded, which nothing in an expression absorbs. Errors of an expression are exceptions, except in
a macro's accumulator, which holds them as values until an `&&`, `||` or the result asks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

from arcbridge.identity.cel import syntax
from arcbridge.identity.cel.costs import LIST_COST, MAP_COST
from arcbridge.identity.cel.functions import CONVERSIONS, FUNCTIONS, TYPES, Calls, Function
from arcbridge.identity.cel.lists import SUMMED, total
from arcbridge.identity.cel.strings import MAX_SIZE
from arcbridge.identity.cel.values import (
    ENTRY,
    NONE,
    Claims,
    EvaluationError,
    LimitExceeded,
    Map,
    Memory,
    Optional,
    Unabsorbed,
    Value,
    lookup_key,
    no_such_overload,
)

COST_LIMIT = 1_000_000
"""What one expression may cost: kube-apiserver's own limit, there about a tenth of a second."""


class TimeLimit:
    """For how many seconds the thread that made it may still compute.

    What it waits for does not count, a turn of the interpreter's included: a token that passes on an idle machine
    passes on a busy one. No thread computes for longer than `clock` (monotonic) says, and asking that costs less than
    asking the kernel for what the thread has `computed`; so this is asked only when it could matter.
    """

    __slots__ = ("_began", "_clock", "_computed", "_look_at", "_seconds")

    def __init__(
        self,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        computed: Callable[[], float] = time.thread_time,
    ) -> None:
        self._seconds = seconds
        self._clock = clock
        self._computed = computed
        self._began = computed()
        self._look_at = clock() + seconds

    def passed(self) -> bool:
        """Return whether the thread has computed for longer."""
        now = self._clock()
        if now <= self._look_at:
            return False
        left = self._seconds - (self._computed() - self._began)
        self._look_at = now + max(left, 0.0)
        return left < 0.0


class Evaluation:
    """The variables of one evaluation and what it has cost so far."""

    __slots__ = ("cost", "limit", "memory", "time_limit", "variables")

    def __init__(
        self,
        variables: dict[str, Value],
        limit: int = COST_LIMIT,
        time_limit: TimeLimit | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.variables = variables
        self.limit = limit
        self.time_limit = time_limit or TimeLimit(math.inf)
        self.memory = memory or Memory()
        self.cost = 0

    def spend(self, cost: int) -> None:
        """Add `cost`. Raises LimitExceeded."""
        self.cost += cost
        if self.cost > self.limit or self.time_limit.passed():
            raise LimitExceeded("the expression costs too much for these claims")


Run = Callable[[Evaluation], Value]


class _Accumulated(list[Value]):
    """The list that a macro is making: it alone grows in place, or `map` would take quadratic time."""

    __slots__ = ()


class _AccumulatedMap(Map):
    """The map that a macro is making."""

    __slots__ = ()

    def with_entry(self, key: Value, value: Value) -> Map:
        """Add the entry to this map itself."""
        found = lookup_key(key)
        if found in self._entries:
            raise EvaluationError("insert failed: the key is there already")
        if len(self._entries) >= MAX_SIZE:
            raise LimitExceeded("a map has too many entries", permanent=True)
        self._entries[found] = (key, value)
        return self


def build(node: syntax.Node, types: Callable[[syntax.Node], syntax.Type]) -> Run:
    """Make the closure of a tree. Raises EvaluationError for a constant that can never be computed."""
    return _Builder(types).build(node)


class _Builder:
    __slots__ = ("_types",)

    def __init__(self, types: Callable[[syntax.Node], syntax.Type]) -> None:
        self._types = types

    def build(self, node: syntax.Node) -> Run:
        if _constant(node):
            value = (
                node.value if isinstance(node, syntax.Literal) else self._KINDS[type(node)](self, node)(Evaluation({}))
            )
            return lambda state: value
        return self._KINDS[type(node)](self, node)

    def _identifier(self, node: syntax.Identifier) -> Run:
        name = node.name
        known = TYPES.get(name)
        path = name.split(".")

        def run(state: Evaluation) -> Value:
            state.spend(1)
            value = state.variables.get(name, known)
            if isinstance(value, EvaluationError):
                raise value
            if value is None and name not in state.variables and len(path) == 2:
                # `user.groups` is declared under this name, and kept as a field of `user`.
                state.spend(1)
                return _selected(state.variables[path[0]], path[1])
            return value

        return run

    def _select(self, node: syntax.Select) -> Run:
        operand, field = self.build(node.operand), node.field
        if node.presence:
            return lambda state: _find_maybe(operand(state), field)[0]

        def select(state: Evaluation) -> Value:
            value = operand(state)
            state.spend(1)
            return _selected(value, field)

        return select

    def _call(self, node: syntax.Call) -> Run:
        special = _SPECIAL.get(node.function)
        arguments = ([node.target] if node.target is not None else []) + list(node.arguments)
        runs = [self.build(argument) for argument in arguments]
        if special is not None:
            return special(*runs)
        if node.function == "@in" and isinstance(arguments[1], syntax.ListLiteral) and not arguments[1].elements:
            # kube-apiserver does not evaluate what is sought in an empty list, so that it cannot fail.
            return lambda state: False
        if self._tracked_by_size(node, arguments):
            runs[-1] = _unabsorbed(runs[-1])
        function = FUNCTIONS.get((node.function, len(runs)))
        if function is None:
            raise EvaluationError(f"the function {node.function} is not carried out here")
        if node.function == "sum" and (kind := self._types(node).name) in SUMMED:
            function = Function(function.cost, Calls())
            function.calls.overloads.append(((list,), lambda values: total(values, kind)))
        return _called(function, runs)

    def _tracked_by_size(self, node: syntax.Call, arguments: list[syntax.Node]) -> bool:
        """Return whether kube-apiserver's cost tracker asks the last argument for its size, which no error has."""
        if node.function not in ("distinct", "sort", "@sortByAssociatedKeys"):
            return False
        elements = self._types(arguments[-1]).parameters
        return node.function == "distinct" or (bool(elements) and elements[0].name not in (syntax.DYN, syntax.ANY))

    def _list(self, node: syntax.ListLiteral) -> Run:
        runs = [(self.build(element), index in node.optional) for index, element in enumerate(node.elements)]

        def make(state: Evaluation) -> Value:
            out: list[Value] = []
            for run, optional in runs:
                value = run(state)
                out += _optionals(value) if optional else (value,)
            state.spend(LIST_COST)
            state.memory.take(out)
            return out

        return make

    def _map(self, node: syntax.MapLiteral) -> Run:
        runs = [(self.build(entry.key), self.build(entry.value), entry.optional) for entry in node.entries]

        def make(state: Evaluation) -> Value:
            entries: dict[object, tuple[Value, Value]] = {}
            for key_run, value_run, optional in runs:
                key, value = key_run(state), value_run(state)
                found = lookup_key(key)
                values = _optionals(value) if optional else (value,)
                if values:
                    entries[found] = (key, values[0])
                else:
                    entries.pop(found, None)
            state.spend(MAP_COST)
            made = Map(entries)
            state.memory.take(made)
            return made

        return make

    def _comprehension(self, node: syntax.Comprehension) -> Run:
        over, start = self.build(node.range), self.build(node.start)
        condition, step, result = self.build(node.condition), self.build(node.step), self.build(node.result)
        accumulator, first, second = node.accumulator, node.variable, node.variable2
        grows_list = isinstance(node.start, syntax.ListLiteral) and not node.start.elements
        grows_map = isinstance(node.start, syntax.MapLiteral) and not node.start.entries

        def run(state: Evaluation) -> Value:
            values = over(state)
            variables = state.variables
            shadowed = {name: variables[name] for name in (accumulator, first, second) if name in variables}
            try:
                pairs = _pairs(values, two=bool(second))
                variables[accumulator] = (
                    _Accumulated() if grows_list else _AccumulatedMap({}) if grows_map else _held(start, state)
                )
                for key, value in pairs:
                    variables[first] = key
                    if second:
                        variables[second] = value
                    # An iteration costs at least this much also where nothing in it does.
                    state.spend(0)
                    if _held(condition, state) is False:
                        break
                    variables[accumulator] = _held(step, state)
                made = variables[accumulator]
                if type(made) is _Accumulated:
                    variables[accumulator] = list(made)
                elif type(made) is _AccumulatedMap:
                    variables[accumulator] = Map({lookup_key(key): (key, value) for key, value in made.items()})
                return result(state)
            finally:
                for name in (accumulator, first, second):
                    variables.pop(name, None)
                variables.update(shadowed)

        return run

    _KINDS: ClassVar[dict[type, Callable[[_Builder, Any], Run]]] = {
        syntax.Identifier: _identifier,
        syntax.Select: _select,
        syntax.Call: _call,
        syntax.ListLiteral: _list,
        syntax.MapLiteral: _map,
        syntax.Comprehension: _comprehension,
    }
    """What makes the closure of each kind of node; of messages `compiler` has made sure that there are none."""


def _unabsorbed(run: Run) -> Run:
    """Make an error of `run` one that nothing absorbs: in kube-apiserver the whole expression fails there."""

    def strict(state: Evaluation) -> Value:
        try:
            return run(state)
        except EvaluationError as error:
            raise Unabsorbed(str(error)) from error

    return strict


def _optionals(value: Value) -> tuple[Value, ...]:
    """Return what an optional value has, or nothing. Raises EvaluationError for another value."""
    if not isinstance(value, Optional):
        raise no_such_overload()
    return (value.value,) if value.present else ()


def _held(run: Run, state: Evaluation) -> Value:
    """Return the value, or the error as one."""
    try:
        return run(state)
    except EvaluationError as error:
        return error


def _pairs(values: Value, *, two: bool) -> Iterator[tuple[Value, Value]]:
    """Return what a macro goes through: (element, None), or with two variables (index, element) or (key, value)."""
    if isinstance(values, list):
        return enumerate(values) if two else ((item, None) for item in values)
    if isinstance(values, Map):
        return values.items() if two else ((key, None) for key, _ in values.items())
    if isinstance(values, Claims):
        missing = EvaluationError("no such key")
        return ((item, missing) for item in values.walk())
    raise no_such_overload()


def _called(function: Function, runs: list[Run]) -> Run:
    cost, calls = function
    if len(runs) == 1:
        (only,) = runs

        def one_operand(state: Evaluation) -> Value:
            value = only(state)
            state.spend(cost(value))
            return _counted(state, calls[(type(value),)](value), value)

        return one_operand
    if len(runs) == 2:
        left_run, right_run = runs

        def two_operands(state: Evaluation) -> Value:
            left, right = left_run(state), right_run(state)
            if type(left) is _Accumulated and type(right) is list:
                state.spend(1)
                left.extend(right)
                if len(left) > MAX_SIZE:
                    raise LimitExceeded("a list has too many elements", permanent=True)
                return left
            state.spend(cost(left, right))
            return _counted(state, calls[type(left), type(right)](left, right), left)

        return two_operands

    def operands(state: Evaluation) -> Value:
        values = [run(state) for run in runs]
        state.spend(cost(*values))
        return _counted(state, function.call(*values), values[0] if values else None)

    return operands


def _counted(state: Evaluation, result: Value, first: Value) -> Value:
    """Count the memory of a call's result, unless that is its first argument."""
    if result is not first:
        state.memory.take(result)
    elif type(result) is _AccumulatedMap:
        state.memory.spend(ENTRY)
    return result


def _logical(left: Run, right: Run, *, decides: bool) -> Run:
    """`&&` (decided by false) or `||` (by true): a side that decides hides an error of the other."""

    def run(state: Evaluation) -> Value:
        failed: EvaluationError | None = None
        for side in (left, right):
            try:
                value = side(state)
                if value is decides:
                    return decides
                if not isinstance(value, bool):
                    raise no_such_overload()
            except EvaluationError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return not decides

    return run


def _conditional(condition: Run, yes: Run, no: Run) -> Run:
    def run(state: Evaluation) -> Value:
        value = condition(state)
        if not isinstance(value, bool):
            raise no_such_overload()
        return yes(state) if value else no(state)

    return run


def _not_strictly_false(operand: Run) -> Run:
    def run(state: Evaluation) -> Value:
        state.spend(1)
        return _held(operand, state) is not False

    return run


def _index(operand: Run, index: Run, *, found: Callable[[Value, Value], Value]) -> Run:
    def run(state: Evaluation) -> Value:
        value, key = operand(state), index(state)
        if not isinstance(key, str | bool | int | float):
            raise EvaluationError("invalid qualifier type")
        state.spend(1)
        return found(value, key)

    return run


def _or_else(optional: Run, otherwise: Run, *, unwrapped: bool) -> Run:
    """`orValue` gives what an optional value has, `or` the optional value itself."""

    def run(state: Evaluation) -> Value:
        state.spend(1)
        value = optional(state)
        if not isinstance(value, Optional):
            return value
        if not value.present:
            return otherwise(state)
        return value.value if unwrapped else value

    return run


def _selected(value: Value, key: Value) -> Value:
    """`value.key` or `value[key]`; of an optional value an optional one. Raises EvaluationError."""
    if isinstance(value, Optional):
        return _selected_maybe(value, key)
    found, inner = _find(value, key)
    if not found:
        raise EvaluationError("no such key")
    return inner


def _selected_maybe(value: Value, key: Value) -> Optional:
    """`value.?key` or `value[?key]`. Raises EvaluationError."""
    found, inner = _find_maybe(value, key)
    return Optional(inner) if found else NONE


_SPECIAL: dict[str, Callable[..., Run]] = {
    "_&&_": partial(_logical, decides=False),
    "_||_": partial(_logical, decides=True),
    "_?_:_": _conditional,
    "@not_strictly_false": _not_strictly_false,
    "_[_]": partial(_index, found=_selected),
    "_?._": partial(_index, found=_selected_maybe),
    "_[?_]": partial(_index, found=_selected_maybe),
    "orValue": partial(_or_else, unwrapped=True),
    "or": partial(_or_else, unwrapped=False),
}


def _find_maybe(value: Value, key: Value) -> tuple[bool, Value]:
    """Return whether a key is there, and what stands there; no value has keys but a map, a list, and what wraps one."""
    if isinstance(value, Optional):
        if not value.present:
            return False, None
        value = value.value
    return _find(value, key)


def _find(value: Value, key: Value) -> tuple[bool, Value]:
    if isinstance(value, Map | Claims):
        return value.find(key)
    if isinstance(value, list):
        if isinstance(key, bool) or not isinstance(key, int | float) or key != key or key in (_INF, -_INF):
            raise EvaluationError("unsupported index type in list")
        if key != int(key):
            raise EvaluationError("unsupported index value in list")
        position = int(key)
        return (True, value[position]) if 0 <= position < len(value) else (False, None)
    return False, None


_INF = float("inf")


def _constant(node: syntax.Node) -> bool:
    """Return whether a node is computed once: literals, aggregates of them, conversions of them."""
    if isinstance(node, syntax.Literal):
        return True
    if isinstance(node, syntax.ListLiteral):
        return not node.optional and all(map(_constant, node.elements))
    if isinstance(node, syntax.MapLiteral):
        return all(not entry.optional and _constant(entry.key) and _constant(entry.value) for entry in node.entries)
    if (
        isinstance(node, syntax.Call)
        and node.target is None
        and len(node.arguments) == 1
        and node.function in CONVERSIONS
    ):
        return _constant(node.arguments[0])
    return False
