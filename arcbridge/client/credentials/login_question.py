"""Writes the question of a first login: a line for each value that the user is about to trust, and the flags for them.

It decides nothing and asks nothing (`client.commands.sign_in` does). Invariant: each setting of a login that a
relay may name has a line, so that a user sees where each token will be good before a relay or an issuer gets one.
"""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from arcbridge.settings.choices import BROWSER, DEVICE, PROGRAM
from arcbridge.settings.flags import CLIENT, flags_of

_GRANTS = {
    "auto": "in the browser; without one, by a code for another device",
    BROWSER: "in the browser",
    DEVICE: "by a code for another device, without the browser: the issuer's id token is then bound to no key",
    PROGRAM: "as a program, without a person",
}
_ALSO_AT, _NOWHERE = "issuer also at", "none"
_INDENT, _COLUMN = 2, 22
"""Spaces before a label, and the column at which values begin."""


class Line(NamedTuple):
    """One thing to compare."""

    label: str
    value: str
    before: str = ""
    """What was trusted until now; empty: nothing was, or the same."""


def login_lines(settings: Mapping[str, Any], former: Mapping[str, Any] | None = None) -> list[Line]:
    """Return the lines of a login's settings (`RelayProfile.in_force`); `former`: those that were trusted before."""
    now, before = _values(settings), {} if former is None else _values(former)
    lines = [Line(label, value, _other(before.get(label, value), value)) for label, value in now.items()]
    # Most issuers have one origin, and a line that says so is one more to pass over.
    return [line for line in lines if line != (_ALSO_AT, _NOWHERE, "")]


def layout(lines: Sequence[Line], width: int) -> list[str]:
    """Return lines as text of at most `width` columns; a value that fits no line beside its label goes below it."""
    width, found = max(width, 2 * _COLUMN), []
    for label, value, before in lines:
        text = f"{before} → {value}" if before else value
        head = " " * _INDENT + label
        first = f"{head:<{_COLUMN}}"
        if max(map(len, text.split())) > width - _COLUMN:
            found.append(head)
            first = " " * 2 * _INDENT
        found += textwrap.wrap(
            text, width, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False
        )
    return found


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Return the flags that give these settings of a login, each quoted for a shell.

    `dpop` has none: where no user is asked, tokens are bound.
    """
    found = []
    for flag in flags_of(CLIENT):
        value = settings.get(flag.key.removeprefix("login.")) if flag.key.startswith("login.") else None
        # An empty list is given as one empty word.
        for one in () if value is None else (value or ("",)) if isinstance(value, tuple) else (value,):
            # A value that looks like a flag is joined to its own.
            found.append(shlex.join([f"{flag.long}={one}"] if str(one).startswith("-") else [flag.long, str(one)]))
    return found


def shown(value: object) -> str:
    """Return a setting as a person reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(quoted, value if isinstance(value, tuple) else (value,) if value else ())) or "none"


def quoted(word: object) -> str:
    """Return a word of a relay or an issuer in quotation marks, so that it cannot pass for a sentence of ours."""
    return json.dumps(str(word))


def _values(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return label and value of each line, in the order in which a person compares them."""
    audience = settings["cluster_audience"]
    return {
        "log in at": shown(settings["issuer"]),
        _ALSO_AT: shown(settings["issuer_origins"]),
        "as client": shown(settings["client_id"]),
        "scopes": shown(settings["scopes"]),
        "relay's audience": shown(settings["audience"]) if settings["audience"] else "none; the issuer decides",
        "relay's scopes": shown(settings["relay_scopes"] or settings["scopes"]),
        "clusters' audience": (
            f"{quoted(audience)}, asked for by {quoted(settings['cluster_audience_by'])}"
            if audience
            else "none: every cluster gets the one id token"
        ),
        "clusters' scopes": shown(settings["cluster_scopes"]),
        "you log in": _GRANTS[settings["grant_type"]],
        "bound to a key": (
            "yes, where the issuer can" if settings["dpop"] else "no: a copy of a token is as good as the token"
        ),
    }


def _other(before: str, now: str) -> str:
    return before if before != now else ""
