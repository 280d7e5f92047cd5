"""Carries records as syslog messages (RFC 5424) over TLS (RFC 5425), a connection for each batch.

Syslog has no answer. What stands for one is the end of the connection: a receiver answers close_notify once it has read
everything before it (RFC 5425 §4.4), its kernel has acknowledged every byte, and sends no RST, as it does for bytes
that were not read. A batch whose connection ends otherwise is sent again. FIN alone may come from another host on the
path, and counts only where the setting `close_notify` is false.

Invariant: a message is `max_message` bytes at most; structured data has the number and the hash of the record, also
where its text was cut.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Sequence
from typing import Final

from arcbridge.audit.sinks.collector import CollectorFailed, address_of, opened
from arcbridge.audit.sinks.tail import LogRecord
from arcbridge.net.sockets import receive, unacknowledged
from arcbridge.net.tlspipe import TlsPipe
from arcbridge.settings.config import AuditSinkConfig
from arcbridge.tasks import in_time

BOM: Final = b"\xef\xbb\xbf"
"""Begins a message in UTF-8 (RFC 5424 §6.4); one of ASCII alone needs none."""
SD_ID: Final = "arcbridge@32473"
"""The number is the one for examples (RFC 5612): arcbridge has none of its own."""
_CUT_ROOM: Final = 32
"""Bytes that ` cut="…"` takes at most, and the BOM."""
_MOST_BACK: Final = 64 * 1024
"""Bytes that a collector may send before it ends the connection; a syslog receiver sends none."""
_LINGER: Final = 2.0
"""Seconds for a receiver that has answered close_notify to close, or for the RST that says that it has not read all."""
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z", re.ASCII)


def message(record: LogRecord, sink: AuditSinkConfig, *, host: str, app: str) -> bytes:
    """Return one message with its octet count before it (RFC 5425 §4.3.1)."""
    head, fields, text = record.sealed.head, record.sealed.fields, record.text
    when, event = str(fields.get("ts", "")), str(fields.get("event", ""))
    data = f'{SD_ID} chain="{head.chain}" seq="{head.sequence}" hash="{head.hash}"'
    names = f"{_word(host, 255)} {_word(app, 48)} {head.chain} {_word(event, 32)}"
    before = f"<{sink.facility * 8 + sink.severity}>1 {when if _TIME.fullmatch(when) else '-'} {names} [{data}"
    room = sink.max_message - len(before) - len("] ") - _CUT_ROOM
    if len(text) > room:
        text = text[:room].decode("utf-8", "ignore").encode()
        before += f' cut="{len(record.text) - len(text)}"'
    whole = b"%s] %s%s" % (before.encode(), b"" if text.isascii() else BOM, text)
    return b"%d %s" % (len(whole), whole)


class SyslogTransport:
    """Sends batches to one receiver."""

    def __init__(self, sink: AuditSinkConfig, role: str) -> None:
        """Raises ConfigError."""
        self._sink = sink
        self._address, _ = address_of(sink)
        self._host, self._app = socket.gethostname(), f"arcbridge-{role}"

    async def send(self, records: Sequence[LogRecord]) -> None:
        lines = b"".join(message(one, self._sink, host=self._host, app=self._app) for one in records)
        async with opened(self._address, self._sink) as (sock, pipe):
            pipe.feed(lines)
            pipe.feed_close_notify()
            try:
                await pipe.flush()
                await self._wait_for_end(sock, pipe)
            except ssl.SSLError as error:
                reason = error.reason or type(error).__name__
                raise CollectorFailed(f"{self._address}: it ended TLS with an error ({reason})") from error
            if unacknowledged(sock):
                raise CollectorFailed(f"{self._address}: it ended the connection before it had everything")

    async def _wait_for_end(self, sock: socket.socket, pipe: TlsPipe) -> None:
        """Wait until the receiver has ended the connection. Raises OSError where it has not read everything."""
        count = 0
        try:
            while data := await pipe.read():
                count += len(data)
                if count > _MOST_BACK:
                    raise CollectorFailed(f"{self._address}: it sends data, as no syslog receiver does")
        except EOFError as error:
            if not self._sink.close_notify:
                return
            text = "it ended the connection without close_notify: it may not have everything (setting close_notify)"
            raise CollectorFailed(f"{self._address}: {text}") from error
        await in_time(receive(sock, 1), _LINGER)

    async def close(self) -> None:
        return


def _word(text: str, most: int) -> str:
    """Return a header field: printable ASCII without spaces, or the nil value."""
    return re.sub(r"[^!-~]", "", text)[:most] or "-"
