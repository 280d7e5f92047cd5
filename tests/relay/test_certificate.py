from __future__ import annotations

from pathlib import Path

import pytest

from arcbridge.config import RelayTlsConfig
from arcbridge.errors import ConfigError
from arcbridge.net.tls import ALPN_CONTROL, ALPN_HTTP, ALPN_JOIN
from arcbridge.pki.authority import Authority
from arcbridge.relay.certificate import ServerCertificate
from tests.identity.issuer import Clock


def test_an_own_certificate_is_renewed_at_two_thirds() -> None:
    clock = Clock(1_800_000_000.0)
    authority = Authority.create("test", clock=clock)
    certificate = ServerCertificate(RelayTlsConfig(), authority, "relay.test", clock=clock)
    assert set(certificate.contexts) == {ALPN_CONTROL, ALPN_JOIN, ALPN_HTTP}
    first, expires = certificate.contexts[ALPN_JOIN], certificate.expires
    clock.now += (expires - clock.now) * 0.6
    certificate.refresh()
    assert certificate.contexts[ALPN_JOIN] is first
    clock.now += (expires - clock.now) * 0.5
    certificate.refresh()
    assert certificate.contexts[ALPN_JOIN] is not first
    assert certificate.expires > expires


def test_given_files_are_taken_over_when_both_fit(tmp_path: Path) -> None:
    authority = Authority.create("test")
    files = RelayTlsConfig(certificate=tmp_path / "tls.crt", key=tmp_path / "tls.key")
    assert files.certificate is not None
    assert files.key is not None
    with pytest.raises(ConfigError, match=r"tls\.certificate"):
        ServerCertificate(files, authority, "relay.test")
    one, two = authority.issue_server(["relay.test"]), authority.issue_server(["relay.test"])
    files.certificate.write_text(one.certificate_pem)
    files.key.write_text(one.key_pem)
    certificate = ServerCertificate(files, authority, "relay.test")
    first = certificate.contexts[ALPN_HTTP]
    certificate.refresh()
    assert certificate.contexts[ALPN_HTTP] is first
    # Half of the new pair: the old one goes on.
    files.certificate.write_text(two.certificate_pem)
    certificate.refresh()
    assert certificate.contexts[ALPN_HTTP] is first
    files.key.write_text(two.key_pem)
    certificate.refresh()
    assert certificate.contexts[ALPN_HTTP] is not first
