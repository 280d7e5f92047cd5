"""Bounds how deeply lists and mappings in brackets may be nested in YAML, before PyYAML reads on.

PyYAML's own scanner looks at each open bracket again for each that follows, and looks ahead to the last one: 4 KiB of
them take it two seconds. Nested blocks end at Python's recursion limit after some milliseconds, and libyaml has a bound
of its own.
"""

from __future__ import annotations

from typing import Any, Final

DEEPEST: Final = 64
"""Brackets that may be open at once; a kubeconfig has four."""


class ShallowScanner:
    """Stands before a loader of PyYAML among the bases of a class; RecursionError comes from `yaml.load` then."""

    flow_level: int

    def fetch_flow_collection_start(self, token: type) -> None:
        """Read an opening bracket. Raises RecursionError."""
        if self.flow_level >= DEEPEST:
            raise RecursionError("the YAML is nested too deeply")
        scanner: Any = super()
        scanner.fetch_flow_collection_start(token)
