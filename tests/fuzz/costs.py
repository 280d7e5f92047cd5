"""The cost oracle: what reading one input takes in memory and in work, and inputs that grow in every way.

The bounds are those of the table of entrances in docs/threats.md, which is read here: there is no second copy. Memory
is the peak that tracemalloc sees. Work is counted twice: as lines of Python that ran, which is the same on each
machine, and as CPU time in steps, where a step is what one turn of an empty loop takes beside it; only the second one
sees what regular expressions and parsers in C do.

`python -m tests.fuzz.costs [TARGET ...]` pumps up to the largest input that each entrance takes, and prints the most
that was seen.
"""

from __future__ import annotations

import importlib
import itertools
import random
import re
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from tests.support import pages

PAGE = Path(__file__).parents[2] / "docs" / "threats.md"
CORPUS = Path(__file__).parent / "corpus"

MEMORY_ALLOWANCE = 512 * 1024
"""Bytes that any input may take: caches, compiled patterns, buffers of a fixed size."""
STEP_ALLOWANCE = 200_000
"""Steps that any input may take: some five milliseconds, so that small inputs are not judged by noise."""
LINE_ALLOWANCE = 4000
"""Lines of Python below which growth says nothing."""
_ROW = re.compile(
    r"^\| (?P<source>[^|]+) \| `(?P<reader>[\w.]+)` "
    r"\| (?P<largest>[\d ]+) (?:`(?P<constant>[\w.]+)`|\((?P<why>[^|]+)\)) "
    r"\| (?P<memory>\d+) \| (?P<steps>\d+) \| (?P<pays>[^|]+) \| `(?P<target>\w+)` \|$",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Entrance:
    """A row of the table."""

    source: str
    reader: str
    """Full name of the function, without `arcbridge.`."""
    largest: int
    """Bytes of an input at most."""
    constant: str | None
    """Name of the constant that says so, without `arcbridge.`; None: something outside of the package does."""
    memory: int
    """Bytes of memory for each byte of an input, at most."""
    steps: int
    """Steps for each byte of an input, at most."""
    pays: str
    target: str


def table() -> str:
    """Return the section of the page."""
    return pages.read(PAGE).partition("\n## Entrances\n")[2].partition("\n## ")[0]


def entrances() -> list[Entrance]:
    """Return the rows of the table."""
    return [
        Entrance(
            row["source"], row["reader"], int(row["largest"].replace(" ", "")), row["constant"], int(row["memory"]),
            int(row["steps"]), row["pays"], row["target"],
        )
        for row in _ROW.finditer(table())
    ]  # fmt: skip


def of_target(target: str) -> Entrance:
    """Return the row of a target; of several the one whose inputs are the largest."""
    return max((one for one in entrances() if one.target == target), key=lambda one: one.largest)


def named(name: str) -> Any:
    """Return what `arcbridge.NAME` is. Raises AttributeError or ImportError where there is none."""
    parts = ["arcbridge", *name.split(".")]
    for end in range(len(parts), 1, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


# -- measuring --------------------------------------------------------------------------------------------------------

Read = Callable[[bytes], object]
Shape = Callable[[int], bytes]
"""Makes an input of about as many bytes."""


class Cost(NamedTuple):
    """What one input took."""

    memory: int
    """Bytes at the peak."""
    lines: int
    """Lines of Python."""
    steps: float
    """CPU time, in turns of an empty loop."""


def peak(read: Read, data: bytes) -> int:
    """Return the bytes that are allocated at once while an input is read, beside those that were there before."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        read(data)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def lines(read: Read, data: bytes) -> int:
    """Return how many lines of Python run while an input is read."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        read(data)
    finally:
        sys.settrace(former)
    return count


def steps(read: Read, data: bytes, repeats: int = 1) -> float:
    """Return the CPU time of reading an input, the least of some tries, in turns of an empty loop."""
    return min(_seconds(read, data) for _ in range(repeats)) / _step()


def _seconds(read: Read, data: bytes) -> float:
    begin = time.process_time()
    read(data)
    return time.process_time() - begin


def _step(turns: int = 20_000) -> float:
    """Return the CPU seconds of one turn."""
    best = 1.0
    for _ in range(5):
        begin = time.process_time()
        for _ in range(turns):
            pass
        best = min(best, time.process_time() - begin)
    return best / turns


def excess(read: Read, data: bytes, entrance: Entrance) -> str:
    """Return what an input took beyond the bounds of its entrance; empty where it is within them."""
    bound = MEMORY_ALLOWANCE + entrance.memory * len(data)
    if (memory := peak(read, data)) > bound:
        return f"{memory} bytes of memory for {len(data)}: more than {bound}"
    most = STEP_ALLOWANCE + entrance.steps * len(data)
    # What seems slow is tried again: others use the machine, too.
    if steps(read, data) > most and (least := steps(read, data, 4)) > most:
        return f"{least:.0f} steps for {len(data)} bytes: more than {most}"
    return ""


def growth(read: Read, shape: Shape, size: int) -> str:
    """Return in which way the work for `size` bytes is out of proportion to that for half and for a quarter as many;
    empty where it is not. Both must say so: a parser that refuses one length may have little to do for it."""
    quarter, half, whole = shape(size // 4), shape(size // 2), shape(size)
    if steps(read, whole) < STEP_ALLOWANCE / 10:
        return ""  # fewer turns of a loop than a square of any length that counts
    many = lines(read, whole)
    if many > LINE_ALLOWANCE and is_square(many, fewer := lines(read, half), few := lines(read, quarter)):
        return f"{few} lines of Python become {fewer} and {many}"
    if steps(read, whole) < STEP_ALLOWANCE:
        return ""
    for repeats in (1, 5):  # what seems slow is tried again: others use the machine, too
        most, more, less = (steps(read, data, repeats) for data in (whole, half, quarter))
        if not is_square(most, more, less):
            return ""
    return f"{less:.0f} steps become {more:.0f} and {most:.0f}"


def is_square(whole: float, half: float, quarter: float) -> bool:
    """Return whether work grows with the square of a length (4 and 16 times) and not with it (2 and 4 times)."""
    return whole > 2.8 * half and whole > 8 * quarter


# -- inputs that grow -------------------------------------------------------------------------------------------------

_TOKEN = re.compile(rb"[A-Za-z0-9_.%=+-]+")
_ITEM = re.compile(rb"(?:\r\n|[,&\n/ ;?.])[^\r\n,&/ ;?.\[\]{}]+")
_BLOCK = re.compile(rb"\{[^{}]*\},?|\[[^\[\]]*\],?")
_VALUE = re.compile(rb"(?<=[:\[,])\s*(?:\"[^\"]*\"|[0-9]+|true|false|null)")
_NESTS = ((b"[", b"]"), (b'{"a":', b"}"), (b'{"name":"a","value":[', b"]}"), (b"- ", b""))

PAIRS = 4
"""Pairs of a token and a piece that are pumped together, for each other shape of a kind."""

FILLERS = (b" ", b"\t", "é".encode())
"""What stands within a token where its writer put nothing of the kind: blanks, and a letter of another alphabet."""

LEAST_LAST = 16
"""Bytes of what stands twice at the end of an input, at least."""


def shapes(seed: bytes, draw: random.Random, each: int) -> Iterator[tuple[str, Shape]]:
    """Yield the ways in which an input grows, `each` of a kind: all of it repeated, what stands twice at its end, one
    token, something else within it, one piece, a token beside a piece, and one value nested."""
    if not seed:
        return
    tokens = _some(_TOKEN, seed, draw, each)
    pieces = _some(_ITEM, seed, draw, each) + _some(_BLOCK, seed, draw, each)
    yield "whole", lambda size: _filled(seed, size)
    if last := _last_of_two(seed):
        yield f"last {last} bytes", _pumped(seed, [(len(seed) - last, len(seed))])
    for begin, end in tokens:
        yield f"token at {begin}", _pumped(seed, [(begin, end)])
        yield f"byte at {begin}", _pumped(seed, [(begin, begin + 1)])
        yield f"within the token at {begin}", _filled_within(seed, (begin + end) // 2, FILLERS[begin % len(FILLERS)])
    for begin, end in pieces:
        yield f"piece at {begin}", _pumped(seed, [(begin, end)])
    pairs = itertools.product(_spans(_TOKEN, seed), _spans(_ITEM, seed) + _spans(_BLOCK, seed))
    apart = [(token, piece) for token, piece in pairs if token[1] <= piece[0] or piece[1] <= token[0]]
    for token, piece in sorted(draw.sample(apart, min(PAIRS * each, len(apart)))):
        yield f"token at {token[0]} and piece at {piece[0]}", _pumped(seed, [token, piece])
    for begin, end in _some(_VALUE, seed, draw, each):
        for opening, closing in _NESTS[: max(2, each - 1)]:
            yield f"nested at {begin}", _nested(seed, begin, end, opening, closing)


def _last_of_two(seed: bytes) -> int:
    """Return the length of the piece that stands at the end of an input twice, 0 where there is none: so an input says
    itself what of it can be repeated, where that is no text (frames whose compression goes on from one to the next)."""
    sizes = range(len(seed) // 2, LEAST_LAST - 1, -1)
    return next((size for size in sizes if seed[-size:] == seed[-2 * size : -size]), 0)


def _some(pattern: re.Pattern[bytes], seed: bytes, draw: random.Random, most: int) -> list[tuple[int, int]]:
    spans = _spans(pattern, seed)
    return sorted(draw.sample(spans, min(most, len(spans))))


def _spans(pattern: re.Pattern[bytes], seed: bytes) -> list[tuple[int, int]]:
    return [found.span() for found in pattern.finditer(seed)]


def _filled(piece: bytes, size: int) -> bytes:
    return piece * max(size // len(piece), 1)  # whole ones: a parser that refuses the last one has another path


def _filled_within(seed: bytes, at: int, filler: bytes) -> Shape:
    return lambda size: seed[:at] + filler * (max(size - len(seed), 0) // len(filler)) + seed[at:]


def _pumped(seed: bytes, spans: list[tuple[int, int]]) -> Shape:
    """Repeat each span until the input has its size; each gets the same share."""

    def make(size: int) -> bytes:
        share = max(size - len(seed), 0) // len(spans)
        out, at = bytearray(), 0
        for begin, end in sorted(spans):
            out += seed[at:end] + seed[begin:end] * (share // (end - begin))
            at = end
        return bytes(out + seed[at:])

    return make


def _nested(seed: bytes, begin: int, end: int, opening: bytes, closing: bytes) -> Shape:
    def make(size: int) -> bytes:
        depth = max(size - len(seed), 0) // len(opening + closing)
        return seed[:begin] + opening * depth + seed[begin:end] + closing * depth + seed[end:]

    return make


def inputs(target: str, each: int) -> Iterator[tuple[str, Shape]]:
    """Yield the shapes of all inputs of a target's corpus."""
    draw = random.Random(target)
    for path in sorted((CORPUS / target).iterdir()):
        for name, shape in shapes(path.read_bytes(), draw, each):
            yield f"{path.name}: {name}", shape


def excesses(target: str, read: Read, *, each: int, largest: int, most: int = sys.maxsize) -> Iterator[str]:
    """Pump the inputs of a target's corpus to `largest` bytes, in `most` shapes, and yield what takes too much."""
    entrance = of_target(target)
    size = min(entrance.largest, largest)
    grown = list(inputs(target, each))
    told = [one for one in grown if ": last " in one[0]]
    within = [one for one in grown if ": within " in one[0]]
    others = [one for one in grown if one not in within]
    for some, count in ((others, most), (within, max(most // 4, 1))):
        told += random.Random(target).sample(some, min(count, len(some)))
    for name, shape in told:
        long = shape(size)
        if found := excess(read, long, entrance) or growth(read, shape, size):
            yield f"{target}: {name}: {found}"


def main(targets: list[str]) -> int:
    """Print for each target the most that an input took for each of its bytes, and what took too much."""
    from tests.fuzz.readers import READERS

    worst = 0
    for target in targets or READERS:
        entrance, read = of_target(target), READERS[target]
        memory = work = 0.0
        count = 0
        for _, shape in inputs(target, 4):
            for size in (entrance.largest // 16, entrance.largest):
                data = shape(size)
                count += 1
                memory = max(memory, (peak(read, data) - MEMORY_ALLOWANCE) / (len(data) or 1))
                work = max(work, (steps(read, data, 2) - STEP_ALLOWANCE) / (len(data) or 1))
        found = list(excesses(target, read, each=4, largest=entrance.largest))
        worst += len(found)
        seen = f"{target}: {count} inputs, {memory:.1f} bytes and {work:.1f} steps a byte"
        print(seen, *found, sep="\n  ", flush=True)
    return 1 if worst else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
