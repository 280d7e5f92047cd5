"""The walk of a GET from its stream to the API server enters each module once (docs/decisions/0041-one-walk.md)."""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType, FrameType

import pytest

from arcbridge.agent import accounts
from arcbridge.agent.kube import proxy
from arcbridge.agent.kube.upstream_pool import UpstreamConnection

from .bench import PODS, running

HOUSE = Path(proxy.__file__).parent
DECIDES = ["attempt", "accounts", "request_target", "request_info", "authorize", "apiserver"]
SENDS = ["exchange", "upstream_pool", "connect_limit"]
WALKS = {
    "fast": ["fast_path", "fast_path_parser", *DECIDES, "caller", *SENDS],
    # The server's protocol takes the bytes; aiohttp's task, which is the server's too, comes later.
    "general": ["server", "server", "proxy", "request_facts", *DECIDES, "impersonation", "caller", "upgrade", *SENDS],
}


def module_of(code: CodeType) -> str:
    """Return the module of the agent that holds some code; empty for all that is not walked through."""
    path = Path(code.co_filename)
    return path.stem if path.parent == HOUSE or code.co_filename == accounts.__file__ else ""


class Walk:
    """The modules that are entered until a request is sent, each as often as it is: one that is entered while it is
    left for a call of its own is not entered anew."""

    def __init__(self) -> None:
        self.stays: list[str] = []
        self._over = False

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        module = "" if self._over or event not in ("call", "return") else module_of(frame.f_code)
        if event == "return":
            self._over = self._over or frame.f_code is UpstreamConnection.send.__code__
        elif module:
            below = frame.f_back
            while below is not None and module_of(below.f_code) != module:
                below = below.f_back
            if below is None:
                self.stays.append(module)


@pytest.mark.parametrize("entrance", WALKS)
async def test_a_get_enters_each_module_once(tmp_path: Path, entrance: str) -> None:
    head = (
        f"GET {PODS}?limit=%d&{entrance} HTTP/1.1\r\nHost: k\r\n"
        + "TE: trailers\r\n" * (entrance == "general")
        + "\r\n"
    )
    async with running(tmp_path) as bench:
        # A session's first request dials, and fills what the session remembers.
        wire = await bench.begin((head % 1).encode())
        assert (await wire.answer()).status == 200
        walk = Walk()
        sys.setprofile(walk)
        try:
            await wire.send((head % 2).encode())
            assert (await wire.answer()).status == 200
        finally:
            sys.setprofile(None)
    assert walk.stays == WALKS[entrance]
