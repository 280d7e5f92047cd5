"""Carries records over HTTP: a POST for each batch, as lines of JSON or as one array.

A batch is delivered once the collector has answered 2xx. Redirects are not followed, answers are neither decompressed
nor kept, and above their bound they are a failure. The token is in the request alone.
"""

from __future__ import annotations

import gzip
import ssl
from collections.abc import Sequence
from typing import Final

from arcbridge.audit.sinks.collector import CollectorFailed, RecordsRefused, address_of, context_of, token_of
from arcbridge.audit.sinks.tail import LogRecord
from arcbridge.settings.config import AuditSinkConfig

LINES, ARRAY = "lines", "array"
REFUSES_RECORDS: Final = frozenset({400, 413, 422})
"""Statuses by which a collector says that it will not take the same records later either; not a 413 that says when
(RFC 9110 §15.5.14)."""
_TYPES: Final = {LINES: "application/x-ndjson", ARRAY: "application/json"}


class HttpTransport:
    """Sends batches to one URL."""

    def __init__(self, sink: AuditSinkConfig) -> None:
        """Raises ConfigError."""
        from arcbridge.net.fetch import HttpFetcher  # aiohttp: a quarter of a second, for commands that read settings

        self._sink = sink
        self._address, _ = address_of(sink)
        self._fetch = HttpFetcher(deadline=sink.timeout, keep=True, plain=True)
        self._trust: tuple[object, ssl.SSLContext] | None = None
        """The context of the last request, and what its files were like."""

    async def send(self, records: Sequence[LogRecord]) -> None:
        reply = await self._fetch.ask("POST", self._sink.address, self._context(), headers=self._headers(),
                                      body=self._body(records))  # fmt: skip
        if 200 <= reply.status < 300:
            return
        words = f"{self._address}: answered {reply.status}"
        if reply.status in REFUSES_RECORDS and not (reply.status == 413 and reply.retry_after is not None):
            raise RecordsRefused(words)
        if 300 <= reply.status < 400:
            words += ", and redirects are not followed: write the address that it names"
        later = None if reply.retry_after is None else int(reply.retry_after)
        raise CollectorFailed(words, retry_after=later)

    async def close(self) -> None:
        await self._fetch.close()

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": _TYPES[self._sink.format], "Accept-Encoding": "identity"}
        if self._sink.gzip:
            headers["Content-Encoding"] = "gzip"
        if self._sink.token_file is not None:
            headers["Authorization"] = f"{self._sink.token_scheme} {token_of(self._sink.token_file)}"
        return headers

    def _body(self, records: Sequence[LogRecord]) -> bytes:
        texts = [record.text for record in records]
        body = b"\n".join([*texts, b""]) if self._sink.format == LINES else b"[%s]" % b",".join(texts)
        return gzip.compress(body, 6) if self._sink.gzip else body

    def _context(self) -> ssl.SSLContext:
        """Return the context, the same one until a file of it changes, so that connections are kept."""
        files = (self._sink.ca_file, self._sink.certificate, self._sink.key)
        now = [(status.st_mtime_ns, status.st_ino) for path in files if path is not None and (status := path.stat())]
        if self._trust is None or self._trust[0] != now:
            self._trust = now, context_of(self._sink)
        return self._trust[1]
