"""The program of `tests.support.collector`: takes records by HTTP (aiohttp), or by syslog with a parser of its own.

It appends what it has got to a file, before it answers or ends the connection. The parser is written from RFC 5424 and
RFC 5425 alone, and breaks off at anything that they do not allow. It imports little, because tests start it often.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import socketserver
import ssl
import sys
from pathlib import Path
from typing import ClassVar

_HEADER = re.compile(
    rb"<(?P<pri>0|[1-9]\d{0,2})>1 "
    rb"(?P<time>-|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?(?:Z|[+-]\d\d:\d\d)) "
    rb"(?P<host>[!-~]{1,255}) (?P<app>[!-~]{1,48}) (?P<proc>[!-~]{1,128}) (?P<id>[!-~]{1,32}) "
)
_PARAMETER = rb' [^= \]"]{1,32}="(?:[^"\\\]]|\\["\\\]])*"'
_DATA = re.compile(rb'\[([^= \]"]{1,32})((?:' + _PARAMETER + rb")*)\]")
_VALUES = re.compile(rb' ([^= \]"]{1,32})="((?:[^"\\\]]|\\["\\\]])*)"')


def parse(message: bytes) -> dict[str, object]:
    """Take a message of RFC 5424 apart. Raises ValueError."""
    header = _HEADER.match(message)
    if header is None or int(header["pri"]) > 191:
        raise ValueError("no header of RFC 5424")
    data = _DATA.match(message, header.end())
    if data is None:
        raise ValueError("no structured data")
    rest = message[data.end() :]
    if rest and not rest.startswith(b" "):
        raise ValueError("no space behind structured data")
    text = rest[1:]
    if text.startswith(b"\xef\xbb\xbf"):
        text = text[3:]
        text.decode()
    elif not text.isascii():
        raise ValueError("UTF-8 without a BOM")
    return {
        **{name: value.decode("ascii") for name, value in header.groupdict().items()},
        "sd_id": data[1].decode(),
        "sd": {name.decode(): value.decode() for name, value in _VALUES.findall(data[2])},
        "bytes": len(message),
        "msg": text.decode(),
    }


class _Syslog(socketserver.StreamRequestHandler):
    """One connection of RFC 5425: octet counting. It answers close_notify when all is in the file, and not before, as
    asyncio does."""

    context: ClassVar[ssl.SSLContext]
    out: ClassVar[Path]

    def setup(self) -> None:
        self.request = self.context.wrap_socket(self.request, server_side=True, suppress_ragged_eofs=False)
        super().setup()

    def handle(self) -> None:
        while count := self._count():
            message = self.rfile.read(count)
            if len(message) < count:
                return  # the sender has ended within a message, and sends it again
            found = parse(message)
            with self.out.open("a") as file:
                file.write(json.dumps(found) + "\n")
        self.request.unwrap()

    def _count(self) -> int:
        """Read an octet count; 0: the sender has ended."""
        digits = b""
        while (byte := self.rfile.read(1)) not in (b" ", b""):
            digits += byte
        if not digits and not byte:
            return 0
        if re.fullmatch(rb"[1-9]\d{0,8}", digits) is None:
            raise ValueError("no octet count")
        return int(digits) if byte else 0


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # of the connection; the sender sends again
            super().handle_error(request, client_address)


def syslog(port: int, context: ssl.SSLContext, out: Path) -> None:
    """Serve until it is killed."""
    _Syslog.context, _Syslog.out = context, out
    with _Server(("127.0.0.1", port), _Syslog) as server:
        print("ready", flush=True)
        server.serve_forever()


async def http(port: int, context: ssl.SSLContext, out: Path) -> None:
    """Take records by POST. A file `OUT.refuse` has the status of all answers, and headers behind it."""
    from aiohttp import web

    async def take(request: web.Request) -> web.Response:
        refusing = out.with_suffix(".refuse")
        if refusing.exists():
            status, *headers = refusing.read_text().splitlines()
            named = dict(line.split(": ", 1) for line in headers)
            return web.Response(status=int(status), headers=named)
        body = await request.read()
        if request.headers.get("Content-Encoding") == "gzip" and body[:2] == b"\x1f\x8b":
            body = gzip.decompress(body)
        lines = body if "ndjson" in request.headers["Content-Type"] else b"".join(
            json.dumps(one, separators=(",", ":"), ensure_ascii=False).encode() + b"\n" for one in json.loads(body)
        )  # fmt: skip
        with out.open("ab") as file:
            file.write(lines)
        with out.with_suffix(".requests").open("a") as file:
            file.write(json.dumps({"path": request.path_qs, **dict(request.headers)}) + "\n")
        return web.Response(status=204)

    app = web.Application(client_max_size=64 << 20)
    app.router.add_post("/{path:.*}", take)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, ssl_context=context).start()
    print("ready", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    kind, port, pem, out = sys.argv[1:]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    if kind == "syslog":
        syslog(int(port), context, Path(out))
    else:
        asyncio.run(http(int(port), context, Path(out)))


if __name__ == "__main__":
    main()
