"""Declares the HTTP requests of the verifier, without a network: the roles pass in `net.fetch.HttpFetcher`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class ReplyDocument(Protocol):
    """An answer of any status. Seconds, where the server gives them: `retry_after`, and `max_age`, for which the answer
    stays fresh."""

    @property
    def status(self) -> int: ...

    @property
    def body(self) -> bytes: ...

    @property
    def retry_after(self) -> float | None: ...

    @property
    def max_age(self) -> float | None: ...


class Fetch(Protocol):
    """Fetches one https document, bounded in size and time, without redirects.

    `ca_pem` replaces the system's roots when given. Raises `errors.Unreachable` for anything but a 200 with a
    body inside the bounds. Cancellation leaves nothing open.
    """

    async def __call__(self, url: str, ca_pem: str | None) -> ReplyDocument: ...


class SendRequest(Protocol):
    """Sends one https request and returns its answer, whatever the status; otherwise bounded as `Fetch` is.

    Raises `errors.Unreachable` where no whole answer came.
    """

    async def __call__(
        self, method: str, url: str, ca_pem: str | None, *, headers: Mapping[str, str], body: bytes = b""
    ) -> ReplyDocument: ...
