"""What attackers send as requests: a list by hand, and a grammar in which each part may be wrong.

Each input is `(class, bytes)`; the tests say how many of each class were tried.
"""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

HOST = b"Host: k\r\n"
NEXT = b"GET /api/v1/smuggled HTTP/1.1\r\nHost: k\r\nX-Tag: alice\r\n\r\n"
"""What an attacker hides behind the end of a request that parsers disagree about."""


def _post(headers: bytes, body: bytes, *, version: bytes = b"HTTP/1.1", target: bytes = b"/api/v1/pods") -> bytes:
    return b"POST " + target + b" " + version + b"\r\n" + HOST + headers + b"\r\n" + body


def _get(headers: bytes = b"", target: bytes = b"/api/v1/pods", *, rest: bytes = b"") -> bytes:
    return b"GET " + target + b" HTTP/1.1\r\n" + HOST + headers + b"\r\n" + rest


_CHUNKED = b"Transfer-Encoding: chunked\r\n"
_ZERO = b"0\r\n\r\n"

_LENGTHS = (
    b" +5", b" -5", b" 0x5", b" 5 5", b" 5;", b" 5,", b"", b" ", b" 05", b" 000000000000000000005", b" 5\x0b",
    b" \t5\t ", b" 5\x00", b" five", b" 9" * 1, b" " + b"9" * 30, b" 1_0", b" \xef\xbc\x95", b" 5.0", b" 5e0",
)  # fmt: skip
_ENCODINGS = (
    b": xchunked", b": chunked, identity", b": identity, chunked", b": gzip, chunked", b": chunked, chunked",
    b": Chunked", b": CHUNKED", b":chunked", b":  chunked  ", b":\tchunked", b":\x0bchunked", b": chunked\x0b",
    b': "chunked"', b": chunked;q=1", b": chunked,", b": ,chunked", b": identity", b":", b": \x00chunked",
    b" : chunked", b"\t: chunked", b": chunked\r\n chunked", b":\r\n chunked", b": chunked\r\nTransfer-Encoding: x",
    b": x\r\nTransfer-Encoding: chunked", b": chunked\r\nTransfer-encoding: chunked", b": c\xd1\x85unked",
    b": trailers", b": deflate", b": chunked\nX: 1",
)  # fmt: skip
_ENCODING_NAMES = (
    b"Transfer_Encoding", b"Transfer-Encoding ", b" Transfer-Encoding", b"\tTransfer-Encoding", b"Transfer Encoding",
    b"X-Transfer-Encoding", b"Transfer-Encoding\x00", b"Transfer-Encod\xc4\xb1ng", b"TE", b"Transfer\xc2\xadEncoding",
)  # fmt: skip
_REQUEST_LINES = (
    b"GET /api HTTP/1.2", b"GET /api HTTP/2.0", b"GET /api HTTP/0.9", b"GET /api HTTP/1.10", b"GET /api HTTP/01.1",
    b"GET /api http/1.1", b"GET /api HTTP/1.1 ", b"GET /api  HTTP/1.1", b"GET  /api HTTP/1.1", b" GET /api HTTP/1.1",
    b"GET\t/api HTTP/1.1", b"GET /api\tHTTP/1.1", b"GET /api HTTP/1.1\x0b", b"GET /a b HTTP/1.1", b"GET /api", b"GET",
    b"get /api HTTP/1.1", b"GE T /api HTTP/1.1", b"G\xc3\x89T /api HTTP/1.1", b"PRI * HTTP/2.0", b"GET /api HTTPS/1.1",
    b"GET /api RTSP/1.0", b"GET /api ICE/1.0", b"SOURCE /api ICE/1.0", b"M-SEARCH /api HTTP/1.1", b"\x16\x03\x01\x02",
    b"GET /api HTTP/1.1\r", b"GET /api\x00 HTTP/1.1", b"GET /\x7f HTTP/1.1", b"GET /api HTTP/1.1 HTTP/1.1",
)  # fmt: skip
_METHOD_NAMES = (
    b"CONNECT", b"TRACE", b"PROPFIND", b"OPTIONS", b"HEAD", b"DELETE", b"PUT", b"PATCH", b"QUERY", b"GETT", b"G", b"-",
    b"PURGE",
)  # fmt: skip
_ODD_TARGETS = (
    b"http://10.0.0.1/api", b"https://k/api", b"//10.0.0.1/api", b"///api", b"*", b"k:443", b"api", b"", b"?a",
    b"/api#f", b"/api/../secrets", b"/api/%2e%2e/secrets", b"/api/%2E./x", b"/api/..;/x", b"/api/%00", b"/api\\x",
    b"/api/%5c", b"/api/%0d%0aX:%201", b"/api/%zz", b"/api/%", b"/api/%2", b"/\xc3\xa9", b"/\xff", b"/api?\xff",
    b"/api/%ff", b"/a%2fb", b"/api?a=\r\n", b"/api\r", b"/api?x= y", b"/" + b"a" * 9000, b"/" + b"a" * 70000,
    b"/api?" + b"a&" * 5000, b"/:k@x/", b"file:///etc/passwd", b"/api;x=/../y", b"/api/.%2e;/x", b"http:/api",
    b"/http://10.0.0.1/", b"/api/%u002e", b"/~",
)  # fmt: skip
_NAMES = (
    b"", b" ", b"X ", b"X\t", b" X", b"X Y", b"X_Y", b"X.Y", b"X!#$%&'*+.^`|~Y", b"X(Y)", b"X,Y", b"X;Y", b"X/Y",
    b"X@Y", b"X[Y]", b"X{Y}", b'X"Y"', b"X\\Y", b"X=Y", b"X?Y", b"X\x00Y", b"X\x7fY", b"X\xc3\xa9", b"\xff", b"X:Y",
    b"X" * 70000, b"Host", b"host", b"HOST ", b"Impersonate-User", b"impersonate-user ", b"Impersonate_User",
    b"Impersonate-User\x00", b"X-Remote-User", b"Impersonate-Extra-a%0ab", b"Impersonate-Group", b"Authorization",
    b"Proxy-Authorization", b"Audit-ID", b"Forwarded",
)  # fmt: skip
_VALUES = (
    b"", b" ", b"a\x00b", b"a\rb", b"a\nb", b"a\r\n b", b"a\r\n\tb", b"a\x1fb", b"a\x7fb", b"a\tb", b"\xff",
    b"\xc3\xa9", b"a" * 60000, b"a" * 70000, b"a\r\nImpersonate-User: root", b"a\nImpersonate-User: root",
    b"a\r\n\r\nGET /x HTTP/1.1", b"a%0d%0aX: 1", b"\xe5\x98\x8a\xe5\x98\x8dX: 1", b"a\x00\r\nY: b", b'"quoted"',
    b"a\xc2\xa0", b"\xc2\xa0a", b"a \t ", b"\t a",
)  # fmt: skip
_HOP_BY_HOP = (
    b"Connection: close\r\n", b"Connection: keep-alive, X-Tag\r\nX-Tag: 1\r\n", b"Connection: Impersonate-User\r\n",
    b"Connection:\r\n", b"Connection: Authorization, Host, Audit-ID\r\n", b"Connection: close, close\r\n",
    b"Connection: Close\r\n", b"Connection: ,,\r\n", b"Connection: keep-alive\r\nConnection: close\r\n",
    b"Proxy-Connection: close, X-A\r\nX-A: 1\r\n", b"Keep-Alive: timeout=1\r\n", b"TE: trailers\r\n",
    b"Trailer: Impersonate-User\r\n", b"Connection: Transfer-Encoding\r\n", b'Connection: "close"\r\n',
    b"Connection: close;\r\n", b"Connection: x\x0bclose\r\n",
)  # fmt: skip
_CHUNK_BODIES = (
    b"5\r\nhello\r\n" + _ZERO, b"5\nhello\r\n" + _ZERO, b"5\r\nhello\n" + _ZERO, b"5\r\nhello" + _ZERO,
    b"5 \r\nhello\r\n" + _ZERO, b" 5\r\nhello\r\n" + _ZERO, b"05\r\nhello\r\n" + _ZERO, b"0x5\r\nhello\r\n" + _ZERO,
    b"+5\r\nhello\r\n" + _ZERO, b"-1\r\n", b"\r\n", b"5;a\r\nhello\r\n" + _ZERO, b"5;a=b\r\nhello\r\n" + _ZERO,
    b'5;a="b"\r\nhello\r\n' + _ZERO, b'5;a="\r\n"\r\nhello\r\n' + _ZERO, b"5;a\nhello\r\n" + _ZERO,
    b"5;\nx\r\nhello\r\n" + _ZERO, b"5;\rx\r\nhello\r\n" + _ZERO, b"5;" + b"a" * 20000 + b"\r\nhello\r\n" + _ZERO,
    b"5\t;a\r\nhello\r\n" + _ZERO, b"5\r\nhello\r\n0\r\nX: 1\r\n\r\n",
    b"5\r\nhello\r\n0\r\nImpersonate-User: root\r\n\r\n", b"5\r\nhello\r\n0\r\nContent-Length: 99\r\n\r\n",
    b"5\r\nhello\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n", b"5\r\nhello\r\n0\r\n\n", b"5\r\nhello\r\n0\n\n",
    b"5\r\nhello\r\n0\r\nX: a\n\r\n", b"5\r\nhello\r\n0\r\n X: fold\r\n\r\n", b"5\r\nhello\r\n0\r\nno colon\r\n\r\n",
    b"5\r\nhello\r\n00000\r\n\r\n", b"5\r\nhello\r\n0;x\r\n\r\n", b"FFFFFFFFFFFFFFFF\r\nhello",
    b"FFFFFFFFFFFFFFFFF\r\nhello", b"100000000000000005\r\nhello\r\n" + _ZERO, b"5\r\nhelloworld\r\n" + _ZERO,
    b"a\r\nhello\r\n" + _ZERO, b"5\r\r\nhello\r\n" + _ZERO, b"5\r\nhello\r\r\n" + _ZERO, b"\x35\r\nhello\r\n" + _ZERO,
    b"5\x00\r\nhello\r\n" + _ZERO, b"g\r\n", b"5,5\r\nhello\r\n" + _ZERO,
    b"5\r\nhello\r\n0\r\n" + b"X: 1\r\n" * 2000 + b"\r\n", b"1\r\nh\r\n" * 300 + _ZERO,
)  # fmt: skip
_UPGRADES = (
    b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b"Upgrade: websocket\r\n", b"Connection: Upgrade\r\n",
    b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk\r\n",
    b"Upgrade: SPDY/3.1\r\nConnection: upgrade\r\n", b"Upgrade: websocket, h2c\r\nConnection: Upgrade\r\n",
    b"Upgrade: websocket\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n", b"Upgrade: TLS/1.0\r\nConnection: Upgrade\r\n",
    b"Upgrade:\r\nConnection: Upgrade\r\n", b"Upgrade : websocket\r\nConnection: Upgrade\r\n",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 3\r\n",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nTransfer-Encoding: chunked\r\n",
)  # fmt: skip
_EXPECTATIONS = (
    b"100-continue", b"100-Continue", b"100-continue, x", b"200-ok", b"", b"100-continue\r\nExpect: 100-continue",
    b"100",
)  # fmt: skip

BY_HAND: list[tuple[str, bytes]] = [
    # -- two lengths --------------------------------------------------------------------------------------------------
    ("CL.TE", _post(b"Content-Length: 6\r\n" + _CHUNKED, _ZERO + b"G" + NEXT)),
    ("CL.TE", _post(b"Content-Length: %d\r\n" % (5 + len(NEXT)) + _CHUNKED, _ZERO + NEXT)),
    ("CL.TE", _post(_CHUNKED + b"Content-Length: 5\r\n", _ZERO + NEXT)),
    ("CL.TE", _post(b"Content-Length: 0\r\n" + _CHUNKED, _ZERO + NEXT)),
    ("TE.CL", _post(b"Content-Length: 4\r\n" + _CHUNKED, b"%x\r\n" % len(NEXT) + NEXT + b"\r\n" + _ZERO)),
    ("TE.CL", _post(_CHUNKED + b"Content-Length: 3\r\n", b"%x\r\n" % len(NEXT) + NEXT + b"\r\n" + _ZERO)),
    ("CL.CL", _post(b"Content-Length: 0\r\nContent-Length: %d\r\n" % len(NEXT), NEXT)),
    ("CL.CL", _post(b"Content-Length: %d\r\nContent-Length: 0\r\n" % len(NEXT), NEXT)),
    ("CL.CL", _post(b"Content-Length: 5\r\nContent-Length: 5\r\n", b"hello" + NEXT)),
    ("CL.CL", _post(b"Content-Length: 5, 5\r\n", b"hello" + NEXT)),
    *(("CL", _post(b"Content-Length:" + value + b"\r\n", b"hello" + NEXT)) for value in _LENGTHS),
    # -- one length in doubt ------------------------------------------------------------------------------------------
    *(
        ("TE.TE", _post(b"Transfer-Encoding" + value + b"\r\n", b"5\r\nhello\r\n" + _ZERO + NEXT))
        for value in _ENCODINGS
    ),
    *(("TE.TE", _post(name + b": chunked\r\nContent-Length: %d\r\n" % len(NEXT), NEXT)) for name in _ENCODING_NAMES),
    ("HTTP/1.0", _post(_CHUNKED, b"5\r\nhello\r\n" + _ZERO + NEXT, version=b"HTTP/1.0")),
    ("HTTP/1.0", _post(b"Connection: keep-alive\r\nContent-Length: 5\r\n", b"hello" + NEXT, version=b"HTTP/1.0")),
    ("HTTP/1.0", _post(b"Content-Length: 5\r\n", b"hello" + NEXT, version=b"HTTP/1.0")),
    (
        "HTTP/1.0",
        _post(b"Connection: close, keep-alive\r\nContent-Length: 5\r\n", b"hello" + NEXT, version=b"HTTP/1.0"),
    ),
    ("HTTP/1.0", b"GET /api HTTP/1.0\r\n\r\n" + NEXT),
    ("HTTP/1.0", b"GET /api HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc"),
    # -- versions and request lines -----------------------------------------------------------------------------------
    *(("request line", line + b"\r\n" + HOST + b"\r\n" + NEXT) for line in _REQUEST_LINES),
    ("request line", b"\r\n\r\n" + NEXT),
    ("request line", b"\n" + NEXT),
    ("request line", b"\r" + NEXT),
    ("request line", b"\x00" + NEXT),
    ("request line", b"GET /api\r\n\r\n" + NEXT),
    *(("method", method + b" /api HTTP/1.1\r\n" + HOST + b"\r\n" + NEXT) for method in _METHOD_NAMES),
    ("method", b"CONNECT 10.0.0.1:443 HTTP/1.1\r\n" + HOST + b"\r\n" + NEXT),
    # -- targets ------------------------------------------------------------------------------------------------------
    *(("target", _get(target=target, rest=NEXT)) for target in _ODD_TARGETS),
    # -- line ends ----------------------------------------------------------------------------------------------------
    ("line end", b"GET /api HTTP/1.1\nHost: k\n\n" + NEXT),
    ("line end", b"GET /api HTTP/1.1\r\nHost: k\n\r\n" + NEXT),
    ("line end", b"GET /api HTTP/1.1\r\nHost: k\r\n\n" + NEXT),
    ("line end", b"GET /api HTTP/1.1\nHost: k\r\n\r\n" + NEXT),
    ("line end", b"GET /api HTTP/1.1\r\nHost: k\rX: 1\r\n\r\n" + NEXT),
    ("line end", b"GET /api HTTP/1.1\rHost: k\r\r" + NEXT),
    ("line end", b"GET /api HTTP/1.1\r\r\nHost: k\r\n\r\n" + NEXT),
    ("line end", b"GET /api HTTP/1.1\r\nHost: k\r\r\n\r\n" + NEXT),
    ("line end", b"GET /api HTTP/1.1\r\nHost: k\r\nX: a\r\r\n\r\n" + NEXT),
    ("line end", b"GET /api HTTP/1.1\r\nHost: k\r\n\r\r\n" + NEXT),
    ("line end", b"GET /api HTTP/1.1\r\nHost: k\r\nX: a\nContent-Length: 70\r\n\r\n" + NEXT),
    ("line end", b"GET /api HTTP/1.1\r\nHost: k\r\nX: a\x0bb\r\nY: a\x0cb\r\nZ: a\x85b\r\n\r\n" + NEXT),
    ("line end", b"GET /api HTTP/1.1\r\nHost: k\r\nX: a\xe2\x80\xa8Y: b\r\n\r\n" + NEXT),
    # -- names and values ---------------------------------------------------------------------------------------------
    *(("header name", _get(name + b": 1\r\n", rest=NEXT)) for name in _NAMES),
    *(("header value", _get(b"X-Tag: " + value + b"\r\n", rest=NEXT)) for value in _VALUES),
    ("header name", b"GET /api HTTP/1.1\r\n X: 1\r\nHost: k\r\n\r\n" + NEXT),
    ("header name", b"GET /api HTTP/1.1\r\nnocolon\r\nHost: k\r\n\r\n" + NEXT),
    ("header name", b"GET /api HTTP/1.1\r\n:\r\nHost: k\r\n\r\n" + NEXT),
    ("header count", _get(b"".join(b"X-%d: 1\r\n" % n for n in range(900)), rest=NEXT)),
    ("header count", _get(b"".join(b"X-%d: 1\r\n" % n for n in range(1100)), rest=NEXT)),
    ("header count", _get(b"X: 1\r\n" * 900, rest=NEXT)),
    ("header count", _get(b"".join(b"X-%d: %b\r\n" % (n, b"a" * 50000) for n in range(15)))),
    # -- hop by hop ---------------------------------------------------------------------------------------------------
    *(("hop by hop", _get(headers, rest=NEXT)) for headers in _HOP_BY_HOP),
    ("hop by hop", _post(b"Connection: Content-Length\r\nContent-Length: 5\r\n", b"hello" + NEXT)),
    ("hop by hop", _post(b"Connection: Transfer-Encoding\r\n" + _CHUNKED, b"5\r\nhello\r\n" + _ZERO + NEXT)),
    # -- chunks -------------------------------------------------------------------------------------------------------
    *(("chunks", _post(_CHUNKED, body + NEXT)) for body in _CHUNK_BODIES),
    # -- upgrades -----------------------------------------------------------------------------------------------------
    *(
        ("upgrade", _get(headers, target=target, rest=rest))
        for target in (b"/api/v1/namespaces/a/pods/b/exec?command=id", b"/api/v1/pods")
        for headers in _UPGRADES
        for rest in (b"", NEXT)
    ),
    ("upgrade", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    # -- expectations -------------------------------------------------------------------------------------------------
    *(
        ("expect", _post(b"Expect: " + value + b"\r\nContent-Length: 5\r\n", b"hello" + NEXT))
        for value in _EXPECTATIONS
    ),
    ("expect", _get(b"Expect: 100-continue\r\n", rest=NEXT)),
    ("expect", _post(b"Expect: 100-continue\r\n" + _CHUNKED, b"5\r\nhello\r\n" + _ZERO + NEXT)),
    ("expect", _post(b"Expect: 100-continue\r\nContent-Length: 5\r\n", b"hello", target=b"/api?answer=early") + NEXT),
    # -- pipelines ----------------------------------------------------------------------------------------------------
    ("pipeline", NEXT * 5),
    (
        "pipeline",
        _get() + _post(b"Content-Length: 5\r\n", b"hello") + NEXT + b"HEAD /api HTTP/1.1\r\nHost: k\r\n\r\n" + NEXT,
    ),
    ("pipeline", _post(_CHUNKED, b"5\r\nhello\r\n" + _ZERO) * 3 + NEXT),
    ("pipeline", _get(b"Connection: close\r\n") + NEXT),
    ("pipeline", _get(target=b"/api?answer=abort") + NEXT),
    ("pipeline", _get(target=b"/api?answer=empty") + _get(target=b"/api?answer=unchanged") + NEXT),
    ("pipeline", _get(target=b"/api?answer=trailers") + _get(target=b"/api?answer=hints") + NEXT),
    ("pipeline", _get(target=b"/api?answer=abort%20chunk") + NEXT),
    ("pipeline", _post(b"Content-Length: 5\r\n", b"hello", target=b"/api?answer=early") + NEXT),
    ("pipeline", _get(b"Content-Length: 5\r\n", rest=b"hello") + NEXT),
    ("pipeline", _get(b"Content-Length: 0\r\n") + NEXT),
    ("pipeline", _get(_CHUNKED, rest=_ZERO) + NEXT),
    ("pipeline", b"DELETE /api HTTP/1.1\r\nHost: k\r\n\r\n" + NEXT),
    ("cut", _post(b"Content-Length: 50\r\n", b"hello")),
    ("cut", _post(_CHUNKED, b"5\r\nhel")),
    ("cut", _get()[:-2]),
    ("cut", b"GET /api HT"),
    ("plain", _get(b"Accept: a/b\r\nUser-Agent: x\r\n") + NEXT),
    ("plain", NEXT),
]

# -- a grammar --------------------------------------------------------------------------------------------------------

_METHODS = st.sampled_from([b"GET"] * 6 + [b"POST"] * 4 + [b"PUT", b"DELETE", b"HEAD", b"PATCH", b"OPTIONS"])
_TARGETS = st.sampled_from(
    [b"/api/v1/pods"] * 8
    + [
        b"/api?answer=chunked",
        b"/api?answer=trailers",
        b"/api?answer=hints",
        b"/api?answer=empty",
        b"/api?answer=unchanged",
        b"/api?answer=early",
        b"/api?answer=abort",
        b"/a%2fb?x=%00",
        b"//x",
        b"/%zz",
        b"http://k/api",
        b"/a/../b",
    ]
)
_ENDS = st.sampled_from([b"\r\n"] * 40 + [b"\n", b"\r", b"\r\r\n", b"\r\n ", b"\n\r\n"])
_BODIES = st.sampled_from([b"hello", b"", b"0\r\n\r\n", b"x" * 300, NEXT, b"5\r\nhello\r\n0\r\n\r\n"])
_SPACES = st.sampled_from([b": "] * 20 + [b":", b":\t", b" : ", b":  ", b": \t "])
_HONEST = st.sampled_from([
    (b"Accept", b"application/json"), (b"User-Agent", b"kubectl/v1.37"), (b"X-Tag", b"alice"), (b"Cookie", b"a=b"),
    (b"Accept-Encoding", b"gzip"), (b"Content-Type", b"text/plain"), (b"If-None-Match", b'"x"'), (b"X-Empty", b""),
])  # fmt: skip
_ODD = st.sampled_from([
    (b"Connection", b"close"), (b"Connection", b"keep-alive"), (b"Connection", b"X-Tag, Impersonate-User"),
    (b"TE", b"trailers"), (b"Expect", b"100-continue"), (b"Upgrade", b"websocket"), (b"Connection", b"Upgrade"),
    (b"Host", b"other"), (b"X_Y", b"1"), (b"Transfer-Encoding", b"chunked"), (b"Transfer-Encoding", b"identity"),
    (b"Content-Length", b"5"), (b"Content-Length", b"0"), (b"Trailer", b"X"), (b"Impersonate-User", b"root"),
    (b"X-Remote-User", b"root"), (b"Keep-Alive", b"1"), (b"X", b"a\tb"), (b"X", b"\xc3\xa9"), (b"X", b"\xff"),
    (b"Proxy-Connection", b"close"), (b"Forwarded", b"for=1"), (b"X!#$%&'*+.^`|~", b"1"),
])  # fmt: skip


@st.composite
def _one_request(draw: st.DrawFn, odd: bool) -> bytes:
    method = draw(_METHODS)
    lines = [b"%b %b %b" % (method, draw(_TARGETS), draw(st.sampled_from([b"HTTP/1.1"] * 12 + [b"HTTP/1.0"])))]
    fields = [(b"Host", b"k"), *draw(st.lists(_HONEST, max_size=4))]
    body = b""
    if method not in (b"GET", b"HEAD") or draw(st.integers(0, 9)) == 0:
        body = draw(_BODIES)
        if draw(st.booleans()):
            fields.append((b"Content-Length", b"%d" % len(body)))
        else:
            fields.append((b"Transfer-Encoding", b"chunked"))
            cut = draw(st.integers(0, len(body)))
            extension = draw(st.sampled_from([b""] * 8 + [b";a", b";a=b", b" ", b";\n", b";\r"])) if odd else b""
            parts = [part for part in (body[:cut], body[cut:]) if part]
            trailer = (
                draw(st.sampled_from([b""] * 6 + [b"X-Sum: 1\r\n", b"Impersonate-User: root\r\n", b" x\r\n"]))
                if odd
                else b""
            )
            body = (
                b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts)
                + b"0\r\n"
                + trailer
                + b"\r\n"
            )
    if odd:
        fields += draw(st.lists(_ODD, max_size=2))
        fields = draw(st.permutations(fields))
    out = b""
    for line in [*lines, *(name + (draw(_SPACES) if odd else b": ") + value for name, value in fields), b""]:
        out += line + (draw(_ENDS) if odd else b"\r\n")
    return out + body


@st.composite
def generated(draw: st.DrawFn) -> tuple[str, list[bytes]]:
    """Draw one to four requests in a row, cut anywhere; `(class, pieces)`."""
    kind = draw(st.sampled_from(["generated honest", "generated odd", "generated odd", "generated mutated"]))
    data = b"".join(draw(st.lists(_one_request(kind == "generated odd"), min_size=1, max_size=4)))
    if kind == "generated mutated":
        changed = bytearray(data)
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(changed) - 1))
            what = draw(st.sampled_from(["byte", "delete", "repeat", "insert"]))
            if what == "byte":
                changed[at] = draw(st.sampled_from(b"\r\n\t :,;\x00\x0b\x7f\xff0aZ-_%"))
            elif what == "delete":
                del changed[at : at + draw(st.integers(1, 4))]
            elif what == "repeat":
                changed[at:at] = changed[at : at + draw(st.integers(1, 40))]
            else:
                changed[at:at] = draw(
                    st.sampled_from([b"\r\n", b"\n", b" ", b"\r\n\r\n", b"Content-Length: 3\r\n", b"0\r\n\r\n", NEXT])
                )
            if not changed:
                changed[:] = b"G"
        data = bytes(changed)
    return kind, cut(draw, data)


def cut(draw: st.DrawFn, data: bytes) -> list[bytes]:
    """Cut bytes at up to four places."""
    places = sorted({0, len(data), *draw(st.lists(st.integers(0, len(data)), max_size=4))})
    return [data[start:end] for start, end in itertools.pairwise(places)]
