"""Selects the clusters of a command: names as they are given, and patterns over what the relay lists.

Pure: what was asked for and what is listed in, clusters out. A name that was written out is taken as it is and need not
be listed. A pattern (`prod-*`, `prod-??`, `prod-[ab]`) matches what this user may reach. Invariant: a cluster that only
a pattern chose says so, because then the relay has chosen its name (docs/threats.md#W21).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from arcbridge.errors import ConfigError, Unreachable
from arcbridge.pki.names import check_cluster_name

_SPECIAL = frozenset("*?[")
_ALLOWED = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-.*?[]!")


@dataclass(frozen=True, slots=True)
class Chosen:
    """One cluster of a command."""

    name: str
    pattern: str = ""
    """The pattern that chose it; empty: it was named."""


def is_pattern(name: str) -> bool:
    """Return whether a name is a pattern. No cluster's name has one of these characters."""
    return not _SPECIAL.isdisjoint(name)


def check_names(wanted: Sequence[str]) -> None:
    """Raise ConfigError for what is neither a cluster's name nor a pattern, and where there is none."""
    if not wanted:
        raise ConfigError("cluster: required but not set; give --cluster NAME or a pattern (`clusters` lists them)")
    for name in wanted:
        if not is_pattern(name):
            try:
                check_cluster_name(name)
            except ConfigError as error:
                raise ConfigError(f"flag --cluster: {name[:64]!r}: {error.message}") from error
        elif len(name) > 128 or not _ALLOWED.issuperset(name):
            raise ConfigError(
                f"flag --cluster: {name[:64]!r}: not a pattern; use lower-case letters, digits, '-', '.', and *, ?, […]"
            )


def choose(wanted: Sequence[str], listed: Sequence[Mapping[str, Any]]) -> list[Chosen]:
    """Return the clusters of `wanted` in its order, each once; `listed` are rows of `directory.list_clusters`.

    A cluster that is not connected now is chosen too: to leave it out silently would look like success. One that is
    revoked is not. Raises Unreachable for a pattern that matches nothing.
    """
    named = {name for name in wanted if not is_pattern(name)}
    found: dict[str, Chosen] = {}
    for one in wanted:
        if one in named:
            found.setdefault(one, Chosen(one))
            continue
        names = sorted(str(row["name"]) for row in listed if not row.get("revoked"))
        matches = [name for name in names if fnmatchcase(name, one)]
        if not matches:
            raise Unreachable(f"no cluster that you may reach matches {one!r}; `arcbridge clusters` lists them")
        for name in matches:
            if name not in named:
                found.setdefault(name, Chosen(name, one))
    # A name that stands behind a pattern that matches it keeps its place in the order that was given.
    return list(found.values())
