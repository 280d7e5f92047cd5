"""What an end takes over of announced CAs, and what it refuses."""

from __future__ import annotations

import ssl
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from structlog.testing import capture_logs

from arcbridge.errors import ConfigError, PinMismatch
from arcbridge.net.tls import ALPN_HTTP, RelayTrust, outer_client_context, outer_server_contexts
from arcbridge.pki.authority import Authority, _builder
from arcbridge.pki.enrolment import make_key
from arcbridge.pki.rotation import Rotation
from arcbridge.pki.succession import LONGEST, TEXT_LIMIT, Succession, SuccessionStore
from tests.pki.handshake import handshake

NOW = time.time()
RELAY = "the relay's CA"


def rotated(steps: int, begin: Rotation | None = None) -> Rotation:
    """A CA after so many whole rotations."""
    state = begin or new()
    for _ in range(steps):
        for step in ("next", "activate", "retire"):
            state = state.take(step, NOW)
    return state


def new() -> Rotation:
    authority = Authority.create("test CA")
    return Rotation(authority.certificate_pem, authority.key_pem)


FIRST = new()
ANNOUNCED = FIRST.take("next", NOW)
ACTIVE = ANNOUNCED.take("activate", NOW)
RETIRED = ACTIVE.take("retire", NOW)
KNOWN = FIRST.list


def head(succession: Succession) -> str:
    return succession.text.partition("-----BEGIN")[0]


def test_the_present_ca_announces_the_next_one() -> None:
    found = Succession.read(ANNOUNCED.list.text)
    followed = KNOWN.follow(found, RELAY, retire=True)
    assert followed.pins == (KNOWN.pins[0], Authority.load(ANNOUNCED.next_certificate, ANNOUNCED.next_key).pin)
    assert (followed.present, followed.since) == (0, 0)
    followed = followed.follow(Succession.read(RETIRED.list.text), RELAY, retire=True)
    assert (followed.present, followed.since) == (1, 1)
    assert followed.trusted == found.cas[1]


def test_who_knows_a_pin_alone_follows_as_well() -> None:
    followed = Succession.of_pin(KNOWN.pins[0]).follow(Succession.read(rotated(3, FIRST).list.text), RELAY)
    assert len(followed.pins) == 4
    assert followed.since == 0  # who says so was not the CA's owner


def forged(link: str) -> str:
    """The announcement of the first CA with another certificate in the second place."""
    return f"{head(KNOWN)}{FIRST.certificate}{link}"


HOSTILE = new()
_, FOREIGN_LINK = HOSTILE.authority().make_successor()


def certified_by_another() -> str:
    """A certificate over the first CA's key that another one has issued."""
    first, hostile = FIRST.authority(), HOSTILE.authority()
    subject, key = first._certificate.subject, first._key.public_key()
    life = first._certificate.not_valid_before_utc, first._certificate.not_valid_after_utc
    identifier = x509.SubjectKeyIdentifier.from_public_key(hostile._key.public_key())
    builder = _builder(subject, subject, key, life, identifier, is_ca=True)
    return builder.sign(hostile._key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


FORM, ONE_TWICE, SIGNATURE = (
    "two lines, and one to 9 certificates",
    "has one CA twice, or names one",
    "is not signed by",
)


@pytest.mark.parametrize(
    ("text", "reason"),
    {
        "unsigned": (forged(HOSTILE.certificate), SIGNATURE),
        "signed by another key": (forged(FOREIGN_LINK), SIGNATURE),
        "no CA": (forged(FIRST.authority().issue_server(["relay"]).certificate_pem), SIGNATURE),
        "twice the same": (ANNOUNCED.list.text + FIRST.certificate, ONE_TWICE),
        "altered": (ANNOUNCED.list.text.replace("# since", "# until"), FORM),
        "a CA that is not in it": (ANNOUNCED.list.text.replace(KNOWN.pins[0], HOSTILE.list.pins[0]), ONE_TWICE),
        "present does not count": (
            RETIRED.list.text.replace(RETIRED.list.pins[1], KNOWN.pins[0], 1),
            "the present one does not count",
        ),
        "more text": (ANNOUNCED.list.text + "x", FORM),
        "none": (head(ANNOUNCED.list), FORM),
        "too many": (ANNOUNCED.list.text + FIRST.certificate * LONGEST, FORM),
        "oversized": (ANNOUNCED.list.text + " " * TEXT_LIMIT, "at most 15 KiB"),
        "empty": ("", FORM),
        "padded": (ANNOUNCED.list.text.replace("-----END", "\n-----END", 1), FORM),
        "a first one that another key has signed": (
            ANNOUNCED.list.text.replace(FIRST.certificate, certified_by_another()),
            SIGNATURE,
        ),
    }.values(),
)
def test_what_the_ca_has_not_signed_is_no_succession(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        Succession.read(text)
    assert "BEGIN" not in caught.value.message


def test_a_foreign_succession_is_refused_and_both_pins_are_named() -> None:
    with pytest.raises(PinMismatch, match="was replaced without an announcement") as caught:
        KNOWN.follow(Succession.read(rotated(1).list.text), RELAY)
    assert KNOWN.pins[0] in caught.value.message


def test_an_older_announcement_changes_nothing() -> None:
    known = KNOWN.follow(RETIRED.list, RELAY, retire=True)
    for older in (FIRST.list, ANNOUNCED.list, ACTIVE.list):
        assert known.follow(older, RELAY, retire=True) == known


def test_a_second_successor_of_one_ca_is_refused() -> None:
    known = KNOWN.follow(ANNOUNCED.list, RELAY)
    with pytest.raises(PinMismatch):
        known.follow(FIRST.take("next", NOW).list, RELAY)


def test_a_succession_is_bounded_and_who_missed_eight_rotations_still_follows() -> None:
    state = rotated(LONGEST - 1, FIRST)
    assert KNOWN.follow(Succession.read(state.list.text), RELAY).pins[-1] == state.list.pins[-1]
    more = rotated(3, state)
    text = more.list.text
    assert len(text) < TEXT_LIMIT / 2
    assert len(Succession.read(text).pins) == LONGEST
    with pytest.raises(PinMismatch, match="away for too many rotations"):
        KNOWN.follow(Succession.read(text), RELAY)


def test_what_is_known_is_kept_under_the_pin_that_was_given(tmp_path: Path) -> None:
    store = SuccessionStore(tmp_path / "successions")
    pin = KNOWN.pins[0]
    store.keep(pin, store.known(pin))
    assert not (tmp_path / "successions").exists()
    for begin in (FIRST, rotated(4, FIRST)):
        followed = store.known(pin).follow(rotated(6, begin).list, RELAY) if begin is FIRST else store.known(pin)
        store.keep(pin, followed)
        assert store.known(pin) == followed
        assert store.known(pin).pins[-1] == followed.pins[-1]
    (file,) = (tmp_path / "successions").glob("*.pem")
    assert file.stat().st_mode & 0o077 == 0


def test_a_process_of_long_ago_takes_back_nothing_that_another_one_has_kept(tmp_path: Path) -> None:
    store, pin = SuccessionStore(tmp_path / "successions"), KNOWN.pins[0]
    store.keep(pin, KNOWN.follow(RETIRED.list, RELAY, retire=True))
    store.keep(pin, KNOWN.follow(ANNOUNCED.list, RELAY, retire=True))
    assert store.known(pin) == RETIRED.list, "the retired one counts no more"
    with pytest.raises(PinMismatch):
        store.keep(pin, KNOWN.follow(FIRST.take("next", NOW).list, RELAY))
    assert store.known(pin) == RETIRED.list


def test_what_is_kept_and_damaged_is_as_unknown(tmp_path: Path) -> None:
    store, pin = SuccessionStore(tmp_path), KNOWN.pins[0]
    store.keep(pin, ACTIVE.list)
    (file,) = tmp_path.glob("*.pem")
    file.write_text(file.read_text() + "\n" * TEXT_LIMIT)
    with capture_logs() as logs:
        assert store.known(pin) == KNOWN
    assert logs[0]["path"] == str(file)
    store.keep(pin, ACTIVE.list)
    assert store.known(pin) == ACTIVE.list


def again(life: float) -> str:
    """Another certificate over the first CA's key, as its owner alone can make it."""
    authority = FIRST.authority()
    return authority._self_signed(authority._certificate.subject, FIRST.key, life, lambda: NOW).certificate_pem


def test_a_certificate_that_is_known_stays_as_it_is() -> None:
    """Another one over the same key is no news, and one of less use is not taken in its place."""
    other = ANNOUNCED.list.text.replace(FIRST.certificate, again(60.0))
    followed = ANNOUNCED.list.follow(Succession.read(other), RELAY)
    assert followed.cas == ANNOUNCED.list.cas
    assert Succession.read(other) == ANNOUNCED.list
    assert KNOWN.follow(Succession.read(other), RELAY).cas[0] == FIRST.certificate


def test_a_succession_that_grows_with_each_announcement_is_refused() -> None:
    """What is kept can be read again."""
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "x" * 64) for _ in range(15)])
    authority = Authority._self_signed(name, make_key(), 1e6, time.time)
    known = authority.succession
    for _ in range(3):
        following, link = authority.make_successor()
        found = Succession.read(authority.succession.extended(link).text)
        known, authority = known.follow(found, RELAY), following
        assert Succession.read(known.text, own=True) == known
    found = Succession.read(authority.succession.extended(authority.make_successor()[1]).text)
    with pytest.raises(ConfigError, match="at most 15 KiB"):
        known.follow(found, RELAY)


def test_a_file_with_words_around_the_certificate_can_be_followed_and_kept(tmp_path: Path) -> None:
    words = f"subject=CN = relay\r\n{FIRST.certificate}"
    followed = Succession.of_ca(words).follow(ANNOUNCED.list, RELAY)
    assert Succession.read(followed.text, own=True) == followed


@pytest.mark.parametrize("strict", [0, ssl.VERIFY_X509_STRICT])
def test_who_knows_any_of_the_cas_verifies_a_certificate_of_the_last(strict: int) -> None:
    state = rotated(3, FIRST).take("next", NOW).take("activate", NOW)
    authority = state.authority()
    leaf = authority.issue_server(["localhost"])
    server = outer_server_contexts(leaf.certificate_pem + authority.links_pem, leaf.key_pem, authority.trusted_pem)
    for known in (FIRST.certificate, *state.list.cas, state.certificate, "".join(state.list.cas[2:])):
        client = outer_client_context(RelayTrust(known), ALPN_HTTP)
        client.verify_flags |= strict
        handshake(client, server[ALPN_HTTP], "localhost")
    stranger = outer_client_context(RelayTrust(HOSTILE.certificate), ALPN_HTTP)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(stranger, server[ALPN_HTTP], "localhost")
    # A certificate of a CA that was retired is not taken by an end that knows so.
    old = FIRST.authority().issue_server(["localhost"])
    server = outer_server_contexts(old.certificate_pem, old.key_pem, authority.trusted_pem)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(outer_client_context(RelayTrust(state.list.trusted), ALPN_HTTP), server[ALPN_HTTP], "localhost")
