"""Reads fields of a query as the API server reads them.

Source: Go's `url.ParseQuery`, and `Convert_Slice_string_To_bool` of k8s.io/apimachinery's `runtime` package. It decides
nothing. Invariant: the work is bounded by the length of the query, however many fields it has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from urllib.parse import unquote_plus, unquote_to_bytes

_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


def query_values(query: str, name: str) -> list[str]:
    """Return the values of a field, in order; fields with a semicolon or a malformed escape are left out.

    Bytes that are not UTF-8 are read with `surrogateescape`, so that a hash can be over what came.
    """
    values = []
    for found in _field_pattern(name).finditer(query):
        key, value = found[1], found[2] or ""
        if ";" in found[0] or ("%" in found[0] and _BAD_ESCAPE.search(found[0])):
            continue
        if "%" in key and unquote_plus(key) != name:
            continue
        values.append(unquote_to_bytes(value.replace("+", " ")).decode("utf-8", "surrogateescape"))
    return values


def is_true(values: Sequence[str]) -> bool:
    """Return what the API server makes of a field that is true or false: its first value counts, and each but `0` and
    `false`, in capitals or not, is true."""
    return bool(values) and values[0] != "0" and values[0].casefold() != "false"


@lru_cache
def _field_pattern(name: str) -> re.Pattern[str]:
    """Return what finds the fields of a name, and those whose names are escaped, in a query."""
    return re.compile(rf"(?:^|&)({name}|[^&=]*%[^&=]*)(?:=([^&]*))?(?=&|\Z)")
