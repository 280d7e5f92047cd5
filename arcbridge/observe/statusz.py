"""Answers `/statusz` as components of Kubernetes do (KEP-4827): a page for people, the object `Statusz` for programs.

Without an `Accept`, or with one that takes any text, it is the page; a program asks for the object by its group,
version and kind (`config.k8s.io/v1beta1`, of Kubernetes 1.36). Both say when the process began, what it is, and which
paths there are to look at, and nothing of what it does. The module has no clock and no socket.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

OBJECT: Final = "application/json;g=config.k8s.io;v=v1beta1;as=Statusz"
"""What a program asks for."""
_ASKED: Final = {"g": "config.k8s.io", "v": "v1beta1", "as": "Statusz"}
_TEXT: Final = frozenset({"text/plain", "text/*", "*/*"})
_MOST: Final = 32
"""Media types of an Accept that are looked at."""
_WARNING: Final = (
    "Warning: This endpoint is not meant to be machine parseable, has no formatting compatibility guarantees and is "
    "for debugging purposes only."
)


def is_object(accept: str) -> bool | None:
    """Return whether `accept` asks for the object, or for the page; None where it takes neither (406)."""
    if not accept.strip():
        return False
    for entry in accept.split(",", _MOST)[:_MOST]:
        media, *parameters = (part.strip() for part in entry.split(";"))
        if media.lower() in _TEXT:
            return False
        given = {name: value for name, _, value in (one.partition("=") for one in parameters)}
        if media.lower() == "application/json" and _ASKED.items() <= given.items():
            return True
    return None


def page(component: str, began: float, up: float, versions: Mapping[str, str], paths: Sequence[str]) -> str:
    """Return the page; `began` is unix time, `up` seconds, `versions` are by what they are of."""
    up, start = int(up), datetime.fromtimestamp(began, UTC)
    lines = {
        "Started": f"{start:%a %b} {start.day:2} {start:%H:%M:%S} UTC {start.year}",
        "Up": f"{up // 3600} hr {up // 60 % 60:02} min {up % 60:02} sec",
        **versions,
        "Paths": " ".join(paths),
    }
    told = "".join(f"{name}: {value}\n" for name, value in lines.items())
    return f"\n{component} statusz\n{_WARNING}\n\n{told}"


def document(component: str, began: float, up: float, version: str, paths: Sequence[str]) -> str:
    """Return the object as JSON."""
    status = {
        "kind": "Statusz",
        "apiVersion": "config.k8s.io/v1beta1",
        "metadata": {"name": component},
        "startTime": datetime.fromtimestamp(began, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "uptimeSeconds": int(up),
        "goVersion": "",
        "binaryVersion": version,
        "paths": list(paths),
    }
    return json.dumps(status) + "\n"
