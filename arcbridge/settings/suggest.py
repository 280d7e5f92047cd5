"""Suggests words in the place of one that is not known: the nearest that is, and all that are."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return the known word that a mistyped one was probably meant to be; empty: none is near."""
    import difflib  # only for a mistyped word

    found = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return found[0] if found else ""


def listed(known: Iterable[str]) -> str:
    """`table, json or yaml`."""
    *others, last = known
    return f"{', '.join(others)} or {last}" if others else last


def unknown(what: str, word: str, known: Iterable[str]) -> str:
    """`flag --output: 'jsn' is unknown; did you mean json? Use table, json or yaml`."""
    known = list(known)
    shown = word if len(word) <= 20 else word[:20] + "…"
    near = nearest(word, known)
    return f"{what}: {shown!r} is unknown; " + (f"did you mean {near}? Use " if near else "use ") + listed(known)
