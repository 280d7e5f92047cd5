"""TLS as this Python's OpenSSL makes it, decrypted with the keys that it gives away."""

from __future__ import annotations

import ssl

import pytest
import trustme

from tests.blindness.tls import Closed, KeyLog, decrypt, hello, read_key_log


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes, KeyLog]:
    """What both ends of a connection sent, behind it some bytes in clear each way, and the keys."""
    directory = tmp_path_factory.mktemp("tls")
    ca = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca.issue_cert("relay.test").configure_cert(server)
    ca.configure_trust(client)
    client.set_alpn_protocols(["first/1", "second/2"])
    server.keylog_filename = str(directory / "keys")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    from_client, from_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, from_client, server_hostname="relay.test"),
        server.wrap_bio(to_server, from_server, server_side=True),
    ]
    sent = [bytearray(), bytearray()]

    def carry() -> None:
        for number, (out, into) in enumerate(((from_client, to_server), (from_server, to_client))):
            data = out.read()
            sent[number] += data
            into.write(data)

    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            carry()
    for end, text in zip(ends, (b"question" * 5000, b"answer" * 5000), strict=True):
        end.write(text)
        carry()
    for end, length in zip(ends, (30_000, 40_000), strict=True):
        while length:
            length -= len(end.read(length))
    for end in ends:
        try:
            end.unwrap()
        except ssl.SSLWantReadError:
            pass
        carry()
    return bytes(sent[0]) + b"behind", bytes(sent[1]) + b"after", read_key_log(directory / "keys")


def test_all_of_it_is_opened(talk: tuple[bytes, bytes, KeyLog]) -> None:
    opened = decrypt(*talk)
    assert opened.hello.server_name == "relay.test"
    assert opened.hello.protocols == ("first/1", "second/2")
    assert opened.from_client == b"question" * 5000
    assert opened.from_server == b"answer" * 5000
    assert b"relay.test" in opened.handshake, "the certificate is among the messages"
    assert (opened.rest_of_client, opened.rest_of_server) == (b"behind", b"after")


def test_without_keys_it_stays_closed(talk: tuple[bytes, bytes, KeyLog]) -> None:
    with pytest.raises(Closed, match="no keys"):
        decrypt(talk[0], talk[1], {})


def test_keys_of_another_connection_open_nothing(talk: tuple[bytes, bytes, KeyLog]) -> None:
    wrong = {place: bytes(len(secret)) for place, secret in talk[2].items()}
    with pytest.raises(Closed, match="do not open record 0"):
        decrypt(talk[0], talk[1], wrong)


def test_a_changed_byte_is_noticed(talk: tuple[bytes, bytes, KeyLog]) -> None:
    changed = bytearray(talk[1])
    changed[-200] ^= 1
    with pytest.raises(Closed, match="do not open record"):
        decrypt(talk[0], bytes(changed), talk[2])


def test_what_is_no_tls_is_said_to_be_none() -> None:
    for text in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x04\x02\x00\x00\x00"):
        with pytest.raises(Closed, match="no TLS"):
            hello(text)
