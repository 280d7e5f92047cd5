from __future__ import annotations

import time
from pathlib import Path
from unittest import mock

import pytest

from arcbridge.errors import ConfigError, StateError
from arcbridge.net.tls import ALPN_CONTROL, ALPN_HTTP, ALPN_JOIN
from arcbridge.pki.authority import Authority
from arcbridge.pki.rotation import Rotation
from arcbridge.relay.certificate import ServerCertificate
from arcbridge.settings.config import RelayTlsConfig
from tests.support.clock import Clock


def test_an_own_certificate_is_renewed_at_two_thirds() -> None:
    clock = Clock(1_800_000_000.0)
    authority = Authority.create("test", clock=clock)
    certificate = ServerCertificate(RelayTlsConfig(), authority, "relay.test", clock=clock)
    assert set(certificate.loaded.contexts) == {ALPN_CONTROL, ALPN_JOIN, ALPN_HTTP}
    first, expires = certificate.loaded.contexts[ALPN_JOIN], certificate.loaded.expires
    clock.now += (expires - clock.now) * 0.6
    certificate.refresh()
    assert certificate.loaded.contexts[ALPN_JOIN] is first
    clock.now += (expires - clock.now) * 0.5
    certificate.refresh()
    assert certificate.loaded.contexts[ALPN_JOIN] is not first
    assert certificate.loaded.expires > expires


def test_given_files_are_taken_over_when_both_fit(tmp_path: Path) -> None:
    authority = Authority.create("test")
    files = RelayTlsConfig(certificate=tmp_path / "tls.crt", key=tmp_path / "tls.key")
    with pytest.raises(ConfigError, match=r"tls\.certificate"):
        ServerCertificate(files, authority, "relay.test")
    files.certificate.write_bytes(b"\x30\x82")  # as DER begins
    with pytest.raises(ConfigError, match=r"tls\.crt cannot be read: it is not PEM text"):
        ServerCertificate(files, authority, "relay.test")
    one, two = authority.issue_server(["relay.test"]), authority.issue_server(["relay.test"])
    files.certificate.write_text(one.certificate_pem)
    files.key.write_text(one.key_pem)
    certificate = ServerCertificate(files, authority, "relay.test")
    first = certificate.loaded.contexts[ALPN_HTTP]
    certificate.refresh()
    assert certificate.loaded.contexts[ALPN_HTTP] is first
    # Half of the new pair: the old one goes on.
    files.certificate.write_text(two.certificate_pem)
    certificate.refresh()
    assert certificate.loaded.contexts[ALPN_HTTP] is first
    files.key.write_text(two.key_pem)
    certificate.refresh()
    assert certificate.loaded.contexts[ALPN_HTTP] is not first


def test_agents_of_a_retired_ca_are_refused_also_while_the_files_cannot_be_read(tmp_path: Path) -> None:
    """docs/threats.md#E14: the relay lets agents in by what it has in memory, and reads the files again later."""
    authority = Authority.create("test")
    rotation = Rotation(authority.certificate_pem, authority.key_pem)
    files = RelayTlsConfig(certificate=tmp_path / "tls.crt", key=tmp_path / "tls.key")
    one, two = authority.issue_server(["relay.test"]), authority.issue_server(["relay.test"])
    (tmp_path / "tls.crt").write_text(one.certificate_pem)
    (tmp_path / "tls.key").write_text(one.key_pem)
    certificate = ServerCertificate(files, authority, "relay.test")
    (tmp_path / "tls.crt").write_text(two.certificate_pem)  # half of a new pair
    for step, trusted in (("next", 2), ("activate", 2), ("retire", 1)):
        rotation = rotation.take(step, time.time())
        authority.become(rotation.authority())
        certificate.refresh(rotated=True)
        contexts = certificate.loaded.contexts
        assert [len(one.get_ca_certs()) for one in contexts.values()] == [trusted] * 3
        assert certificate.loaded.chain_pem == one.certificate_pem
    (tmp_path / "tls.key").write_text(two.key_pem)
    certificate.refresh()
    assert certificate.loaded.chain_pem == two.certificate_pem


def test_an_own_certificate_that_the_next_ca_could_not_issue_is_issued_later() -> None:
    authority = Authority.create("test")
    certificate = ServerCertificate(RelayTlsConfig(), authority, "relay.test")
    first = certificate.loaded
    with mock.patch.object(Authority, "issue_server", side_effect=StateError("not now")):
        certificate.refresh(rotated=True)
    assert certificate.loaded.chain_pem == first.chain_pem
    certificate.refresh()
    assert certificate.loaded.chain_pem != first.chain_pem
    issued = certificate.loaded
    certificate.refresh()
    assert certificate.loaded is issued


def test_a_read_changes_nothing_and_a_put_everything(tmp_path: Path) -> None:
    """A reload reads first; from own CA to files and back, what is in force says by which CA peers know it."""
    authority = Authority.create("test")
    files = RelayTlsConfig(certificate=tmp_path / "tls.crt", key=tmp_path / "tls.key")
    issued = authority.issue_server(["relay.test"])
    (tmp_path / "tls.crt").write_text(issued.certificate_pem)
    (tmp_path / "tls.key").write_text(issued.key_pem)
    certificate = ServerCertificate(RelayTlsConfig(), authority, "relay.test")
    own = certificate.loaded
    assert certificate.ca_pem == authority.certificate_pem
    read = certificate.read(files)
    assert certificate.loaded is own
    assert certificate.put(read)
    assert (certificate.ca_pem, certificate.loaded.chain_pem) == (None, issued.certificate_pem)
    assert certificate.put(certificate.read(RelayTlsConfig())), "from files to one of the own CA"
    assert certificate.ca_pem == authority.certificate_pem
    assert not certificate.put(certificate.read(RelayTlsConfig())), "an own certificate stays the same"


def test_files_that_do_not_fit_are_not_put(tmp_path: Path) -> None:
    authority = Authority.create("test")
    certificate = ServerCertificate(RelayTlsConfig(), authority, "relay.test")
    own = certificate.loaded
    (tmp_path / "tls.crt").write_text(authority.issue_server(["relay.test"]).certificate_pem)
    (tmp_path / "tls.key").write_text(authority.issue_server(["relay.test"]).key_pem)
    with pytest.raises(ConfigError):
        certificate.read(RelayTlsConfig(certificate=tmp_path / "tls.crt", key=tmp_path / "tls.key"))
    assert certificate.loaded is own
