"""What a hostile or broken API server answers: a list by hand, and a grammar in which each part may be wrong."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from hypothesis import strategies as st

from .request_inputs import cut

EVIL = b"evil-bytes-of-the-answer-to-alice"
"""The body of most answers: bytes that may reach alice alone, in an answer that is whole or that visibly breaks off."""
HIDDEN = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhidden"
"""An answer behind the answer."""
UPGRADE = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"


@dataclass(frozen=True)
class Answer:
    """One answer of the API server's."""

    kind: str
    pieces: tuple[bytes, ...]
    """What it writes, each piece in a turn of its own."""
    method: str = "GET"
    """Of alice's request; `UPGRADE`: a GET of exec that asks for a WebSocket; `EARLY`: a POST whose body never ends."""
    end: str = "keep"
    """`keep`: the connection stays; `close`: it ends in order; `reset`: without TLS's word."""
    late: bytes = b""
    """What it writes when the connection's next request has come, before the answer to that."""

    @property
    def data(self) -> bytes:
        """All that it writes, but for `late`."""
        return b"".join(self.pieces)


def _ok(headers: bytes = b"", body: bytes = EVIL, *, length: bool = True, status: bytes = b"200 OK") -> bytes:
    framing = b"Content-Length: %d\r\n" % len(body) if length else b""
    return b"HTTP/1.1 " + status + b"\r\n" + framing + headers + b"\r\n" + body


def _chunks(*parts: bytes, end: bytes = b"0\r\n\r\n", headers: bytes = b"Transfer-Encoding: chunked\r\n") -> bytes:
    return b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n" + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in parts) + end


def _raw(headers: bytes, body: bytes, status: bytes = b"200 OK") -> bytes:
    return _ok(headers, body, length=False, status=status)


_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </evil.css>\r\n\r\n"
_NAMES = [
    b"", b" ", b"X ", b" X", b"X\t", b"X Y", b"X_Y", b"X!#$%&'*+.^`|~", b"X(", b"X\x00", b"X\x7f", b"X\xff",
    b"Connection", b"Upgrade", b"Keep-Alive", b"Proxy-Authenticate", b"Trailer", b"TE", b"Set-Cookie", b"Server",
    b"X" * 40000,
]  # fmt: skip
_VALUES = [
    b"", b" ", b"a\x00b", b"a\rb", b"a\nb", b"a\r\n b", b"a\r\n\tb", b"a\x01b", b"a\x7fb", b"a\tb", b"\xff\xfe",
    b"\xc3\xa9", b"a" * 40000, b"a" * 70000, b"a\r\nX-Evil: 1", b"a\nContent-Length: 1", b"a\r\n\r\n" + EVIL, b"a\x0bb",
    b"a \t ",
]  # fmt: skip
_LENGTHS = [
    b"+33", b"-33", b"0x21", b"33, 33", b"33,34", b"33;", b"", b" ", b"033", b"3 3", b"33\x00", b"9" * 18, b"9" * 30,
    b"33.0", b"\xef\xbc\x933", b"\t33 ", b"0" * 30 + b"33",
]  # fmt: skip
_ENCODINGS = [
    b"chunked", b"Chunked", b" chunked ", b"identity", b"gzip", b"gzip, chunked", b"chunked, gzip", b"chunked, chunked",
    b"chunked,", b",chunked", b"", b"\x0bchunked", b"xchunked", b"chunked;q=1", b'"chunked"',
    b"chunked\r\nTransfer-Encoding: chunked", b"chunked\r\n\tx", b"chunked\r\nTransfer-Encoding: identity",
    b"identity\r\nTransfer-Encoding: chunked",
]  # fmt: skip
_BODY = b"%x\r\n%b\r\n" % (len(EVIL), EVIL)
_CHUNK_BODIES = [
    b"21;a\r\n" + EVIL + b"\r\n0\r\n\r\n", b"21;a=b\r\n" + EVIL + b"\r\n0\r\n\r\n",
    b'21;a="\r\n"\r\n' + EVIL + b"\r\n0\r\n\r\n", b"21\n" + EVIL + b"\r\n0\r\n\r\n", b"21\r\n" + EVIL + b"\n0\r\n\r\n",
    b"21 \r\n" + EVIL + b"\r\n0\r\n\r\n", b" 21\r\n" + EVIL + b"\r\n0\r\n\r\n", b"0x21\r\n" + EVIL + b"\r\n0\r\n\r\n",
    b"+21\r\n" + EVIL + b"\r\n0\r\n\r\n", b"-1\r\n", b"\r\n", b"zz\r\n", b"21\r\r\n" + EVIL + b"\r\n0\r\n\r\n",
    b"22\r\n" + EVIL + b"\r\n0\r\n\r\n", b"20\r\n" + EVIL + b"\r\n0\r\n\r\n",
    b"0000000000000021\r\n" + EVIL + b"\r\n0\r\n\r\n", b"00000000000000021\r\n" + EVIL + b"\r\n0\r\n\r\n",
    b"FFFFFFFFFFFFFFFF\r\n" + EVIL, b"FFFFFFFFFFFFFFFFF\r\n" + EVIL, b"1" * 40, b"21;\n" + EVIL + b"\r\n0\r\n\r\n",
    b"21;" + b"a" * 5000 + b"\r\n" + EVIL + b"\r\n0\r\n\r\n", _BODY + b"0\r\n\n", _BODY + b"0\n\r\n", _BODY + b"0\n\n",
    _BODY + b"0;a\r\n\r\n", _BODY + b"000\r\n\r\n", _BODY + b"00000000000000000000\r\n\r\n",
    b"2_1\r\n" + EVIL + b"\r\n0\r\n\r\n", b"21\x00\r\n" + EVIL,
]  # fmt: skip
_TRAILERS = [
    b"X: 1\r\n", b"Impersonate-User: root\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n",
    b" fold\r\n", b"no colon\r\n", b"X: 1\n", b"X: a\x00b\r\n", b"X: 1\r\n" * 3000, b"X: " + b"a" * 70000 + b"\r\n",
    b"\x00\r\n", b"X : 1\r\n", b"HTTP/1.1 200 OK\r\n",
]  # fmt: skip
_STATUS_LINES = [
    b"HTTP/1.0 200 OK", b"HTTP/0.9 200 OK", b"HTTP/2.0 200 OK", b"HTTP/1.2 200 OK", b"http/1.1 200 OK",
    b"HTTP/1.1 20 OK", b"HTTP/1.1 2000 OK", b"HTTP/1.1 000 OK", b"HTTP/1.1 099 OK", b"HTTP/1.1 600 Odd",
    b"HTTP/1.1 799 Odd", b"HTTP/1.1 999 Odd", b"HTTP/1.1 abc OK", b"HTTP/1.1 200", b"HTTP/1.1 200 ",
    b"HTTP/1.1  200 OK", b"HTTP/1.1 200  OK", b"HTTP/1.1\t200 OK", b"HTTP/1.1 200\tOK", b" HTTP/1.1 200 OK",
    b"HTTP/1.1 200 O\x00K", b"HTTP/1.1 200 O\rK", b"HTTP/1.1 200 \xc3\xa9", b"HTTP/1.1 +200 OK", b"HTTP/1.1 200OK",
    b"ICY 200 OK", b"SSH-2.0-OpenSSH", b"\r\nHTTP/1.1 200 OK", b"\nHTTP/1.1 200 OK", b"HTTP/1.1 200 " + EVIL,
    b"HTTP/1.1 205 Reset Content", b"HTTP/1.1 206 Partial", b"HTTP/1.1 418 I'm a teapot", b"\x00" * 20,
]  # fmt: skip

BY_HAND: list[Answer] = [
    Answer("plain", (_ok(),)),
    Answer("plain", (_ok(body=b""),)),
    Answer("plain", (_chunks(EVIL),)),
    Answer("plain", (_chunks(EVIL, EVIL[:1], EVIL * 9),)),
    Answer("plain", (_ok(body=EVIL * 5000),)),
    Answer("plain", (_ok(b"Connection: close\r\n"),), end="close"),
    Answer("plain", (_ok(),), "POST"),
    Answer("plain", (_chunks(EVIL),), "DELETE"),
    Answer("plain", (_raw(b"Content-Length: 33\r\n", b""),), "HEAD"),
    # -- interim answers ----------------------------------------------------------------------------------------------
    *(Answer("1xx", (_HINTS * count + _ok(),)) for count in (1, 2, 5, 6, 50)),
    *(Answer("1xx", (_HINTS,) * count + (_ok(),)) for count in (1, 5, 6)),
    Answer("1xx", (_HINTS,), end="close"),
    Answer("1xx", (_HINTS,), end="reset"),
    Answer("1xx", (_HINTS[:-2],), end="close"),
    *(
        Answer("1xx", (b"HTTP/1.1 " + line + b"\r\n\r\n" + _ok(),))
        for line in (b"100 Continue", b"102 X", b"199 X", b"100")
    ),
    Answer("1xx", (b"HTTP/1.1 103 X\r\nContent-Length: 5\r\n\r\n" + _ok(),)),
    Answer("1xx", (b"HTTP/1.1 103 X\r\nContent-Length: 5\r\n\r\nhello" + _ok(),)),
    Answer("1xx", (b"HTTP/1.1 103 X\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + _ok(),)),
    Answer("1xx", (b"HTTP/1.1 103 X\r\nX: " + b"a" * 70000 + b"\r\n\r\n" + _ok(),)),
    Answer("1xx", (b"HTTP/1.1 103 X\nX: 1\n\n" + _ok(),)),
    Answer("1xx", (_ok() + _HINTS,)),
    Answer("1xx", (_ok() + b"HTTP/1.1 100 Continue\r\n\r\n" + HIDDEN,)),
    Answer("1xx", (b"HTTP/1.1 100 Continue\r\n\r\n", _ok()), "POST"),
    # -- switching ----------------------------------------------------------------------------------------------------
    *(
        Answer("101", (b"HTTP/1.1 101 Switching Protocols\r\n" + headers + b"\r\n" + EVIL,), method)
        for headers in (
            b"",
            UPGRADE,
            b"Upgrade: websocket\r\n",
            b"Connection: Upgrade\r\n",
            b"Connection: Upgrade\r\nUpgrade: h2c\r\n",
            UPGRADE + b"Content-Length: 0\r\n",
            UPGRADE + b"Transfer-Encoding: chunked\r\n",
            UPGRADE + b"Upgrade: h2c\r\n",
            UPGRADE + b"Sec-WebSocket-Protocol: not-offered\r\n",
            UPGRADE + b"X: a\x00b\r\n",
            UPGRADE + b"X: a\r\n fold\r\n",
        )
        for method in ("GET", "UPGRADE", "POST")
    ),
    Answer("101", (_HINTS + b"HTTP/1.1 101 X\r\n" + UPGRADE + b"\r\n" + EVIL,), "UPGRADE"),
    Answer("101", (_ok() + HIDDEN,), "UPGRADE"),
    Answer("101", (_ok(status=b"403 Forbidden"), HIDDEN), "UPGRADE"),
    Answer("101", (_chunks(EVIL),), "UPGRADE"),
    Answer("101", (b"",), "UPGRADE", end="close"),
    # -- early answers ------------------------------------------------------------------------------------------------
    Answer("early", (_ok(status=b"413 Too Large"),), "EARLY"),
    Answer("early", (_ok(status=b"413 Too Large"),), "EARLY", end="close"),
    Answer("early", (_ok(status=b"413 Too Large"),), "EARLY", end="reset"),
    Answer("early", (_chunks(EVIL),), "EARLY"),
    Answer("early", (_chunks(EVIL, end=b""),), "EARLY", end="reset"),
    Answer("early", (_ok()[:-5],), "EARLY", end="close"),
    Answer("early", (b"",), "EARLY", end="close"),
    Answer("early", (b"HTTP/1.1 100 Continue\r\n\r\n" + _ok(),), "EARLY"),
    # -- bodies where there are none ----------------------------------------------------------------------------------
    *(
        Answer("bodiless", (_raw(headers, body, status),), method)
        for status, method in (
            (b"200 OK", "HEAD"),
            (b"204 No Content", "GET"),
            (b"304 Not Modified", "GET"),
            (b"204 X", "DELETE"),
        )
        for headers, body in (
            (b"", b""),
            (b"", EVIL),
            (b"Content-Length: 33\r\n", EVIL),
            (b"Content-Length: 33\r\n", b""),
            (b"Content-Length: 0\r\n", EVIL),
            (b"Transfer-Encoding: chunked\r\n", _BODY + b"0\r\n\r\n"),
            (b"Transfer-Encoding: chunked\r\n", b""),
            (b"", HIDDEN),
            (b"Content-Length: 44\r\n", HIDDEN),
            (b"Content-Length: 5\r\nContent-Length: 6\r\n", EVIL),
            (b"Content-Length: x\r\n", b""),
            (b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
            (b"Transfer-Encoding: gzip\r\n", b""),
        )
    ),
    *(
        Answer("late body", (_raw(headers, b"", status),), method, late=late)
        for status, method in ((b"200 OK", "HEAD"), (b"204 No Content", "GET"), (b"304 Not Modified", "GET"))
        for headers, late in (
            (b"Content-Length: 44\r\n", HIDDEN),
            (b"Content-Length: 33\r\n", EVIL),
            (b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n" + HIDDEN),
        )
    ),
    # -- lengths ------------------------------------------------------------------------------------------------------
    *(
        Answer("length", (_raw(b"Content-Length: " + value + b"\r\n", EVIL),), end=end)
        for value in _LENGTHS
        for end in ("keep", "close")
    ),
    Answer("length", (_raw(b"", EVIL),), end="close"),
    Answer("length", (_raw(b"Connection: close\r\n", EVIL),), end="close"),
    Answer("length", (_raw(b"", EVIL),), end="reset"),
    Answer("length", (_raw(b"Content-Length: 34\r\n", EVIL),), end="close"),
    Answer("length", (_raw(b"Content-Length: 34\r\n", EVIL),), end="reset"),
    Answer("length", (_raw(b"Content-Length: 34\r\n", EVIL),)),
    Answer("length", (_raw(b"Content-Length: 32\r\n", EVIL),)),
    Answer("length", (_raw(b"Content-Length: 0\r\n", EVIL),)),
    Answer("length", (_raw(b"Content-Length: 33\r\nContent-Length: 33\r\n", EVIL),)),
    Answer("length", (_raw(b"Content-Length: 33\r\nContent-Length: 0\r\n", EVIL),)),
    Answer("length", (_raw(b"Content-Length: 33\r\ncontent-length: 5\r\n", EVIL),)),
    Answer("length", (_raw(b"Content_Length: 33\r\n", EVIL),), end="close"),
    Answer("both lengths", (_raw(b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", _BODY + b"0\r\n\r\n"),)),
    Answer("both lengths", (_raw(b"Transfer-Encoding: chunked\r\nContent-Length: 48\r\n", _BODY + b"0\r\n\r\n"),)),
    Answer("both lengths", (_raw(b"Transfer-Encoding: identity\r\nContent-Length: 33\r\n", EVIL),)),
    *(
        Answer("encoding", (_raw(b"Transfer-Encoding:" + value + b"\r\n", _BODY + b"0\r\n\r\n"),), end=end)
        for value in _ENCODINGS
        for end in ("keep", "close")
    ),
    # -- chunks -------------------------------------------------------------------------------------------------------
    *(
        Answer("chunks", (_raw(b"Transfer-Encoding: chunked\r\n", body),), end=end)
        for body in _CHUNK_BODIES
        for end in ("keep", "close")
    ),
    *(
        Answer("trailers", (_chunks(EVIL, end=b"0\r\n" + trailer + b"\r\n"),), end=end)
        for trailer in _TRAILERS
        for end in ("keep", "close")
    ),
    Answer(
        "trailers",
        (_chunks(EVIL, end=b"0\r\nX: 1\r\n\r\n", headers=b"Trailer: X\r\nTransfer-Encoding: chunked\r\n") + HIDDEN,),
    ),
    *(
        Answer("abort", (_chunks(EVIL, EVIL)[:-size],), end=end)
        for size in (1, 2, 3, 4, 5, 6, 7, 10, 40, 41, 42, 80, 90)
        for end in ("close", "reset")
    ),
    *(Answer("abort", (_ok()[:-size],), end=end) for size in (1, 33, 34, 36, 40, 60) for end in ("close", "reset")),
    # -- heads --------------------------------------------------------------------------------------------------------
    *(Answer("status line", (line + b"\r\nContent-Length: 33\r\n\r\n" + EVIL,)) for line in _STATUS_LINES),
    *(Answer("header name", (_ok(name + b": evil\r\n"),)) for name in _NAMES),
    *(Answer("header value", (_ok(b"X: " + value + b"\r\n"),)) for value in _VALUES),
    Answer("fold", (b"HTTP/1.1 200 OK\r\nContent-Length:\r\n 33\r\n\r\n" + EVIL,)),
    Answer("fold", (b"HTTP/1.1 200 OK\r\nTransfer-Encoding:\r\n\tchunked\r\n\r\n" + _BODY + b"0\r\n\r\n",)),
    Answer("fold", (b"HTTP/1.1 200 OK\r\n Content-Length: 33\r\n\r\n" + EVIL,)),
    Answer("line end", (b"HTTP/1.1 200 OK\nContent-Length: 33\n\n" + EVIL,)),
    Answer("line end", (b"HTTP/1.1 200 OK\r\nContent-Length: 33\n\r\n" + EVIL,)),
    Answer("line end", (b"HTTP/1.1 200 OK\r\nContent-Length: 33\r\n\n" + EVIL,)),
    Answer("line end", (b"HTTP/1.1 200 OK\r\nContent-Length: 33\r\r\n\r\n" + EVIL,)),
    Answer("line end", (b"HTTP/1.1 200 OK\r\nX: 1\rContent-Length: 0\r\nContent-Length: 33\r\n\r\n" + EVIL,)),
    Answer("huge head", (_ok(b"".join(b"X-%d: %b\r\n" % (n, b"a" * 1000) for n in range(60))),)),
    Answer("huge head", (_ok(b"".join(b"X-%d: %b\r\n" % (n, b"a" * 1000) for n in range(80))),)),
    Answer("huge head", (_ok(b"X: 1\r\n" * 12000),)),
    Answer("huge head", (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200000,)),
    Answer("hop by hop", (_ok(b"Connection: X-Evil\r\nX-Evil: 1\r\nKeep-Alive: 1\r\nProxy-Authenticate: x\r\n"),)),
    Answer("hop by hop", (_ok(b"Connection: Content-Length\r\n"),)),
    Answer("hop by hop", (_ok(b"Connection: close, keep-alive\r\n"),)),
    Answer("hop by hop", (_ok(b"Connection: keep-alive\r\nConnection: close\r\n"),)),
    Answer("hop by hop", (_ok(b"Upgrade: h2c\r\nConnection: Upgrade\r\n"),)),
    # -- more than an answer ------------------------------------------------------------------------------------------
    Answer("stray", (_ok() + b"x",)),
    Answer("stray", (_ok(), b"x")),
    Answer("stray", (_ok() + HIDDEN,)),
    Answer("stray", (_ok(), HIDDEN)),
    Answer("stray", (_chunks(EVIL) + HIDDEN,)),
    Answer("stray", (_chunks(EVIL), HIDDEN)),
    Answer("stray", (_ok(body=b"") + HIDDEN * 20,)),
    Answer("stray", (_ok() + b"\r\n",)),
    Answer("stray", (_ok() + HIDDEN,), "POST"),
    Answer("stray", (_ok(b"Connection: close\r\n") + HIDDEN,)),
    Answer("nothing", (b"",), end="close"),
    Answer("nothing", (b"",), end="reset"),
    Answer("nothing", (b"",), "POST", end="close"),
    Answer("nothing", (b"",)),
]

# -- a grammar --------------------------------------------------------------------------------------------------------

_STATUSES = st.sampled_from(
    [b"200 OK"] * 6
    + [b"404 X", b"500 X", b"204 X", b"304 X", b"302 X", b"100 X", b"103 X", b"101 X", b"600 X", b"20 X"]
)
_ENDS = st.sampled_from([b"\r\n"] * 50 + [b"\n", b"\r", b"\r\r\n", b"\r\n "])
_FIELDS = st.sampled_from([
    b"Content-Type: application/json", b"Audit-Id: x", b"Warning: 299 - x", b"Date: x", b"Server: x",
    b"Set-Cookie: a=b", b"Cache-Control: no",
])  # fmt: skip
_ODD_FIELDS = st.sampled_from([
    b"Connection: close", b"Connection: X-A", b"Keep-Alive: 1", b"Upgrade: h2c", b"Trailer: X", b"Content-Length: 5",
    b"Content-Length: 33", b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", b"X_Y: 1", b"X: \xff",
    b"X: a\x00", b"X : 1", b"Proxy-X: 1", b"TE: x", b"X:",
])  # fmt: skip


@st.composite
def generated(draw: st.DrawFn) -> Answer:
    """Draw one answer, with or without something behind it, cut anywhere."""
    kind = draw(st.sampled_from(["generated honest", "generated odd", "generated odd", "generated mutated"]))
    odd = kind == "generated odd"
    method = draw(st.sampled_from(["GET"] * 6 + ["HEAD", "POST", "DELETE"]))
    data = draw(st.sampled_from([b""] * 6 + [_HINTS, _HINTS * 2])) if odd else b""
    status = draw(_STATUSES) if odd else draw(st.sampled_from([b"200 OK"] * 3 + [b"404 X", b"204 X", b"304 X"]))
    body = draw(st.sampled_from([EVIL, b"", EVIL * 20, b"0\r\n\r\n", HIDDEN]))
    fields = draw(st.lists(_FIELDS, max_size=3))
    bodiless = method == "HEAD" or status[:3] in (b"204", b"304")
    if draw(st.booleans()):
        fields.append(
            b"Content-Length: %d" % (len(body) + (draw(st.sampled_from([0] * 6 + [1, -1, 100])) if odd and body else 0))
        )
    else:
        fields.append(b"Transfer-Encoding: chunked")
        places = sorted({0, len(body), *draw(st.lists(st.integers(0, len(body)), max_size=3))})
        parts = [body[start:end] for start, end in itertools.pairwise(places)]
        extension = draw(st.sampled_from([b""] * 10 + [b";a", b" ", b"\r"])) if odd else b""
        trailer = draw(st.sampled_from([b""] * 6 + [b"X: 1\r\n", b"x\r\n", b"\n"])) if odd else b""
        body = (
            b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts) + b"0\r\n" + trailer + b"\r\n"
        )
    if bodiless and not (odd and draw(st.booleans())):
        body = b""
    if odd:
        fields = draw(st.permutations(fields + draw(st.lists(_ODD_FIELDS, max_size=2))))
    for line in [b"HTTP/1.1 " + status, *fields, b""]:
        data += line + (draw(_ENDS) if odd else b"\r\n")
    data += body
    if odd:
        data += draw(st.sampled_from([b""] * 8 + [b"x", HIDDEN, b"\r\n", _HINTS]))
        if draw(st.integers(0, 7)) == 0:
            data = data[: draw(st.integers(0, len(data)))]
    if kind == "generated mutated":
        changed = bytearray(data)
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(changed)))
            match draw(st.integers(0, 3)):
                case 0:
                    changed[at : at + 1] = bytes([draw(st.sampled_from(b"\r\n\t :,;\x00\x0b\x7f\xff0aZ-_%"))])
                case 1:
                    del changed[at : at + draw(st.integers(1, 4))]
                case 2:
                    changed[at:at] = changed[at : at + draw(st.integers(1, 40))]
                case _:
                    changed[at:at] = draw(
                        st.sampled_from(
                            [b"\r\n", b"\n", b" ", b"\r\n\r\n", b"Content-Length: 3\r\n", b"0\r\n\r\n", HIDDEN]
                        )
                    )
        data = bytes(changed)
    end = draw(st.sampled_from(["keep", "keep", "close", "reset"]))
    return Answer(kind, tuple(cut(draw, data)) or (b"",), method, end)
