"""The functions on strings: those of CEL, and version 2 of cel-go's extension for strings. Indices count characters."""

from __future__ import annotations

from arcbridge.identity.cel.values import EvaluationError, LimitExceeded, StringList, Value, no_such_overload

MAX_SIZE = 1 << 20
"""Characters of a string, and elements of a list, that an expression may make. A token has 64 KiB; Kubernetes has no
such bound, and `replace` can make a text of 10^9 characters there at a cost that is within the limit."""

_UPPER, _LOWER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz"
_TO_LOWER, _TO_UPPER = str.maketrans(_UPPER, _LOWER), str.maketrans(_LOWER, _UPPER)
_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
"""What Unicode calls White_Space; Python's `strip()` takes more away."""


def bounded(length: int) -> None:
    """Raise LimitExceeded unless a string or list of `length` may be made."""
    if length > MAX_SIZE:
        raise LimitExceeded(f"an expression makes a string or list of more than {MAX_SIZE} elements", permanent=True)


def char_at(string: str, index: int) -> str:
    """`charAt`: one past the end gives the empty string."""
    if not 0 <= index <= len(string):
        raise EvaluationError(f"index out of range: {index}")
    return string[index : index + 1]


def index_of(string: str, part: str, start: int = 0) -> int:
    """`indexOf` of a string."""
    if not part:
        return start
    if start < 0:
        raise EvaluationError(f"index out of range: {start}")
    return string.find(part, start) if start < len(string) else -1


def last_index_of(string: str, part: str, start: int | None = None) -> int:
    """`lastIndexOf` of a string."""
    if start is None:
        return string.rfind(part)
    if not part:
        return start
    if start < 0:
        raise EvaluationError(f"index out of range: {start}")
    return -1 if start >= len(string) else string.rfind(part, 0, start + len(part))


def lower_ascii(string: str) -> str:
    """`lowerAscii`."""
    return string.translate(_TO_LOWER)


def upper_ascii(string: str) -> str:
    """`upperAscii`."""
    return string.translate(_TO_UPPER)


def replaced_length(string: str, old: str, new: str, count: int = -1) -> int:
    """Return an upper bound of the length of what `replace` makes of the same arguments."""
    if len(new) <= len(old):
        return len(string)
    times = len(string) + 1 if not old else string.count(old)
    return len(string) + (min(times, count) if count >= 0 else times) * (len(new) - len(old))


def replace(string: str, old: str, new: str, count: int = -1) -> str:
    """`replace`; a negative `count` replaces all."""
    bounded(replaced_length(string, old, new, count))
    return string.replace(old, new, count if count < len(string) + 1 else -1)


def split(string: str, separator: str, limit: int = -1) -> StringList:
    """`split`; a negative `limit` is none, an empty separator splits into characters."""
    if limit == 0:
        return StringList()
    if not separator:
        if 0 < limit < len(string):
            return StringList([*string[: limit - 1], string[limit - 1 :]])
        return StringList(string)
    return StringList(string.split(separator, limit - 1 if 0 < limit <= len(string) + 1 else -1))


def substring(string: str, start: int, end: int | None = None) -> str:
    """`substring`."""
    stop = len(string) if end is None else end
    if not 0 <= start <= len(string) or not 0 <= stop <= len(string) or start > stop:
        raise EvaluationError(f"invalid substring range. start: {start}, end: {stop}")
    return string[start:stop]


def trim(string: str) -> str:
    """`trim`: without the blanks at both ends."""
    return string.strip(_SPACE)


def join(values: list[Value], separator: str = "") -> str:
    """`join` of a list of strings."""
    if not all(isinstance(item, str) for item in values):
        raise no_such_overload()
    bounded(sum(map(len, values)) + len(separator) * max(0, len(values) - 1))
    return separator.join(values)


_ESCAPES = str.maketrans(dict(zip('\a\b\f\n\r\t\v\\"', map("\\{}".format, 'abfnrtv\\"'), strict=True)))


def quote(string: str) -> str:
    """`strings.quote`."""
    return f'"{string.translate(_ESCAPES)}"'


def quoted_as_go(string: str) -> str:
    """Return how Go quotes a string (`%q`): besides `quote`, what cannot be printed is escaped."""
    out = []
    for char in string.translate(_ESCAPES):
        code = ord(char)
        if char.isprintable():
            out.append(char)
        elif code < 0x80:
            out.append(f"\\x{code:02x}")
        else:
            out.append(f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
    return f'"{"".join(out)}"'
