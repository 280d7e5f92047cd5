"""What is kept between runs: one CA, client certificates, ports."""

from __future__ import annotations

import os
import ssl
import time
from pathlib import Path

import pytest

from arcbridge.client.state import CLIENT_CERTIFICATE_LIFE, FIRST_PORT, SERVER_CERTIFICATE_REUSE, StateDirectory
from arcbridge.errors import StateError
from arcbridge.net.tls import load_chain
from arcbridge.pki.authority import certificate_validity

RELAY = "https://relay.example.org:443"


def kept(directory: Path) -> Path:
    """The file of the one cluster."""
    (found,) = (directory / "state/clusters").glob("prod@*.json")
    return found


def state(directory: Path) -> StateDirectory:
    return StateDirectory(directory / "state", directory / "cache")


class TestPlaces:
    def test_of_the_system_or_explicit(self) -> None:
        found = StateDirectory.find(None, {"XDG_STATE_HOME": "/s", "XDG_CACHE_HOME": "/c"})
        assert (found.path, found.cache) == (Path("/s/arcbridge"), Path("/c/arcbridge"))
        assert StateDirectory.find(Path("/x"), {}).cache == Path("/x/cache")

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root makes files for other users")
    def test_w11_a_directory_of_another_user_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "arcbridge").mkdir()
        os.chown(tmp_path / "arcbridge", 12345, 12345)
        for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
            with pytest.raises(StateError, match="belongs to another user"):
                StateDirectory.find(None, {"HOME": str(tmp_path / "home"), name: str(tmp_path)})
        with pytest.raises(StateError, match="belongs to another user"):
            StateDirectory.find(tmp_path / "arcbridge", {})

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root makes files for other users")
    def test_w11_certificates_of_another_user_are_not_used(self, tmp_path: Path) -> None:
        """Else that user would know the key with which the endpoint is asked."""
        known = state(tmp_path).certificates("prod", RELAY, time.time())
        for file in (tmp_path / "state/clusters").iterdir():
            os.chown(file, 12345, 12345)
        with pytest.raises(StateError, match="belongs to another user and is not used"):
            state(tmp_path).certificates("prod", RELAY, time.time())
        for file in (tmp_path / "state/clusters").iterdir():
            file.unlink()
        assert state(tmp_path).certificates("prod", RELAY, time.time()).client_key_pem != known.client_key_pem


class TestCertificates:
    def test_they_outlive_the_process(self, tmp_path: Path) -> None:
        now = time.time()
        one, two = state(tmp_path).certificates("prod", RELAY, now), state(tmp_path).certificates("prod", RELAY, now)
        assert (one.ca_pem, one.client_certificate_pem) == (two.ca_pem, two.client_certificate_pem)
        other = state(tmp_path).certificates("other", RELAY, now)
        assert other.client_certificate_pem != one.client_certificate_pem
        assert (other.server_key_pem != one.server_key_pem, other.ca_pem) == (True, one.ca_pem)

    def test_b44_each_organisation_has_its_own(self, tmp_path: Path) -> None:
        """Two may have a cluster of one name."""
        now, other = time.time(), "sha256:" + "a" * 64
        one, two = state(tmp_path).certificates("prod", RELAY, now), state(tmp_path).certificates("prod", other, now)
        assert one.client_certificate_pem != two.client_certificate_pem
        assert state(tmp_path).certificates("prod", RELAY, now) == one, "neither takes the other one's file"
        assert (one.relay, two.relay) == (
            "arcbridge://organisation/https%3A%2F%2Frelay.example.org%3A443",
            f"arcbridge://organisation/sha256%3A{'a' * 64}",
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        load_chain(context, two.client_certificate_pem, two.client_key_pem)

    def test_a_worn_one_is_replaced_under_the_same_ca(self, tmp_path: Path) -> None:
        now = time.time()
        one = state(tmp_path).certificates("prod", RELAY, now)
        begin, end = certificate_validity(one.client_certificate_pem)
        assert end - begin >= CLIENT_CERTIFICATE_LIFE
        two = state(tmp_path).certificates("prod", RELAY, now + 0.7 * CLIENT_CERTIFICATE_LIFE)
        assert two.client_certificate_pem != one.client_certificate_pem
        assert two.ca_pem == one.ca_pem

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"relay": 3, "made_at": "now"}', "CERTIFICATE"])
    def test_damaged_ones_are_replaced(self, tmp_path: Path, text: str) -> None:
        one = state(tmp_path).certificates("prod", RELAY, time.time())
        whole = kept(tmp_path).read_text()
        kept(tmp_path).write_text(whole.replace(text, "x") if text == "CERTIFICATE" else text)
        two = state(tmp_path).certificates("prod", RELAY, time.time() + SERVER_CERTIFICATE_REUSE)
        assert two.client_certificate_pem != one.client_certificate_pem
        assert two.server_key_pem != one.server_key_pem
        assert two.ca_pem == one.ca_pem
        assert "PRIVATE KEY" in two.client_key_pem

    def test_one_of_a_former_ca_is_replaced(self, tmp_path: Path) -> None:
        one = state(tmp_path).certificates("prod", RELAY, time.time())
        for name in ("ca.crt", "ca.key"):
            (tmp_path / "state/local-ca" / name).unlink()
        two = state(tmp_path).certificates("prod", RELAY, time.time())
        assert one.ca_pem != two.ca_pem
        assert two.client_certificate_pem != one.client_certificate_pem

    def test_everything_is_private(self, tmp_path: Path) -> None:
        found = state(tmp_path).certificates("prod", RELAY, time.time())
        load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), found.server_certificate_pem, found.server_key_pem)
        for path in (tmp_path / "state").rglob("*"):
            assert path.stat().st_mode & 0o077 == 0, path
        assert "PRIVATE" not in repr(found)

    def test_a_start_changes_no_file_of_another(self, tmp_path: Path) -> None:
        state(tmp_path).certificates("prod", RELAY, time.time())
        before = {path: path.stat() for path in (tmp_path / "state").rglob("*.*") if path.suffix != ".lock"}
        state(tmp_path).certificates("prod", RELAY, time.time())
        after = {path: path.stat() for path in before}
        assert [path for path in before if before[path].st_ino != after[path].st_ino] == []

    def test_starts_of_one_day_have_one_server_certificate(self, tmp_path: Path) -> None:
        now = time.time()
        one = state(tmp_path).certificates("prod", RELAY, now)
        assert state(tmp_path).certificates("prod", RELAY, now + SERVER_CERTIFICATE_REUSE - 1) == one
        for other in (now - 1, now + SERVER_CERTIFICATE_REUSE):
            assert (
                state(tmp_path).certificates("prod", RELAY, other).server_certificate_pem != one.server_certificate_pem
            )

    def test_a_ca_key_that_every_user_can_read_is_refused_at_each_start(self, tmp_path: Path) -> None:
        state(tmp_path).certificates("prod", RELAY, time.time())
        (tmp_path / "state/local-ca/ca.key").chmod(0o604)
        with pytest.raises(StateError, match="open to every user"):
            state(tmp_path).certificates("prod", RELAY, time.time())


class TestPorts:
    def test_a_cluster_keeps_its_port_when_relays_are_added(self, tmp_path: Path) -> None:
        state(tmp_path).remember_port(("r:443",), "a", 4999)
        assert state(tmp_path).kept_port(("new:443", "r:443"), "a") == 4999
        state(tmp_path).remember_port(("new:443", "r:443"), "a", 5000)
        assert state(tmp_path).kept_port(("r:443",), "a") == 5000

    def test_each_cluster_keeps_its_own_until_it_is_given_back(self, tmp_path: Path) -> None:
        kept = state(tmp_path)
        kept.forget_port(("r:443",), "a")
        for number, (relay, cluster) in enumerate((("r:443", "a"), ("r:443", "b"), ("other:443", "a"))):
            assert kept.kept_port((relay,), cluster) is None
            assert next(kept.free_ports()) == FIRST_PORT + number == 47011 + number
            kept.remember_port((relay,), cluster, 47011 + number)
        assert state(tmp_path).kept_port(("r:443",), "a") == 47011
        kept.forget_port(("r:443",), "a")
        assert next(kept.free_ports()) == 47011
        assert kept.kept_port(("r:443",), "b") == 47012

    @pytest.mark.parametrize("text", ["{", "[]", '{"a": "b"}'])
    def test_damage_is_told(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "state").mkdir()
        (tmp_path / "state/ports.json").write_text(text)
        with pytest.raises(StateError, match=r"ports\.json is damaged"):
            state(tmp_path).kept_port(("r",), "a")


def test_where_entries_of_ours_are(tmp_path: Path) -> None:
    kept = state(tmp_path)
    assert kept.kubeconfigs() == []
    kept.add_kubeconfig([tmp_path / "a", tmp_path / "b"])
    kept.add_kubeconfig([tmp_path / "a"])
    kept.add_kubeconfig([tmp_path / "a"])
    assert kept.kubeconfigs() == [[tmp_path / "a", tmp_path / "b"], [tmp_path / "a"]]
    kept.drop_kubeconfig([tmp_path / "a"])
    assert kept.kubeconfigs() == [[tmp_path / "a", tmp_path / "b"]]
    (tmp_path / "state/kubeconfigs.json").write_text("{")
    assert kept.kubeconfigs() == []


def test_names_for_completion(tmp_path: Path) -> None:
    kept = state(tmp_path)
    kept.keep_cluster_names(["b", "a"])
    kept.add_cluster_name("c")
    kept.add_cluster_name("$(touch ran)")
    kept.add_cluster_name("a")
    assert (tmp_path / "cache/clusters").read_text() == "a\nb\nc\n"
    (tmp_path / "file").write_text("")
    StateDirectory(tmp_path, tmp_path / "file" / "x").keep_cluster_names(["a"])
