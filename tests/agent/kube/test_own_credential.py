"""What the agent reads of its own credential: a token, a client certificate, or the bundle of a pod that is renewed."""

from __future__ import annotations

import base64
import json
import os
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme

from arcbridge.agent.kube.apiserver import REREAD, ApiServer, Endpoint, endpoint_of
from arcbridge.agent.kube.own_credential import (
    CERTIFICATE,
    MAX_BUNDLE,
    MAX_CLAIMS,
    POD_CERTIFICATE,
    TOKEN,
    read_credential,
)
from arcbridge.errors import ConfigError
from arcbridge.settings.config import KubernetesConfig
from tests.pki.handshake import handshake, plain_chain, strict_by_default
from tests.support.clock import Clock
from tests.support.fake_apiserver import FakeApiServer

CA = trustme.CA()


class Volume:
    """A projected volume, of which the kubelet replaces all files at once: readers follow the link `..data`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bundle = directory / "credential-bundle.pem"
        self._number = 0

    def write(self, text: str) -> None:
        """Replace the bundle as `AtomicWriter` of the kubelet does."""
        self._number += 1
        version = self.directory / f"..{self._number}"
        version.mkdir(parents=True)
        (version / self.bundle.name).write_text(text)
        os.symlink(version.name, self.directory / "..data_tmp")
        os.replace(self.directory / "..data_tmp", self.directory / "..data")
        if self._number == 1:
            self.bundle.symlink_to(Path("..data") / self.bundle.name)


def bundle() -> str:
    """A key and its chain in one text, the key first, as the kubelet writes them."""
    leaf = CA.issue_cert("agent.invalid")
    return "".join(pem.bytes().decode() for pem in (leaf.private_key_pem, *leaf.cert_chain_pems, CA.cert_pem))


def end(**files: Any) -> Endpoint:
    return endpoint_of(KubernetesConfig(server="https://a", **files), {})


def jwt(claims: object) -> str:
    text = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"header.{text}.signature"


def test_a_bundle_is_the_whole_credential(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    volume.write(bundle())
    found = read_credential(end(credential_bundle_file=volume.bundle))
    assert (found.kind, found.authorization) == (POD_CERTIFICATE, "")
    assert found.validity[0] < found.validity[1]


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", CA.cert_pem.bytes().decode(), CA.private_key_pem.bytes().decode(),
     CA.private_key_pem.bytes().decode() + trustme.CA().cert_pem.bytes().decode()],
    ids=["empty", "nonsense", "no key", "no certificate", "another key"],
)  # fmt: skip
def test_a_bundle_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "bundle").write_text(text)
    words = r"kubernetes\.credential_bundle_file: .*bundle holds no private key"
    with pytest.raises(ConfigError, match=words) as error:
        read_credential(end(credential_bundle_file=tmp_path / "bundle"))
    assert "PRIVATE" not in error.value.message


def test_a_bundle_is_read_up_to_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    text = bundle()
    path.write_text(text + "#" * (MAX_BUNDLE - len(text)))
    assert read_credential(end(credential_bundle_file=path)).kind == POD_CERTIFICATE
    path.write_text(text + "#" * (MAX_BUNDLE - len(text) + 1))
    with pytest.raises(ConfigError, match=f"more than {MAX_BUNDLE} bytes"):
        read_credential(end(credential_bundle_file=path))


def test_the_ca_of_an_api_server_need_not_name_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Amazon EKS none does, and Python refuses them by default from 3.13 on, which the image has."""
    strict_by_default(monkeypatch)
    ca_pem, leaf = plain_chain("kubernetes.default.svc")
    (tmp_path / "ca").write_text(ca_pem)
    (tmp_path / "token").write_text("token")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    leaf.configure_cert(server)
    found = read_credential(end(ca_file=tmp_path / "ca", token_file=tmp_path / "token"))
    for context in (found.own, found.bare):
        handshake(context, server, "kubernetes.default.svc")


@pytest.mark.parametrize(
    ("token", "validity"),
    [
        (jwt({"iat": 5, "exp": 3605}), (5.0, 3605.0)),
        (jwt({"exp": 3605}), None),
        (jwt([1]), None),
        (jwt({"iat": 0, "exp": {}}), None),
        (jwt({"iat": 0, "exp": 1, "x": "y" * MAX_CLAIMS}), None),
        ("a.!.c", None),
        ("static", None),
    ],
)
def test_when_a_token_ends(tmp_path: Path, token: str, validity: tuple[float, float] | None) -> None:
    (tmp_path / "token").write_text(f"{token}\n")
    found = read_credential(end(token_file=tmp_path / "token"))
    assert (found.kind, found.authorization, found.validity) == (TOKEN, f"Bearer {token}", validity)


def test_a_client_certificate_says_when_it_ends(tmp_path: Path) -> None:
    leaf = CA.issue_cert("agent.invalid")
    leaf.cert_chain_pems[0].write_to_path(str(tmp_path / "crt"))
    leaf.private_key_pem.write_to_path(str(tmp_path / "key"))
    found = read_credential(end(client_certificate_file=tmp_path / "crt", client_key_file=tmp_path / "key"))
    assert (found.kind, found.authorization) == (CERTIFICATE, "")
    assert found.validity is not None


async def test_a_renewed_bundle_is_used_and_no_call_fails(tmp_path: Path) -> None:
    """The kubelet removes the directory of the old files before or after the agent looks; what it writes is whole."""
    clock, volume = Clock(0.0), Volume(tmp_path / "volume")
    volume.write(bundle())
    async with FakeApiServer.serving(tmp_path, client_ca=CA) as fake:
        config = KubernetesConfig(server=fake.url, ca_file=fake.ca_file, credential_bundle_file=volume.bundle)
        api = ApiServer(endpoint_of(config, {}), clock=clock)
        rotations: list[int] = []
        api.on_rotation = lambda: rotations.append(1)
        for number in range(4):
            assert (await api.ask("GET", "/x"))[0] == 200
            assert fake.last.client_certificate
            assert fake.last.header("authorization") == []
            assert api.credentials(own=False)[0] is not api.credentials(own=True)[0]
            assert len(rotations) == number
            volume.write(bundle())
            clock.now += REREAD
        before = api.credentials(own=True)
        volume.write("-----BEGIN PRIVATE KEY-----\n")
        clock.now += REREAD
        assert api.credentials(own=True) == before, "the old one is good for a while yet"
        assert "kubernetes.credential_bundle_file" in api.reload_error
        volume.write(bundle())
        clock.now += REREAD
        assert api.credentials(own=True) != before
        assert api.reload_error == ""
        await api.close()
