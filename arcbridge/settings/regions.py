"""Checks the regions of an agent's or a client's settings: names of relays that are preferred, and no duty.

It parses no address by itself and orders no relay (`net.nearest`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from arcbridge.errors import ConfigError
from arcbridge.settings.config import RegionConfig
from arcbridge.settings.problems import Problems

A = TypeVar("A")


def check_regions(
    problems: Problems,
    region: str,
    regions: Mapping[str, RegionConfig],
    parse: Callable[[str], A],
    relays: Collection[A] | None,
) -> frozenset[A]:
    """Return the addresses of the preferred region, none where no region is set; mistakes go to `problems`.

    `parse` raises ConfigError. `relays`: all relays; None: a login names them, and a region may have others.
    """
    found: dict[str, set[A]] = {}
    for name, one in regions.items():
        found[name] = set()
        for n, text in enumerate(one.relays):
            setting = f"regions.{name}.relays[{n}]"
            with problems.collect(setting):
                address = parse(text)
                if relays is not None and address not in relays:
                    raise ConfigError(f"{setting}: {address} is none of `relays`: add it there, or take it out here")
                found[name].add(address)
    if region and region not in found:
        names = f"; the regions are {', '.join(sorted(found))}" if found else ""
        problems.error("region", f'no [regions.{region}] says which relays "{region}" has{names}')
    return frozenset(found.get(region, ()))
