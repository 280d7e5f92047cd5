"""Declares the HTTP requests of the verifier, without a network: the roles pass in `net.fetch.HttpFetcher`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of any status. Seconds, where the server gives them: `retry_after` (RFC 9110 §10.2.3), and `max_age`,
    for which its Cache-Control lets it be kept."""

    status: int
    body: bytes
    retry_after: float | None = None
    max_age: float | None = None
    dpop_nonce: str = ""
    """What an issuer wants in the next DPoP proof (RFC 9449 §8)."""


class Fetch(Protocol):
    """Fetches one https document, bounded in size and time, without redirects.

    `ca_pem` replaces the system's roots when given. Raises `errors.Unreachable` for anything but a 200 with a
    body inside the bounds. Cancellation leaves nothing open.
    """

    async def __call__(self, url: str, ca_pem: str | None) -> Reply: ...


class SendRequest(Protocol):
    """Sends one https request and returns its answer, whatever the status; otherwise bounded as `Fetch` is.

    Raises `errors.Unreachable` where no whole answer came.
    """

    async def __call__(
        self, method: str, url: str, ca_pem: str | None, *, headers: Mapping[str, str], body: bytes = b""
    ) -> Reply: ...
