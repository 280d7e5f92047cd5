"""Peers that are written in Go: a module each that pins them, and what their adapters share.

`MODULE/go.mod` names the programs in `tool` lines, `MODULE/go.sum` has the checksum of all they are made of.
"""

from __future__ import annotations

ENVIRONMENT = {"GOGC": "400"}
"""Of every process: garbage is collected when the heap has grown fivefold, not twofold. frp
has little of it."""

GOGC_TOLD = "GOGC=400 (garbage collected less often than by default)"
