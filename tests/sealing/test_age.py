"""A sealed file is opened by its recipients alone, here and by age; what was changed, cut or added is found.

C2SP's vectors, age itself and rage (pyrage) are the other readers and writers.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import secrets
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyrage
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.errors import LocalProtocolError, SealingError, Truncated
from arcbridge.sealing.age import (
    CHUNK,
    NONCE,
    TAG,
    Sealer,
    open_sealed,
    parse_identities,
    parse_identity,
    parse_recipient,
)
from arcbridge.sealing.header import ByteSource, Stanza, read_header, written
from arcbridge.sealing.recipients import AgeIdentity, Recipient
from tests.sealing.keys import HYBRID_IDENTITY, HYBRID_RECIPIENT, X25519_IDENTITY, X25519_RECIPIENT, opened, sealed
from tests.support.processes import run

X25519, HYBRID = parse_identity(X25519_IDENTITY), parse_identity(HYBRID_IDENTITY)
EDGES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1]
"""Sizes about which a mistake in the cut into chunks would be one."""


class Vector(NamedTuple):
    """One of C2SP's."""

    expect: str
    payload: str
    """SHA-256 of all that may be given out, also before a failure."""
    file_key: bytes
    identities: list[AgeIdentity]
    data: bytes


def vectors(programs: Path) -> Iterator[tuple[str, Vector]]:
    """Yield those for what is built here: no armor, no passphrases."""
    for name, text in sorted(json.loads(run([programs / "vectors"]).stdout).items()):
        head, _, data = base64.b64decode(text).partition(b"\n\n")
        fields: dict[str, list[str]] = {}
        for line in head.decode().split("\n"):
            key, _, value = line.partition(": ")
            fields.setdefault(key, []).append(value)
        unknown = fields.keys() - {
            *("expect", "payload", "identity", "file key", "armored", "passphrase", "compressed", "comment")
        }
        assert not unknown, f"{name}: {unknown}"
        if "armored" in fields or "identity" not in fields:
            continue
        yield (
            name,
            Vector(
                fields["expect"][0],
                fields.get("payload", [""])[0],
                bytes.fromhex(fields.get("file key", [""])[0]),
                [parse_identity(one) for one in fields["identity"]],
                zlib.decompress(data) if "compressed" in fields else data,
            ),
        )


def outcome(vector: Vector) -> tuple[str, bytes]:
    """Return what comes of opening a file, in C2SP's words, and what was given out."""
    content = bytearray()
    try:
        chunks = open_sealed(io.BytesIO(vector.data).read, vector.identities)
    except SealingError as error:
        kinds = {"not sealed to the key": "no match", "MAC does not match": "HMAC failure"}
        return next((kind for words, kind in kinds.items() if words in error.message), "header failure"), b""
    try:
        for chunk in chunks:
            content += chunk
    except SealingError:
        return "payload failure", bytes(content)
    return "success", bytes(content)


def test_every_vector_ends_as_c2sp_says(programs: Path) -> None:
    seen: dict[str, int] = {}
    wrong = []
    for name, vector in vectors(programs):
        found, content = outcome(vector)
        seen[found] = seen.get(found, 0) + 1
        if found != vector.expect:
            wrong.append(f"{name}: {found}, and not {vector.expect}")
        elif vector.payload and hashlib.sha256(content).hexdigest() != vector.payload:
            wrong.append(f"{name}: other content")
    assert wrong == [], "\n".join(wrong)
    assert sum(seen.values()) >= 85, seen
    assert set(seen) == {"success", "no match", "HMAC failure", "header failure", "payload failure"}


class Replayed(Recipient):
    """Writes a stanza as it was."""

    def __init__(self, stanza: Stanza) -> None:
        self._stanza = stanza

    def wrap(self, file_key: bytes) -> Stanza:
        return self._stanza


def test_every_good_vector_is_written_again_byte_for_byte(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written_again = 0
    for name, vector in vectors(programs):
        if vector.expect == "header failure":
            continue
        source = ByteSource(io.BytesIO(vector.data).read)
        header = read_header(source)
        assert written(header.stanzas) == header.signed, name
        if vector.expect == "success":
            random = iter([vector.file_key, source.take(NONCE)])
            monkeypatch.setattr(secrets, "token_bytes", lambda size, random=random: next(random))
            again = sealed(outcome(vector)[1], *map(Replayed, header.stanzas))
            monkeypatch.undo()
            assert again == vector.data, name
            written_again += 1
    assert written_again > 10


# -- age and rage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("-pq",)], ids=["X25519", "post-quantum"])
def test_age_opens_it_and_it_opens_what_age_seals(options: tuple[str, ...], programs: Path, tmp_path: Path) -> None:
    file = tmp_path / "key"
    run([programs / "age-keygen", *options, "-o", file])
    public = run([programs / "age-keygen", "-y", file]).stdout.decode().strip()
    identities = parse_identities(file.read_bytes())
    for size in EDGES:
        data = secrets.token_bytes(size)
        ours = sealed(data, public)
        assert run([programs / "age", "-d", "-i", file], input=ours).stdout == data
        theirs = run([programs / "age", "-r", public], input=data).stdout
        assert opened(theirs, identities) == data
        assert len(ours) == len(theirs)


@pytest.mark.parametrize("size", EDGES)
def test_rage_opens_it_and_it_opens_what_rage_seals(size: int) -> None:
    data, key = secrets.token_bytes(size), pyrage.x25519.Identity.generate()
    assert pyrage.decrypt(sealed(data, str(key.to_public())), [key]) == data
    theirs = pyrage.encrypt(data, [key.to_public()])
    assert opened(theirs, parse_identities(f"# created: today\n{key}\n".encode())) == data


def test_each_of_its_recipients_opens_it_and_no_other() -> None:
    other = pyrage.x25519.Identity.generate()
    data = sealed(b"content", X25519_RECIPIENT, HYBRID_RECIPIENT)
    for identities in ([X25519], [HYBRID], [HYBRID, X25519], [parse_identity(str(other)), HYBRID]):
        assert opened(data, identities) == b"content"
    for none in ([], [parse_identity(str(other))]):
        with pytest.raises(SealingError, match="not sealed to the key"):
            opened(data, none)


# -- what is written and read -----------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2 * CHUNK + 2), max_size=6), st.sampled_from([None, 1000, CHUNK + TAG]))
def test_pieces_that_are_written_and_read_do_not_matter(sizes: list[int], pieces: int | None) -> None:
    out: list[bytes] = []
    sealer = Sealer([parse_recipient(X25519_RECIPIENT)], out.append)
    content = hashlib.shake_128(repr(sizes).encode()).digest(sum(sizes))
    at = 0
    for size in sizes:
        sealer.write(memoryview(content)[at : at + size])
        at += size
    sealer.finish()
    file = io.BytesIO(b"".join(out))
    chunks = list(open_sealed(lambda size: file.read(min(size, pieces or size)), [X25519]))
    assert b"".join(chunks) == content
    assert all(len(chunk) == CHUNK for chunk in chunks[:-1])


def test_the_header_leaves_at_once_and_a_chunk_when_more_follows() -> None:
    out: list[bytes] = []
    sealer = Sealer([parse_recipient(X25519_RECIPIENT)], out.append)
    assert len(out) == 1
    read_header(ByteSource(io.BytesIO(out[0]).read))
    sealer.write(bytes(CHUNK))
    assert len(out) == 1
    sealer.write(b"x")
    assert [len(one) for one in out[1:]] == [CHUNK + TAG]
    sealer.finish()
    assert [len(one) for one in out[1:]] == [CHUNK + TAG, 1 + TAG]
    for more in (sealer.finish, functools.partial(sealer.write, bytes(CHUNK + 1))):
        with pytest.raises(LocalProtocolError, match="finished"):
            more()
    assert len(out) == 3


def test_keys_and_nonces_serve_one_file() -> None:
    one, other = sealed(b"content", X25519_RECIPIENT), sealed(b"content", X25519_RECIPIENT)
    begin = len(one) - len(b"content") - TAG
    assert one[begin - NONCE : begin] != other[begin - NONCE : begin]
    assert one[begin:] != other[begin:]


def test_it_is_sealed_to_somebody_and_not_to_everybody() -> None:
    key = parse_recipient(X25519_RECIPIENT)
    for recipients in ([], [key] * 65):
        with pytest.raises(SealingError, match="one recipient at least and 64 at most"):
            Sealer(recipients, bytes)


# -- what was changed -------------------------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 600
"""Two whole chunks and some of a third."""


@functools.cache
def sealed_content() -> bytes:
    return sealed(CONTENT, X25519_RECIPIENT)


def released(data: bytes) -> tuple[bytes, SealingError | None]:
    """Return what is given out of a file, and the error behind it."""
    content = bytearray()
    try:
        for chunk in open_sealed(io.BytesIO(data).read, [X25519]):
            content += chunk
    except SealingError as error:
        return bytes(content), error
    return bytes(content), None


def begin_of_content() -> int:
    return len(sealed_content()) - len(CONTENT) - 3 * TAG


@given(st.data())
def test_a_file_that_breaks_off_says_so_behind_its_last_whole_chunk(data: st.DataObject) -> None:
    whole, begin = sealed_content(), begin_of_content()
    ends = [begin + at * (CHUNK + TAG) + by for at in (0, 1, 2) for by in (-1, 0, 1, TAG)]
    end = data.draw(st.one_of(st.sampled_from(ends), st.integers(0, len(whole) - 1)))
    content, error = released(whole[:end])
    assert type(error) is Truncated
    assert content == CONTENT[: max(0, end - begin) // (CHUNK + TAG) * CHUNK]


@given(st.data())
def test_what_is_given_out_of_a_changed_file_is_what_was_sealed(data: st.DataObject) -> None:
    changed = bytearray(sealed_content())
    at = data.draw(st.one_of(st.integers(0, begin_of_content()), st.integers(0, len(changed) - 1)))
    changed[at] ^= data.draw(st.integers(1, 255))
    content, error = released(bytes(changed))
    assert error is not None
    assert content == CONTENT[: max(0, at - begin_of_content()) // (CHUNK + TAG) * CHUNK]


def test_chunks_are_not_left_out_doubled_moved_or_added() -> None:
    whole, begin = sealed_content(), begin_of_content()
    head, first = whole[:begin], whole[begin : begin + CHUNK + TAG]
    second, last = whole[begin + CHUNK + TAG : begin + 2 * (CHUNK + TAG)], whole[begin + 2 * (CHUNK + TAG) :]
    for chunks, given_out in (
        ([second, last], 0),
        ([first, last], 1),
        ([second, first, last], 0),
        ([first, first, second, last], 1),
        ([first, second, last, b"x"], 2),
        ([last], 0),
        ([first, second, last, last], 2),
    ):
        content, error = released(head + b"".join(chunks))
        assert error is not None
        assert content == CONTENT[: given_out * CHUNK]


def test_bytes_behind_a_last_chunk_that_is_full_are_found() -> None:
    data = sealed(bytes(CHUNK), X25519_RECIPIENT)
    content, error = released(data + b"x")
    assert content == bytes(CHUNK)
    assert error is not None
    assert "behind its end" in error.message


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_a_large_file_takes_the_memory_of_some_chunks() -> None:
    count = 400

    def stream() -> Iterator[bytes]:
        """Sealed chunks, as they are made."""
        out: list[bytes] = []
        sealer = Sealer([parse_recipient(X25519_RECIPIENT)], out.append)
        for _ in range(count):
            sealer.write(bytes(CHUNK))
            yield from out
            out.clear()
        sealer.finish()
        yield from out

    pieces, rest = stream(), bytearray()

    def read(size: int) -> bytes:
        if not rest:
            rest.extend(next(pieces, b""))
        data = bytes(rest[:size])
        del rest[:size]
        return data

    total = 0
    tracemalloc.start()
    try:
        for chunk in open_sealed(read, [X25519]):
            total += len(chunk)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == count * CHUNK
    assert peak < 20 * CHUNK


# -- keys as text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "cut off"),
        ("alice", "cut off"),
        ("age1wrong", "cut off"),
        (X25519_RECIPIENT[:-1] + "q", "checksum"),
        (X25519_RECIPIENT.upper(), "kind that is not known"),
        (X25519_IDENTITY, "private key"),
        (HYBRID_IDENTITY, "private key"),
        (X25519_IDENTITY.lower(), "kind that is not known"),
        ("age1" + "q" * 5000, "too long"),
    ],
)
def test_a_recipient_that_is_none_is_refused_with_what_is_wrong(text: str, why: str) -> None:
    with pytest.raises(SealingError, match=f"public key of age.*{why}") as raised:
        parse_recipient(text)
    assert X25519_IDENTITY[20:40] not in raised.value.message


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "cut off"),
        (X25519_RECIPIENT, "kind that is not known"),
        (X25519_IDENTITY.lower(), "kind that is not known"),
        (X25519_IDENTITY[:-1] + "Q", "checksum"),
    ],
)
def test_an_identity_that_is_none_is_refused_and_not_quoted(text: str, why: str) -> None:
    with pytest.raises(SealingError, match=why) as raised:
        parse_identity(text)
    assert not text or text[20:40] not in raised.value.message


def test_a_file_of_identities_has_a_line_for_each() -> None:
    file = f"# created: 2026-11-29\n# public key: {X25519_RECIPIENT}\n{X25519_IDENTITY}\r\n\n{HYBRID_IDENTITY}\n"
    identities = parse_identities(file.encode())
    assert [type(one) for one in identities] == [type(X25519), type(HYBRID)]
    for file in ("", "nothing\n", "\xff", X25519_RECIPIENT):
        with pytest.raises(SealingError, match="holds no key"):
            parse_identities(file.encode("latin-1"))
    with pytest.raises(SealingError, match="checksum"):
        parse_identities(X25519_IDENTITY[:-1].encode() + b"Q")


def test_an_openssl_without_ml_kem_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from cryptography.hazmat.backends.openssl.backend import backend

    monkeypatch.setattr(type(backend), "mlkem_supported", lambda _: False)
    for parse, text in ((parse_recipient, HYBRID_RECIPIENT), (parse_identity, HYBRID_IDENTITY)):
        with pytest.raises(SealingError, match="no ML-KEM"):
            parse(text)
    assert parse_recipient(X25519_RECIPIENT)
