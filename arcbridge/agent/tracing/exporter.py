"""Sends finished spans to an OpenTelemetry collector: OTLP over HTTP, in JSON, some at a time.

Requests never wait for it. Spans wait in memory, `MOST_WAITING` at most; a span that finds no room is dropped and
counted, and so is a batch that the collector refuses. A collector that is away, or says "later", gets the same batch
again; the batch that an end of the agent meets is tried once more.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from itertools import islice
from typing import Final

import structlog

from arcbridge.agent.kube.request_facts import RequestFacts
from arcbridge.agent.tracing.spans import FinishedSpan, Span, export_request, span_of
from arcbridge.audit.sinks.collector import http_address, token_of
from arcbridge.errors import ArcbridgeError
from arcbridge.net.backoff import Backoff
from arcbridge.net.fetch import HttpFetcher
from arcbridge.net.system_trust import read_cas
from arcbridge.observe.metrics import Metrics
from arcbridge.settings.config import TracingConfig
from arcbridge.tasks import in_time
from arcbridge.untrusted_json import read_json_object

MOST_WAITING: Final = 4096
"""Spans: some 2 MB."""
BATCH: Final = 128
"""Spans of one request to the collector: 90 KiB, and the event loop makes them in 2 ms."""
GATHERING: Final = 2.0
"""Seconds for which spans gather, unless a batch is full."""
LAST: Final = 0.5
"""Seconds for the last batch, when the agent stops."""
_DEADLINE: Final = 10.0
_LATER: Final = frozenset({429, 502, 503, 504})
"""https://opentelemetry.io/docs/specs/otlp/#failures-1: statuses after which the same batch is sent again."""
DROPS: Final = ("full", "refused", "stopped", "defect")
"""Why spans were dropped: no room, the collector does not take them, the agent ends, or a defect of the agent."""
_TOKEN_FILE: Final = "tracing.token_file"

log = structlog.get_logger("arcbridge.agent")


class SpanExporter:
    """The spans of one agent. `run` sends until it is cancelled."""

    def __init__(self, config: TracingConfig, instance: str) -> None:
        """Raises ConfigError, StateError."""
        self._config = config
        self._where, _ = http_address(config.endpoint)
        self._trust = read_cas(config.ca_file, "tracing.ca_file") if config.ca_file is not None else None
        self._instance = instance
        self._waiting: deque[FinishedSpan] = deque()
        self._full = asyncio.Event()
        self._fetch = HttpFetcher(deadline=_DEADLINE, keep=True, plain=True, cut=True)
        self.sent = 0
        self.failures = 0
        self.dropped = dict.fromkeys(DROPS, 0)
        self._failing = ""
        """Why the last batch was not delivered."""

    def begin(self, facts: RequestFacts) -> Span | None:
        """Return the span of a request, if its caller samples it."""
        return span_of(facts, self._take)

    def register(self, metrics: Metrics) -> None:
        """Tell `metrics` where to read."""
        metrics.counter("spans_sent_total", "Spans that the collector has.", None, lambda: self.sent)
        metrics.counter("spans_dropped_total", "Spans that were dropped, by why.", {"reason": DROPS},
                        lambda: self.dropped)  # fmt: skip
        metrics.counter("span_export_failures_total", "Batches of spans that were not delivered.", None,
                        lambda: self.failures)  # fmt: skip
        metrics.gauge("spans_waiting", "Spans that wait to be sent.", None, lambda: len(self._waiting))

    async def run(self) -> None:
        """Send spans until this is cancelled; then what waits is sent, if the collector takes it at once."""
        backoff = Backoff(first=GATHERING)
        try:
            while True:
                await in_time(self._full.wait(), GATHERING)
                if self._waiting and (later := await self._send_or_drop()) is not None:
                    await asyncio.sleep(backoff.next_delay(hint=later))
                else:
                    backoff.reset()
        finally:
            await in_time(self._send_rest(), LAST)
            if self._waiting:
                self.dropped["stopped"] += len(self._waiting)
                log.warning("spans lost at the end", count=len(self._waiting))
            await self._fetch.close()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _take(self, span: FinishedSpan) -> None:
        if len(self._waiting) >= MOST_WAITING:
            self.dropped["full"] += 1
            return
        self._waiting.append(span)
        if len(self._waiting) == BATCH:
            self._full.set()

    async def _send_rest(self) -> None:
        while self._waiting and await self._send_or_drop() is None:
            pass

    async def _send_or_drop(self) -> float | None:
        """Send one batch as `_send` does; a defect costs that batch and no other."""
        try:
            return await self._send()
        except Exception as error:
            asyncio.get_running_loop().call_exception_handler({"message": "spans were not sent", "exception": error})
            self.failures += 1
            self.dropped["defect"] += self._forget(min(BATCH, len(self._waiting)))
            return None

    def _forget(self, count: int) -> int:
        """Be done with the oldest spans."""
        for _ in range(count):
            self._waiting.popleft()
        if len(self._waiting) < BATCH:
            self._full.clear()
        return count

    async def _send(self) -> float | None:
        """Send one batch. Return None where it is done with, else after how many seconds the collector wants it."""
        batch = list(islice(self._waiting, BATCH))
        body = json.dumps(export_request(batch, self._instance), separators=(",", ":")).encode()
        try:
            reply = await self._fetch.ask(
                "POST", self._config.endpoint, self._trust, headers=self._headers(), body=body
            )
        except ArcbridgeError as error:
            return self._failed(error.message, 0.0)
        if reply.status in _LATER:
            return self._failed(f"{self._where}: answered {reply.status}", reply.retry_after or 0.0)
        self._forget(len(batch))
        rejected = len(batch)
        if 200 <= reply.status < 300:
            rejected = _rejected(reply.body, len(batch))
            self.sent += len(batch) - rejected
        self.dropped["refused"] += rejected
        if rejected:
            self._failed(f"{self._where}: answered {reply.status}, and {rejected} of {len(batch)} are refused", 0.0)
        elif self._failing:
            self._failing = ""
            log.info("spans are sent again")
        return None

    def _failed(self, words: str, later: float) -> float:
        self.failures += 1
        if words != self._failing:
            self._failing = words
            log.warning("spans not sent", reason=words)
        return min(later, 300.0)

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._config.token_file is not None:
            headers["Authorization"] = f"Bearer {token_of(self._config.token_file, _TOKEN_FILE)}"
        return headers


def _rejected(body: bytes, most: int) -> int:
    """Return how many spans of a batch a collector says that it did not take; 0 where it does not say."""
    try:
        partial = read_json_object(body).get("partialSuccess")
        return max(0, min(int(partial["rejectedSpans"]), most)) if isinstance(partial, dict) else 0
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0
