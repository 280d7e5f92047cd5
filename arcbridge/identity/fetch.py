"""What the verifier needs from a network, without one: the roles pass in `net.fetch.HttpFetcher`."""

from __future__ import annotations

from typing import Protocol


class FetchedDocument(Protocol):
    """A document as fetched: its bytes and for how long (seconds) its server says it stays fresh, if it says so."""

    @property
    def body(self) -> bytes: ...

    @property
    def max_age(self) -> float | None: ...


class Fetch(Protocol):
    """Fetches one https document, bounded in size and time, without redirects.

    `ca_pem` replaces the system's roots when given. Raises `errors.Unreachable` for anything but a 200 with a
    body inside the bounds. Cancellation leaves nothing open.
    """

    async def __call__(self, url: str, ca_pem: str | None) -> FetchedDocument: ...
