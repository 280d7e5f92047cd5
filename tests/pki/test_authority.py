import multiprocessing
import os
import ssl
import stat
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from arcbridge.errors import ConfigError, EnrolmentRefused, StateError
from arcbridge.pki import private_files
from arcbridge.pki.authority import (
    _CLUSTER_CA_PIN,
    Authority,
    Issued,
    agent_ca_pin,
    agent_cluster,
    agent_expiry,
    agent_issued_at,
    certificate_validity,
    check_ca_certificate,
)
from arcbridge.pki.enrolment import make_csr, make_key
from arcbridge.pki.names import cluster_server_name

from .handshake import context, handshake
from .test_enrolment import ACCEPTED, csr_over

NOW = 1_800_000_000.0
PIN = b"sha256:" + b"0" * 64


def parse(pem: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem.encode())


def der(pem: str) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pem)


def shaken(ca: Authority, client: Issued | None, server: Issued | None, name: str = "localhost") -> bytes:
    """The client's certificate at the server; either end may leave it to the CA to make a good one for it."""
    near = context(ssl.PROTOCOL_TLS_CLIENT, ca.certificate_pem, client or ca.issue_client("c"))
    far = context(ssl.PROTOCOL_TLS_SERVER, ca.certificate_pem, server or ca.issue_server([name]))
    return handshake(near, far, name)[1]


def extension(certificate: x509.Certificate, kind: type[Any]) -> Any:
    return certificate.extensions.get_extension_for_class(kind).value


def private(key: Any) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


class TestStrictTls:
    """Handshakes with OpenSSL's X509_V_FLAG_X509_STRICT, which Python 3.13 and later switch on by default."""

    @pytest.mark.parametrize("cluster", ["prod", "prod.eu-1", "a" * 63, "a.-b", "xn--a", "7"])
    def test_cluster_end_to_end(self, cluster: str) -> None:
        ca = Authority.create("cluster CA")
        name = cluster_server_name(cluster)
        server = ca.issue_server([name])
        assert agent_refused(shaken(ca, None, server, name))
        with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
            shaken(ca, None, server, cluster_server_name("other"))

    @pytest.mark.parametrize("kind", ACCEPTED)
    def test_agent_to_relay_with_every_kind_of_key(self, kind: str) -> None:
        ca, key = Authority.create("relay CA"), ACCEPTED[kind]()
        agent = Issued(ca.sign_agent(csr_over(key), "prod-eu", life=600), private(key))
        names = ["relay.example.org", "127.0.0.1"]
        server = ca.issue_server(names)
        assert {agent_cluster(shaken(ca, agent, server, name)) for name in names} == {"prod-eu"}

    def test_a_long_server_name_that_fits_no_subject(self) -> None:
        ca, name = Authority.create("CA"), f"{'a' * 60}.{'b' * 60}.example.org"
        issued = ca.issue_server([name])
        assert not list(parse(issued.certificate_pem).subject)
        shaken(ca, None, issued, name)

    def test_purposes_are_not_exchangeable(self) -> None:
        ca = Authority.create("CA")
        for one in (ca.issue_server(["localhost"]), ca.issue_client("c")):
            with pytest.raises(ssl.SSLError, match="purpose"):
                shaken(ca, one, one)

    def test_another_authority_of_the_same_name_is_refused(self) -> None:
        ours, theirs = Authority.create("CA"), Authority.create("CA")
        with pytest.raises(ssl.SSLCertVerificationError):
            shaken(ours, None, theirs.issue_server(["localhost"]))

    def test_a_leaf_signs_nothing(self) -> None:
        """With pathlen 0 and `CA:FALSE`, an agent's key makes no certificate that a peer accepts."""
        ca = Authority.create("CA")
        leaf = ca.issue_client("c")
        key = load_pem_private_key(leaf.key_pem.encode(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        rogue = Authority(parse(leaf.certificate_pem), key, leaf.key_pem, ca._clock)
        made = rogue.issue_server(["localhost"])
        chained = Issued(made.certificate_pem + leaf.certificate_pem, made.key_pem)
        with pytest.raises(ssl.SSLCertVerificationError):
            shaken(ca, None, chained)


def agent_refused(certificate_der: bytes) -> bool:
    with pytest.raises(EnrolmentRefused):
        agent_cluster(certificate_der)
    return True


def naming(ca: Authority, *uris: str, server: bool = False) -> bytes:
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    return ca._sign(key, x509.Name([]), names, server=server, life=60).public_bytes(Encoding.DER)


class TestCertificates:
    def test_the_ca(self) -> None:
        ca = Authority.create("arcbridge relay CA", clock=lambda: NOW)
        certificate = parse(ca.certificate_pem)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
        assert constraints.critical
        assert usage.critical
        assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
        assert (usage.value.key_cert_sign, usage.value.crl_sign, usage.value.digital_signature) == (True, False, False)

    def test_leafs(self) -> None:
        ca = Authority.create("CA")
        server = parse(ca.issue_server(["a.example", "10.0.0.1", "::1"]).certificate_pem)
        names = extension(server, x509.SubjectAlternativeName)
        assert names.get_values_for_type(x509.DNSName) == ["a.example"]
        assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "::1"]
        for certificate, purpose in (
            (server, ExtendedKeyUsageOID.SERVER_AUTH),
            (parse(ca.issue_client("c").certificate_pem), ExtendedKeyUsageOID.CLIENT_AUTH),
            (parse(ca.sign_agent(make_csr(make_key()), "c", life=60)), ExtendedKeyUsageOID.CLIENT_AUTH),
        ):
            assert list(extension(certificate, x509.ExtendedKeyUsage)) == [purpose]
            assert not extension(certificate, x509.BasicConstraints).ca
            assert not extension(certificate, x509.KeyUsage).key_cert_sign
            assert certificate.serial_number.bit_length() > 100
            certificate.verify_directly_issued_by(parse(ca.certificate_pem))

    def test_only_the_key_of_a_request_is_taken(self) -> None:
        """docs/threats.md#E4: foreign subject, SANs and `CA:TRUE` in the request leave no trace."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "system:masters")]))
            .add_extension(x509.BasicConstraints(ca=True, path_length=5), critical=True)
            .add_extension(
                x509.SubjectAlternativeName(
                    [x509.UniformResourceIdentifier("arcbridge://cluster/victim"), x509.DNSName("relay.example.org")]
                ),
                critical=False,
            )
        )
        certificate = parse(pem := Authority.create("CA").sign_agent(csr_over(key, builder), "mine", life=60))
        assert certificate.public_key() == key.public_key()
        assert agent_cluster(der(pem)) == "mine"
        assert "masters" not in certificate.subject.rfc4514_string()
        assert not extension(certificate, x509.BasicConstraints).ca
        names = extension(certificate, x509.SubjectAlternativeName)
        assert [name.value for name in names] == ["arcbridge://cluster/mine"]

    @pytest.mark.parametrize("kind", ACCEPTED)
    def test_the_pin_of_the_clusters_ca(self, kind: str) -> None:
        ca, pin, key = Authority.create("CA"), Authority.create("cluster").pin, ACCEPTED[kind]()
        forged = x509.CertificateSigningRequestBuilder(x509.Name([])).add_extension(
            x509.UnrecognizedExtension(_CLUSTER_CA_PIN, b"\x0c\x47" + Authority.create("x").pin.encode()),
            critical=False,
        )
        pem = ca.sign_agent(csr_over(key, forged), "prod", life=600, cluster_ca_pin=pin)
        assert agent_ca_pin(der(pem)) == pin
        assert agent_cluster(der(pem)) == "prod"
        assert ca.authenticate_agent(der(pem)) == "prod"
        # Without: valid as before, and what the request asked for is not in it.
        assert agent_ca_pin(der(ca.sign_agent(csr_over(key, forged), "prod", life=600))) == ""
        assert agent_ca_pin(shaken(ca, Issued(pem, private(key)), None)) == pin

    def test_only_a_pin_is_stated(self) -> None:
        with pytest.raises(ConfigError):
            Authority.create("CA").sign_agent(make_csr(make_key()), "prod", life=60, cluster_ca_pin="sha256:0")

    @pytest.mark.parametrize(
        "value", [b"", b"\x0c", b"\x0c\x03abc", b"\x04\x47" + PIN, b"\x0c\x48" + PIN, b"\x0c\x47\xff"]
    )
    def test_a_malformed_pin_is_refused(self, value: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        class Malformed(x509.UnrecognizedExtension):
            def __init__(self, oid: x509.ObjectIdentifier, _: bytes) -> None:
                super().__init__(oid, value)

        ca, csr, pin = Authority.create("CA"), make_csr(make_key()), Authority.create("cluster").pin
        with monkeypatch.context() as patched:
            patched.setattr(x509, "UnrecognizedExtension", Malformed)
            pem = ca.sign_agent(csr, "prod", life=60, cluster_ca_pin=pin)
        with pytest.raises(EnrolmentRefused, match="malformed pin"):
            agent_ca_pin(der(pem))

    def test_validity_is_backdated_and_never_shorter_than_asked(self) -> None:
        ca = Authority.create("CA", clock=lambda: NOW - 86400.5)
        ca._clock = lambda: NOW + 0.5
        for life in (60.0, 600.0, 7 * 86400.0):
            pem = ca.sign_agent(make_csr(make_key()), "c", life=life)
            start, end = certificate_validity(pem)
            assert agent_expiry(der(pem)) == end
            assert agent_issued_at(der(pem)) == pytest.approx(NOW, abs=2)
            assert NOW + life <= end <= NOW + life + 2
            assert NOW - start == pytest.approx(min(3600, life / 10), abs=2)
            # Even a life of a minute is not due for renewal at once.
            assert start + (end - start) * 2 / 3 > NOW + life / 2

    def test_no_leaf_outlives_its_ca(self) -> None:
        ca = Authority.create("CA", life=3600, clock=lambda: NOW)
        assert certificate_validity(ca.issue_client("c").certificate_pem) <= certificate_validity(ca.certificate_pem)
        ca._clock = lambda: NOW + 3700
        with pytest.raises(StateError, match="expired"):
            ca.issue_client("c")

    @pytest.mark.parametrize(
        "names", [[], [""], ["a b"], ["*.example.org"], ["ü.example"], ["a\n"], ["-a"], ["a" * 254]]
    )
    def test_bad_server_names(self, names: list[str]) -> None:
        with pytest.raises(ConfigError):
            Authority.create("CA").issue_server(names)

    def test_a_bad_cluster_name_is_never_signed(self) -> None:
        with pytest.raises(ConfigError):
            Authority.create("CA").sign_agent(make_csr(make_key()), "a/../b", life=60)

    @pytest.mark.parametrize(
        "uris",
        [
            *([], ["arcbridge://cluster/a", "arcbridge://cluster/b"], ["spiffe://cluster/a"]),
            *([f"arcbridge://cluster/{name}"] for name in ("", "A", "a/b", "a%2e")),
        ],
    )
    def test_certificates_that_name_no_single_cluster(self, uris: list[str]) -> None:
        assert agent_refused(naming(Authority.create("CA"), *uris))

    @pytest.mark.parametrize("data", [b"", b"x", b"\x30\x82"])
    def test_unreadable_certificates(self, data: bytes) -> None:
        for read in (agent_cluster, agent_expiry, agent_issued_at):
            with pytest.raises(EnrolmentRefused):
                read(data)

    def test_keys_are_in_no_representation(self) -> None:
        ca = Authority.create("CA")
        issued = ca.issue_client("c")
        for shown in (repr(ca), repr(issued), str(issued)):
            assert "PRIVATE" not in shown


class TestAuthenticateAgent:
    def test_only_a_valid_client_certificate_of_this_ca(self) -> None:
        now = [NOW]
        ca = Authority.create("CA", clock=lambda: now[0])
        csr = make_csr(make_key())
        certificate = der(ca.sign_agent(csr, "prod", life=600))
        assert ca.authenticate_agent(certificate) == "prod"
        for foreign in (
            der(Authority.create("CA", clock=lambda: NOW).sign_agent(csr, "prod", life=600)),
            der(ca.issue_server(["localhost"]).certificate_pem),
            der(ca.issue_client("prod").certificate_pem),
            der(ca.certificate_pem),
            b"x",
        ):
            with pytest.raises(EnrolmentRefused):
                ca.authenticate_agent(foreign)
        now[0] += 700
        with pytest.raises(EnrolmentRefused, match="lapsed"):
            ca.authenticate_agent(certificate)

    def test_a_server_certificate_that_names_a_cluster(self) -> None:
        made = naming(ca := Authority.create("CA"), "arcbridge://cluster/a", server=True)
        assert agent_cluster(made) == "a"
        with pytest.raises(EnrolmentRefused):
            ca.authenticate_agent(made)


def test_a_clusters_ca_is_exactly_one_ca_certificate() -> None:
    ca = Authority.create("cluster CA")
    assert check_ca_certificate(f"\n{ca.certificate_pem}\n") == ca.certificate_pem
    for bad in (
        "",
        ca.certificate_pem * 2,
        ca.issue_client("c").certificate_pem,
        ca.key_pem,
        ca.certificate_pem + "x" * 16384,
        make_csr(make_key()),
    ):
        with pytest.raises(EnrolmentRefused, match="cluster's CA"):
            check_ca_certificate(bad)


class TestLoad:
    def test_round_trip(self) -> None:
        ca = Authority.create("CA")
        again = Authority.load(ca.certificate_pem, ca.key_pem)
        assert (again.pin, again.certificate_pem, again.key_pem) == (ca.pin, ca.certificate_pem, ca.key_pem)

    def test_foreign_damaged_and_unfit_pairs(self) -> None:
        one, two = Authority.create("CA"), Authority.create("CA")
        leaf = one.issue_client("c")
        for certificate, key in (
            (one.certificate_pem, two.key_pem),
            (leaf.certificate_pem, leaf.key_pem),
            ("", one.key_pem),
            (one.certificate_pem, ""),
            (one.certificate_pem, private(ACCEPTED["rsa-2048"]())),
        ):
            with pytest.raises(StateError):
                Authority.load(certificate, key)


def _load_or_create(directory: Path, barrier, pins) -> None:
    barrier.wait()
    pins.put(Authority.load_or_create(directory, "CA").pin)


class TestDirectory:
    def test_made_once_private_and_reused(self, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            one = Authority.load_or_create(tmp_path / "data" / "ca", "relay CA")
        finally:
            os.umask(before)
        two = Authority.load_or_create(tmp_path / "data" / "ca", "relay CA")
        assert (one.pin, one.certificate_pem) == (two.pin, two.certificate_pem)
        for file in (tmp_path / "data" / "ca").iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "data" / "ca").stat().st_mode) == 0o700

    def test_processes_that_start_together_agree(self, tmp_path: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        barrier, pins = spawn.Barrier(4), spawn.Queue()
        workers = [spawn.Process(target=_load_or_create, args=(tmp_path / "ca", barrier, pins)) for _ in range(4)]
        for worker in workers:
            worker.start()
        found = {pins.get(timeout=60) for _ in workers}
        for worker in workers:
            worker.join(60)
            assert worker.exitcode == 0
        assert found == {Authority.load_or_create(tmp_path / "ca", "CA").pin}

    def test_a_crash_between_key_and_certificate_keeps_the_key(self, tmp_path: Path) -> None:
        ca = Authority.load_or_create(tmp_path, "CA")
        (tmp_path / "ca.crt").unlink()
        assert Authority.load_or_create(tmp_path, "CA").pin == ca.pin

    def test_a_lost_key_is_an_error_and_not_a_new_ca(self, tmp_path: Path) -> None:
        Authority.load_or_create(tmp_path, "CA")
        (tmp_path / "ca.key").unlink()
        with pytest.raises(StateError, match="backup"):
            Authority.load_or_create(tmp_path, "CA")
        assert not (tmp_path / "ca.key").exists()

    def test_a_copy_is_the_same_ca(self, tmp_path: Path) -> None:
        """Several relays over one CA: the operator copies both files before the first start."""
        one = Authority.load_or_create(tmp_path / "one", "CA")
        (tmp_path / "two").mkdir()
        for name in ("ca.crt", "ca.key"):
            (tmp_path / "two" / name).write_bytes((tmp_path / "one" / name).read_bytes())
        (tmp_path / "two" / "ca.key").chmod(0o600)
        two = Authority.load_or_create(tmp_path / "two", "CA")
        assert (two.pin, two.certificate_pem) == (one.pin, one.certificate_pem)
        shaken(one, None, two.issue_server(["localhost"]))

    def test_half_a_copy(self, tmp_path: Path) -> None:
        one, two = Authority.load_or_create(tmp_path / "one", "CA"), Authority.load_or_create(tmp_path / "two", "CA")
        (tmp_path / "one" / "ca.crt").write_text(two.certificate_pem)
        with pytest.raises(StateError, match="do not belong together"):
            Authority.load_or_create(tmp_path / "one", "CA")
        (tmp_path / "three").mkdir()
        (tmp_path / "three" / "ca.crt").write_text(one.certificate_pem)
        with pytest.raises(StateError, match="copy both"):
            Authority.load_or_create(tmp_path / "three", "CA")

    def test_a_copy_that_belongs_to_another_user(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        Authority.load_or_create(tmp_path, "CA")

        def refuse(path: str, _flags: int) -> int:
            raise PermissionError(13, "Permission denied", path)

        monkeypatch.setattr(private_files, "_open_without_waiting", refuse)
        with pytest.raises(StateError, match="chown"):
            Authority.load_or_create(tmp_path, "CA")

    def test_a_key_open_to_every_user_is_refused(self, tmp_path: Path) -> None:
        Authority.load_or_create(tmp_path, "CA")
        (tmp_path / "ca.key").chmod(0o644)
        with pytest.raises(StateError, match="chmod 600"):
            Authority.load_or_create(tmp_path, "CA")

    def test_damage_is_named_by_its_place(self, tmp_path: Path) -> None:
        Authority.load_or_create(tmp_path, "CA")
        (tmp_path / "ca.crt").write_bytes(b"\xff\x00")
        with pytest.raises(StateError, match=str(tmp_path)):
            Authority.load_or_create(tmp_path, "CA")


def test_a_ca_is_made_with_a_life_of_years() -> None:
    certificate = parse(Authority.create("CA").certificate_pem)
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc > timedelta(days=3000)
