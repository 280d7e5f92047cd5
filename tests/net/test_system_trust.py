from __future__ import annotations

import ssl
import sys
from pathlib import Path

import pytest

from arcbridge.errors import ConfigError
from arcbridge.net import system_trust
from arcbridge.net.system_trust import read_cas, system_context, trusting_context
from arcbridge.settings import named_files
from arcbridge.settings.problems import Problems
from tests.net.ends import authority
from tests.pki.handshake import handshake, plain_chain, strict_by_default


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of CAs that holds our test CA alone."""
    file = tmp_path / "store.pem"
    file.write_text(authority().certificate_pem)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    return file


def without_truststore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "truststore", None)


def subjects(context: ssl.SSLContext) -> int:
    return context.cert_store_stats()["x509_ca"]


def test_a_file_that_the_environment_names(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_truststore(monkeypatch)
    monkeypatch.setenv("SSL_CERT_FILE", str(store))
    context = system_context()
    assert subjects(context) == 1
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname


def test_with_the_extra_the_system_judges(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truststore = pytest.importorskip("truststore")
    monkeypatch.setenv("SSL_CERT_FILE", str(store))
    assert isinstance(system_context(), truststore.SSLContext)


def test_an_openssl_from_elsewhere_finds_the_system_s_file(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single-file client on a system that keeps its CAs where the builder's system does not."""
    without_truststore(monkeypatch)
    monkeypatch.setenv("SSL_CERT_FILE", str(store.with_name("absent")))
    monkeypatch.setattr(system_trust, "BUNDLES", (str(store.with_name("also-absent")), str(store), "/not/looked/at"))
    assert subjects(system_context()) == 1
    monkeypatch.setattr(system_trust, "BUNDLES", ())
    assert subjects(system_context()) == 0


def test_a_ca_need_not_name_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Amazon EKS none does, and Python refuses them by default from 3.13 on: an issuer in the cluster may be one."""
    strict_by_default(monkeypatch)
    ca_pem, leaf = plain_chain("localhost")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    leaf.configure_cert(server)
    handshake(trusting_context(ca_pem), server, "localhost")


def test_comments_of_a_ca_file_may_be_in_utf_8(store: Path) -> None:
    store.write_text(f"# Müller\n{authority().certificate_pem}", "utf-8")
    problems = Problems()
    for text in (read_cas(store, "a"), named_files.check_ca(problems, "a", store)):
        assert text is not None
        assert text.isascii()
        assert subjects(trusting_context(text)) == 1
    assert problems.errors == []
    store.write_text("# Müller", "utf-8")
    with pytest.raises(ConfigError, match="holds no PEM certificate"):
        read_cas(store, "a")


def test_one_ca_and_no_other(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(store))
    assert subjects(trusting_context(authority().certificate_pem)) == 1
