"""Builds the programs of a Go module beside this file, once for what they are made of."""

from __future__ import annotations

from pathlib import Path

from bench.peers.base import Unavailable
from tests.support import kube_programs

MODULES = Path(__file__).parent


def required_version(module: str, path: str) -> str:
    """The version of `path` that the module is built with, from its go.mod, such as `v1.11.3`."""
    for line in (MODULES / module / "go.mod").read_text().splitlines():
        words = line.removeprefix("require").split("//")[0].split()
        if len(words) == 2 and words[0] == path:
            return words[1]
    raise LookupError(f"{module}/go.mod does not require {path}")


def programs(module: str, names: tuple[str, ...], *, packages: tuple[str, ...] = ("tool",)) -> Path:
    """The directory that has the programs `names`; seconds to minutes the first time, at once afterwards.

    Versions are those of go.mod, and what is downloaded must have the checksum in go.sum. Raises Unavailable.
    """
    try:
        return kube_programs.built(MODULES / module, packages, names, ldflags="-s -w")
    except kube_programs.Unavailable as error:
        raise Unavailable(str(error)) from error
