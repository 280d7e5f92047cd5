"""`peek` against real ClientHellos of OpenSSL, cut anywhere, and against everything that is none."""

from __future__ import annotations

import ssl

import pytest

from arcbridge.net.client_hello import MAX_HELLO, MAX_RECORDS, ClientHello, Incomplete, NotTls, Reason, peek


def client_hello(alpn: list[str] | None = None, name: str | None = "relay.test") -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if alpn:
        context.set_alpn_protocols(alpn)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def in_records(hello: bytes, size: int) -> bytes:
    """The same handshake message in records of at most `size` bytes."""
    message = hello[5:]
    parts = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(b"\x16\x03\x01" + len(part).to_bytes(2, "big") + part for part in parts)


def with_extension(hello: bytes, kind: int, content: bytes) -> bytes:
    """The hello with one more extension at its end."""
    extra = kind.to_bytes(2, "big") + len(content).to_bytes(2, "big") + content
    message = bytearray(hello[5:])
    at = 4 + 2 + 32
    at += 1 + message[at]
    at += 2 + int.from_bytes(message[at : at + 2], "big")
    at += 1 + message[at]
    size = int.from_bytes(message[at : at + 2], "big") + len(extra)
    message[at : at + 2] = size.to_bytes(2, "big")
    message += extra
    message[1:4] = (len(message) - 4).to_bytes(3, "big")
    return in_records(b"\x16\x03\x01\x00\x00" + bytes(message), 1 << 14)


PLAIN = client_hello(["arcbridge-join/1"])
# The size of a hello with post-quantum key shares (1.5 KiB), and one that needs several segments (9 KiB).
QUANTUM = with_extension(PLAIN, 0xFE0A, b"k" * 1200)
HUGE = with_extension(PLAIN, 0xFE0A, b"k" * 9000)
WANTED = ClientHello((b"arcbridge-join/1",))


@pytest.mark.parametrize("hello", [PLAIN, QUANTUM, in_records(QUANTUM, 500), in_records(PLAIN, 250)])
def test_every_cut_is_incomplete_until_the_last_byte(hello: bytes) -> None:
    last = 0
    for size in range(len(hello)):
        answer = peek(hello[:size])
        assert isinstance(answer, Incomplete), size
        assert size < answer.need <= len(hello)
        assert answer.need >= last
        last = answer.need
    assert peek(hello) == WANTED
    assert peek(hello + b"early data that is none of ours") == WANTED


def test_following_need_reaches_the_answer_in_few_steps() -> None:
    size, steps = 0, 0
    while isinstance(answer := peek(HUGE[:size]), Incomplete):
        size, steps = answer.need, steps + 1
    assert answer == WANTED
    assert steps == 2


def calls(data: bytes) -> int:
    """How often a reader calls that waits until what was asked for is there, and gets one byte at a time."""
    size = count = 0
    answer: object = Incomplete(0)
    while isinstance(answer, Incomplete) and answer.need <= len(data):
        size = answer.need
        answer = peek(data[:size])
        count += 1
    return count


def test_j26_a_hello_in_many_records_is_refused_after_a_few_of_them() -> None:
    longer = b"\x01\x00\x0a\x8c\x03\x03" + b"a" * 2698
    drip = in_records(b"\x16\x03\x01\x00\x00" + longer, 1)
    assert peek(drip) == NotTls(Reason.MANY_RECORDS)
    assert calls(drip) == calls(drip[: len(drip) // 2]) <= 2 * MAX_RECORDS + 2
    assert calls(in_records(QUANTUM, len(QUANTUM) // MAX_RECORDS + 1)) <= 2 * MAX_RECORDS + 2


def test_j26_as_many_records_as_clients_send_are_taken() -> None:
    message = len(QUANTUM) - 5
    assert peek(in_records(QUANTUM, -(-message // MAX_RECORDS))) == WANTED
    assert peek(in_records(QUANTUM, message // (MAX_RECORDS + 1))) == NotTls(Reason.MANY_RECORDS)


@pytest.mark.parametrize(
    ("alpn", "name"), [(None, None), (["http/1.1"], None), (["h2", "http/1.1", "arcbridge-control/1"], "a.example.org")]
)
def test_what_openssl_offers_is_what_is_read(alpn: list[str] | None, name: str | None) -> None:
    assert peek(client_hello(alpn, name)) == ClientHello(tuple(p.encode() for p in alpn or ()))


def test_grease_is_skipped() -> None:
    hello = with_extension(PLAIN, 0x8A8A, b"")
    assert peek(hello) == WANTED


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", Reason.PLAIN_HTTP),
        (b"CONNECT x:443 HTTP/1.1\r\n", Reason.PLAIN_HTTP),
        (b"\x80\x2e\x01\x03\x01\x00\x15", Reason.SSLV2),
        (b"SSH-2.0-OpenSSH_9.2\r\n", Reason.NOT_TLS),
        (b"\x00\x00", Reason.NOT_TLS),
        (b"\x16\x02\x00\x00\x05hello", Reason.NOT_TLS),
        (b"\x16\x03\x01\x00\x00", Reason.MALFORMED),
        (b"\x16\x03\x01\x40\x01", Reason.MALFORMED),
        (b"\x16\x03\x01\x00\x04\x02\x00\x00\x00", Reason.MALFORMED),
        (b"\x16\x03\x01\x00\x04\x01\x00\x00\x00", Reason.MALFORMED),
        (b"\x16\x03\x01\x00\x04\x01\xff\xff\xff", Reason.TOO_LARGE),
        (with_extension(PLAIN, 16, b"\x00\x03\x02h2"), Reason.MALFORMED),
    ],
)
def test_what_is_no_client_hello_says_why(data: bytes, reason: Reason) -> None:
    assert peek(data) == NotTls(reason)


def test_too_large_is_known_before_it_has_arrived() -> None:
    large = with_extension(PLAIN, 0xFE0A, b"k" * MAX_HELLO)
    assert peek(large[:64]) == NotTls(Reason.TOO_LARGE)
    assert peek(in_records(large, 4000)) == NotTls(Reason.TOO_LARGE)


def test_a_verdict_does_not_depend_on_what_comes_behind() -> None:
    """A length that cannot fit, in a record that is cut short by another one that is malformed."""
    hello = bytearray(PLAIN)
    hello[3:5] = b"\x00\x08"
    hello[6] = 1
    assert peek(bytes(hello[:9])) == peek(bytes(hello)) == NotTls(Reason.TOO_LARGE)
    # A record may claim more than the message in it needs: it is not waited for.
    hello = bytearray(PLAIN)
    hello[3:5] = b"\x40\x00"
    assert peek(bytes(hello[:-1])) == Incomplete(len(PLAIN))
    assert peek(bytes(hello)) == WANTED


def test_plain_http_is_not_judged_by_its_first_letter() -> None:
    for size in range(1, 4):
        assert peek(b"GET "[:size]) == Incomplete(size + 1)
    assert peek(b"GEX") == NotTls(Reason.NOT_TLS)
