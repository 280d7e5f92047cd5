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


def text(value: Value) -> str:
    """`value`, if it is a string. Raises EvaluationError."""
    if not isinstance(value, str):
        raise no_such_overload()
    return value


def integer(value: Value) -> int:
    """`value`, if it is an int. Raises EvaluationError."""
    if type(value) is not int:
        raise no_such_overload()
    return value


def bounded(length: int) -> None:
    """Raise LimitExceeded unless a string or list of `length` may be made."""
    if length > MAX_SIZE:
        raise LimitExceeded(f"an expression makes a string or list of more than {MAX_SIZE} elements", permanent=True)


def char_at(value: Value, index: Value) -> str:
    """`charAt`: one past the end gives the empty string."""
    string, at = text(value), integer(index)
    if not 0 <= at <= len(string):
        raise EvaluationError(f"index out of range: {at}")
    return string[at : at + 1]


def index_of(value: Value, wanted: Value, start: Value = 0) -> int:
    """`indexOf` of a string."""
    string, part, offset = text(value), text(wanted), integer(start)
    if not part:
        return offset
    if offset < 0:
        raise EvaluationError(f"index out of range: {offset}")
    return string.find(part, offset) if offset < len(string) else -1


def last_index_of(value: Value, wanted: Value, start: Value = None) -> int:
    """`lastIndexOf` of a string."""
    string, part = text(value), text(wanted)
    if start is None:
        return string.rfind(part)
    offset = integer(start)
    if not part:
        return offset
    if offset < 0:
        raise EvaluationError(f"index out of range: {offset}")
    return -1 if offset >= len(string) else string.rfind(part, 0, offset + len(part))


def lower_ascii(value: Value) -> str:
    """`lowerAscii`."""
    return text(value).translate(_TO_LOWER)


def upper_ascii(value: Value) -> str:
    """`upperAscii`."""
    return text(value).translate(_TO_UPPER)


def replaced_length(value: Value, old: Value, new: Value, count: Value = -1) -> int:
    """Answer an upper bound of the length of what `replace` makes of the same arguments. Raises EvaluationError."""
    string, gone, put, limit = text(value), text(old), text(new), integer(count)
    if len(put) <= len(gone):
        return len(string)
    times = len(string) + 1 if not gone else string.count(gone)
    return len(string) + (min(times, limit) if limit >= 0 else times) * (len(put) - len(gone))


def replace(value: Value, old: Value, new: Value, count: Value = -1) -> str:
    """`replace`; a negative `count` replaces all."""
    bounded(replaced_length(value, old, new, count))
    string, gone, put, limit = text(value), text(old), text(new), integer(count)
    return string.replace(gone, put, limit if limit < len(string) + 1 else -1)


def split(value: Value, separator: Value, limit: Value = -1) -> StringList:
    """`split`; a negative `limit` is none, an empty separator splits into characters."""
    string, by, most = text(value), text(separator), integer(limit)
    if most == 0:
        return StringList()
    if not by:
        if 0 < most < len(string):
            return StringList([*string[: most - 1], string[most - 1 :]])
        return StringList(string)
    return StringList(string.split(by, most - 1 if 0 < most <= len(string) + 1 else -1))


def substring(value: Value, start: Value, end: Value = None) -> str:
    """`substring`."""
    string, begin = text(value), integer(start)
    stop = len(string) if end is None else integer(end)
    if end is not None and begin > stop:
        raise EvaluationError(f"invalid substring range. start: {begin}, end: {stop}")
    if not 0 <= begin <= len(string) or not 0 <= stop <= len(string):
        raise EvaluationError(f"index out of range: {begin}")
    return string[begin:stop]


def trim(value: Value) -> str:
    """`trim`: without the blanks at both ends."""
    return text(value).strip(_SPACE)


def join(values: Value, separator: Value = "") -> str:
    """`join` of a list of strings."""
    by = text(separator)
    if not isinstance(values, list):
        raise no_such_overload()
    parts = [text(item) for item in values]
    bounded(sum(map(len, parts)) + len(by) * max(0, len(parts) - 1))
    return by.join(parts)


_ESCAPES = str.maketrans(
    {
        "\a": "\\a",
        "\b": "\\b",
        "\f": "\\f",
        "\n": "\\n",
        "\r": "\\r",
        "\t": "\\t",
        "\v": "\\v",
        "\\": "\\\\",
        '"': '\\"',
    }
)


def quote(value: Value) -> str:
    """`strings.quote`."""
    return f'"{text(value).translate(_ESCAPES)}"'


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


def contains(value: Value, part: Value) -> bool:
    """`contains`."""
    return text(part) in text(value)


def starts_with(value: Value, prefix: Value) -> bool:
    """`startsWith`."""
    return text(value).startswith(text(prefix))


def ends_with(value: Value, suffix: Value) -> bool:
    """`endsWith`."""
    return text(value).endswith(text(suffix))
