from __future__ import annotations

import os
import ssl

import pytest
from cryptography.hazmat.primitives import serialization

from arcbridge.errors import ConfigError
from arcbridge.pki.authority import Authority
from arcbridge.pki.chain import joined, load_chain

ISSUED = Authority.create("a CA").issue_server(["x.test"])


def context() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_pair_is_loaded_and_no_file_is_left(
    in_memory: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if not in_memory:
        monkeypatch.delattr(os, "memfd_create")
    load_chain(context(), ISSUED.certificate_pem, ISSUED.key_pem)
    assert os.listdir(str(tmp_path)) == []


def test_an_encrypted_key_is_refused_without_a_prompt() -> None:
    key = serialization.load_pem_private_key(ISSUED.key_pem.encode(), None)
    sealed = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    ).decode()
    with pytest.raises(ConfigError, match="encrypted"):
        load_chain(context(), ISSUED.certificate_pem, sealed)


def test_a_pair_of_two_owners_is_refused() -> None:
    other = Authority.create("a CA").issue_server(["y.test"])
    with pytest.raises(ConfigError, match="do not belong together"):
        load_chain(context(), ISSUED.certificate_pem, other.key_pem)


def test_the_certificate_stands_before_what_the_key_file_holds() -> None:
    assert joined("certificate\n\n", "key") == "certificate\nkey"
