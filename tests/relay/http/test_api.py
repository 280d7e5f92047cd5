"""The API over real TLS connections, with the real authority, registry and policy."""

import json
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from arcbridge.errors import PinMismatch
from arcbridge.identity.proof import ProofKey
from arcbridge.net.address import Address
from arcbridge.net.tls import fetch_relay_cas, fetch_unverified_ca
from arcbridge.pki.authority import Authority, Issued, agent_ca_pin, agent_cluster, agent_generation
from arcbridge.pki.enrolment import JoinToken, make_csr, make_key
from arcbridge.pki.pins import pin_of
from arcbridge.pki.rotation import Rotation
from arcbridge.relay.http.api import FAILURES, FAILURES_RATE, LOG_INTERVAL, UNPROVED, tls_peer_certificate
from arcbridge.relay.http.server import BODY_LIMIT
from arcbridge.relay.registry.base import RegistryUnavailable, UserRevocation
from tests.relay.api_station import CANARY, KEY, Relay, error, serving
from tests.relay.registry.conformance import known


async def test_ca(relay: Relay) -> None:
    status, answer, headers = await relay.call("GET", "/v1/ca")
    assert (status, answer) == (200, relay.authority.certificate_pem)
    assert headers["Server"] == "arcbridge"
    assert headers["Cache-Control"] == "no-store"


async def test_the_first_contact_of_an_agent_that_has_only_a_pin(relay: Relay) -> None:
    """docs/threats.md#E6, with the code that agents and clients use."""
    address = Address("127.0.0.1", relay.port)
    assert (await fetch_relay_cas(address, relay.authority.pin)).trusted == relay.authority.certificate_pem
    wrong = Authority.create("relay CA").pin
    with pytest.raises(PinMismatch) as caught:
        await fetch_relay_cas(address, wrong)
    assert wrong in caught.value.message
    assert relay.authority.pin in caught.value.message


async def test_a_ca_that_was_rotated(tmp_path: Path) -> None:
    """An end of an earlier version takes the first certificate, and this one any whose pin it has."""
    now = time.time()
    first = Authority.create("relay CA")
    state = Rotation(first.certificate_pem, first.key_pem)
    for step, begins_with in (("next", 0), ("activate", 0), ("retire", 1)):
        state = state.take(step, now)
        present, pins = state.authority(), state.list.pins
        (tmp_path / step).mkdir()
        async with serving(tmp_path / step, None, authority=present) as relay:
            address = Address("127.0.0.1", relay.port)
            _, answer, _ = await relay.call("GET", "/v1/ca")
            assert (
                pin_of(f"{str(answer).partition('-----END CERT')[0]}-----END CERTIFICATE-----\n") == pins[begins_with]
            )
            assert pin_of(await fetch_unverified_ca(address)) == present.pin
            for pin in pins:
                found = await fetch_relay_cas(address, pin)
                assert (found.pins[0], found.pins[-1]) == (pin, pins[-1])


class TestEnrol:
    async def test_a_token_and_a_key_become_a_certificate(self, relay: Relay, everything_logged: list[str]) -> None:
        token, key = await relay.token(), make_key()
        answer = await relay.granted("/v1/enrol", relay.enrolment(token, key))
        assert set(answer) == {"certificate", "ca", "cluster", "not_after"}
        assert (answer["cluster"], answer["ca"]) == ("prod", relay.authority.certificate_pem)
        assert agent_cluster(ssl.PEM_cert_to_DER_cert(answer["certificate"])) == "prod"
        assert answer["not_after"] == pytest.approx(relay.clock.now + 600, abs=2)
        record = await known(relay.registry)
        assert record.ca_pin == relay.cluster_ca.pin
        assert record.certificate_expires == answer["not_after"]
        (line,) = [line for line in everything_logged if "agent enrolled" in line]
        # Not `join_token`: the log takes a field of that name for the secret itself.
        assert f"'join_token_id': '{token.partition('.')[0]}'" in line
        assert token.partition(".")[2] not in line

    async def test_a_token_for_a_name_of_another_cluster_is_found_before_it_is_used(self, relay: Relay) -> None:
        """As an agent's doctor asks, which has made its CA and no certificate yet."""
        await relay.granted("/v1/enrol", relay.enrolment(await relay.token(), make_key()))
        other = Authority.create("another").pin
        for pin, rebind, code, words in (
            (relay.cluster_ca.pin, False, 200, "prod"),
            (other, False, 403, f"expected {relay.cluster_ca.pin}, found {other}"),
            (other, True, 200, "prod"),
            ("nonsense", False, 400, "cluster_ca_pin is no pin"),
        ):
            token = await relay.registry.create_join_token("prod", expires_at=relay.clock.now + 60, rebind=rebind)
            status, answer, _ = await relay.call("POST", "/v1/join-token", {"join_token": token, "cluster_ca_pin": pin})
            assert status == code
            assert words in str(answer)
            assert "nonsense" not in str(answer)

    @pytest.mark.parametrize(
        ("change", "status", "words"),
        [
            ({"join_token": "nonsense"}, 403, "not a join token"),
            ({"join_token": JoinToken.create().text}, 403, "not known here"),
            ({"csr": "nonsense"}, 403, "certificate request"),
            ({"csr": "x" * 20_000}, 403, "16 KiB"),
            ({"cluster_ca": "nonsense"}, 403, "cluster's CA"),
            ({"cluster_ca": None}, 400, "cluster_ca"),
            ({"csr": 5}, 400, "csr"),
            ({"join_token": ["a"]}, 400, "join_token"),
        ],
    )
    async def test_a_bad_request_consumes_nothing_and_is_not_quoted(
        self, relay: Relay, change: dict[str, object], status: int, words: str, everything_logged: list[str]
    ) -> None:
        body = {**relay.enrolment(token := await relay.token(), make_key()), **change}
        found, answer, _ = await relay.call("POST", "/v1/enrol", body)
        assert found == status
        assert words in error(answer)[1]
        assert (await relay.registry.list_join_tokens())[0].used == 0
        shown = json.dumps(answer) + "".join(everything_logged)
        assert "nonsense" not in shown
        assert token.partition(".")[2] not in shown

    @pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 60_000, b'"x"', CANARY.encode()])
    async def test_a_body_that_is_no_object(self, relay: Relay, data: bytes, everything_logged: list[str]) -> None:
        status, answer, _ = await relay.call("POST", "/v1/enrol", data=data)
        assert status == 400
        assert error(answer)[0] == "bad_request"
        assert CANARY[:12] not in json.dumps(answer) + "".join(everything_logged)

    async def test_a_body_over_the_limit(self, relay: Relay) -> None:
        assert await relay.refused("POST", "/v1/enrol", data=b" " * (BODY_LIMIT + 1)) == (413, "too_large")

        async def endless() -> AsyncIterator[bytes]:
            for _ in range(5):
                yield b" " * 16_384

        connector = aiohttp.TCPConnector(ssl=relay.context(), force_close=True)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.post(f"https://127.0.0.1:{relay.port}/v1/enrol", data=endless()) as reply,
        ):
            assert reply.status == 413

    async def test_compressed_bodies_are_not_inflated(self, relay: Relay) -> None:
        headers = {"Content-Encoding": "gzip"}
        status, answer, _ = await relay.call("POST", "/v1/enrol", data=b"\x1f\x8b", headers=headers)
        assert (status, error(answer)[0]) == (415, "unsupported_encoding")

    async def test_failures_slow_down_the_address_and_lock_out_no_neighbour(self, relay: Relay) -> None:
        """docs/threats.md#L5: the neighbours behind one address fail without end, and an honest agent enrols. What the
        limit refuses spends no record, of which all addresses have so many together."""
        recorded: list[str] = []
        relay.api.audit.note_stranger = lambda act, *_: recorded.append(act)
        for _ in range(FAILURES):
            body = relay.enrolment(JoinToken.create().text, make_key())
            assert (await relay.call("POST", "/v1/enrol", body))[0] == 403
        body = relay.enrolment(JoinToken.create().text, make_key())
        status, answer, headers = await relay.call("POST", "/v1/enrol", body)
        assert (status, error(answer)[0]) == (429, "rate_limited")
        assert "not known here" in error(answer)[1]
        assert 1 <= int(headers["Retry-After"]) <= 1 / FAILURES_RATE
        token = await relay.token()
        assert (await relay.call("POST", "/v1/enrol", relay.enrolment(token, make_key())))[0] == 200
        relay.clock.now += 1 / FAILURES_RATE
        body = relay.enrolment(JoinToken.create().text, make_key())
        assert (await relay.call("POST", "/v1/enrol", body))[0] == 403
        assert relay.limited["enrolments"] == 1
        assert recorded == ["agent enrol"] * (FAILURES + 1)

    async def test_the_registry_is_out(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        """docs/threats.md#E8: a time to retry, and that is no failure of the agent's."""

        async def out(*_: object) -> None:
            raise RegistryUnavailable("the registry is locked by another process: try again in a moment")

        monkeypatch.setattr(relay.registry, "redeem_join_token", out)
        for _ in range(7):
            body = relay.enrolment(await relay.token(), make_key())
            status, answer, headers = await relay.call("POST", "/v1/enrol", body)
            assert (status, error(answer)[0], headers["Retry-After"]) == (503, "unavailable", "5")


class TestRenew:
    async def test_over_the_certificate_itself(self, relay: Relay) -> None:
        """The cluster is the certificate's; what the body claims counts for nothing."""
        agent = await relay.enrolled()
        await relay.enrolled("test")
        relay.clock.now += 60
        body = {"csr": make_csr(agent.key_pem), "cluster": "test"}
        answer = await relay.granted("/v1/renew", body, agent)
        assert answer["cluster"] == "prod"
        assert agent_cluster(ssl.PEM_cert_to_DER_cert(answer["certificate"])) == "prod"
        record = await known(relay.registry)
        assert record.certificate_expires == answer["not_after"] >= relay.clock.now + 600
        renewed = Issued(answer["certificate"], agent.key_pem)
        assert (await relay.call("POST", "/v1/renew", body, certificate=renewed))[0] == 200

    async def test_it_keeps_the_key(self, relay: Relay) -> None:
        agent = await relay.enrolled()
        status, answer, _ = await relay.call("POST", "/v1/renew", {"csr": make_csr(make_key())}, certificate=agent)
        assert (status, error(answer)[0]) == (403, "enrolment_refused")
        assert "keeps the agent's key" in error(answer)[1]
        record = await known(relay.registry)
        assert not record.revoked

    async def renewal(self, relay: Relay, agent: Issued, csr: str, **more: str) -> tuple[int, Issued | str]:
        body = {"csr": csr, **more}
        status, answer, _ = await relay.call("POST", "/v1/renew", body, certificate=agent)
        if status != 200:
            return status, error(answer)[1]
        return status, Issued(answer["certificate"], agent.key_pem)

    async def test_a_stored_request_may_come_again_and_another_one_may_not(
        self, relay: Relay, everything_logged: list[str]
    ) -> None:
        """docs/threats.md#E11: a copy of the credential is renewed beside its owner; both are out then."""
        agent = await relay.enrolled()
        own, stolen = make_csr(agent.key_pem), make_csr(agent.key_pem)
        status, renewed = await self.renewal(relay, agent, own, stored="yes")
        assert status == 200
        assert isinstance(renewed, Issued)
        relay.clock.now += 60
        status, repeated = await self.renewal(relay, agent, own, stored="yes")
        assert status == 200
        assert isinstance(repeated, Issued)
        for one, generation in ((agent, 1), (renewed, 2), (repeated, 2)):
            assert agent_generation(ssl.PEM_cert_to_DER_cert(one.certificate_pem)) == generation
        assert relay.counters.certificates_renewed_twice == 0
        for more in ({"stored": "yes"}, {}):  # a thief says what he likes about his request
            status, words = await self.renewal(relay, agent, stolen, **more)
            assert status == 403
        assert relay.counters.certificates_renewed_twice == 1
        (line,) = [line for line in everything_logged if "agent certificate renewed twice" in line]
        assert "prod" in line
        for one in (agent, renewed, repeated):
            status, words = await self.renewal(relay, one, own, stored="yes")
            assert status == 403
            assert "revoked" in str(words)
        assert await relay.registry.revocations() == {"prod"}
        await relay.registry.unrevoke_cluster("prod")
        status, words = await self.renewal(relay, renewed, own, stored="yes")
        assert status == 403
        assert "void" in str(words)

    async def test_without_a_certificate(self, relay: Relay) -> None:
        status, answer, _ = await relay.call("POST", "/v1/renew", {"csr": make_csr(make_key())})
        assert (status, error(answer)[0]) == (401, "unauthenticated")
        assert "join token" in error(answer)[1]

    async def test_with_one_of_this_ca_that_is_no_agents(self, relay: Relay) -> None:
        certificate = relay.authority.issue_client("prod")
        body = {"csr": make_csr(make_key())}
        assert (await relay.call("POST", "/v1/renew", body, certificate=certificate))[0] == 403

    async def test_with_one_of_another_ca(self, relay: Relay) -> None:
        key = make_key()
        forged = Issued(Authority.create("relay CA").sign_agent(make_csr(key), "prod", life=600), key)
        with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
            await relay.call("POST", "/v1/renew", {"csr": make_csr(key)}, certificate=forged)

    async def test_one_without_a_pin_gets_it_at_its_renewal(self, relay: Relay) -> None:
        await relay.enrolled()
        key = make_key()
        old = Issued(relay.authority.sign_agent(make_csr(key), "prod", life=600), key)
        answer = await relay.granted("/v1/renew", {"csr": make_csr(key)}, old)
        assert agent_ca_pin(ssl.PEM_cert_to_DER_cert(answer["certificate"])) == relay.cluster_ca.pin

    async def test_a_weak_request(self, relay: Relay) -> None:
        agent = await relay.enrolled()
        assert (await relay.call("POST", "/v1/renew", {"csr": "x"}, certificate=agent))[0] == 403

    async def test_an_unverified_certificate_is_none(self) -> None:
        """A listener that asks for no certificate, or checks none, must not make a peer an agent."""

        class Tls:
            def getpeercert(self, binary_form: bool = False) -> object:
                return b"anything" if binary_form else {}

        class Transport:
            def get_extra_info(self, name: str) -> object:
                return Tls() if name == "ssl_object" else None

        class Request:
            transport = Transport()

        assert tls_peer_certificate(Request()) is None


class TestClusters:
    async def test_only_what_the_policy_lets_the_caller_reach(self, relay: Relay) -> None:
        for name in ("prod", "test", "other"):
            await relay.enrolled(name)
        await relay.registry.seen("prod", relay.clock.now - 30, version="0.1.0")
        relay.agents.update(prod=2, other=1)
        relay.api.round_trip = {"prod": 0.012, "test": 0.0}.__getitem__
        record = await known(relay.registry)
        status, answer, _ = await relay.call("GET", "/v1/clusters", headers={"Authorization": "Bearer token-of-ann"})
        assert status == 200
        assert [(one["name"], one["state"], one["agents"]) for one in answer] == [
            ("prod", "Connected", 2),
            ("test", "Connecting", 0),
        ]
        assert answer[0] == {
            "name": "prod",
            "state": "Connected",
            "agents": 2,
            "round_trip": 0.012,
            "last_seen": relay.clock.now,
            "ca_pin": relay.cluster_ca.pin,
            "certificate_expires": record.certificate_expires,
            "version": "0.1.0",
            "revoked": False,
        }
        # Who is revoked is told so, and of no cluster.
        relay.access.learn_users({"ann": UserRevocation("ann", 1, "left")})
        for path in ("/v1/clusters", "/v1/clusters/prod", "/v1/clusters/unknown"):
            status, answer, _ = await relay.call("GET", path, headers={"Authorization": "Bearer token-of-ann"})
            assert status == 403
            assert "were revoked (left): log in again" in error(answer)[1]
        for user, names in (("bob", ["test"]), ("eve", [])):
            headers = {"Authorization": f"bearer token-of-{user}"}
            _, answer, _ = await relay.call("GET", "/v1/clusters", headers=headers)
            assert isinstance(answer, list)
            assert [one["name"] for one in answer] == names

    async def test_unknown_and_not_allowed_get_one_answer(self, relay: Relay) -> None:
        """docs/threats.md#J22."""
        await relay.enrolled("prod")
        headers = {"Authorization": "Bearer token-of-bob"}
        known = await relay.call("GET", "/v1/clusters/prod", headers=headers)
        unknown = await relay.call("GET", "/v1/clusters/nothing", headers=headers)
        assert known[:2] == unknown[:2]
        assert known[0] == 404
        headers = {"Authorization": "Bearer token-of-ann"}
        status, answer, _ = await relay.call("GET", "/v1/clusters/prod", headers=headers)
        assert status == 200
        assert answer["name"] == "prod"
        assert await relay.refused("GET", "/v1/clusters/Prod%0a", headers=headers) == (400, "bad_request")

    @pytest.mark.parametrize("value", [None, "", "Bearer", "Bearer ", "Basic eA==", f"Bearer {CANARY}", CANARY])
    async def test_without_a_good_token(self, relay: Relay, value: str | None, everything_logged: list[str]) -> None:
        headers = {} if value is None else {"Authorization": value}
        status, answer, found = await relay.call("GET", "/v1/clusters", headers=headers)
        assert (status, error(answer)[0], found["WWW-Authenticate"]) == (401, "unauthenticated", "Bearer")
        assert CANARY[:12] not in json.dumps(answer) + "".join(everything_logged)

    async def test_t30_a_bound_token_needs_its_proof(self, relay: Relay, everything_logged: list[str]) -> None:
        """A stolen access token would list the clusters otherwise, though it joins none."""
        text = "token-of-ann.bound"
        good = KEY.sign_proof(text, relay.spki, "", time.time())
        bearer = {"Authorization": f"Bearer {text}"}
        status, _, _ = await relay.call("GET", "/v1/clusters", headers={**bearer, "Arcbridge-Proof": good})
        assert status == 200
        for proof, reason in (
            (None, "missing"),
            ("", "missing"),
            (good[:-2], "shape"),
            (ProofKey.generate().sign_proof(text, relay.spki, "", time.time()), "key"),
            (KEY.sign_proof(text, b"another relay", "", time.time()), "peer"),
            (KEY.sign_proof(text, b"", "", time.time()), "peer"),
            (KEY.sign_proof("token-of-bob.bound", relay.spki, "", time.time()), "ath"),
        ):
            headers = bearer if proof is None else {**bearer, "Arcbridge-Proof": proof}
            for path in ("/v1/clusters", "/v1/clusters/prod"):
                status, answer, _ = await relay.call("GET", path, headers=headers)
                assert (status, error(answer)[0]) == (401, "unauthenticated")
                assert answer["error"]["rule"] == f"proof.{reason}"
        logged = [line for line in everything_logged if "api token refused" in line]
        assert logged
        assert all("ann" in line and "proof." in line and good not in line for line in logged)
        twice = f"GET /v1/clusters HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {text}\r\n" + (
            f"Arcbridge-Proof: {good}\r\n" * 2 + "Connection: close\r\n\r\n"
        )
        assert (await relay.raw(twice.encode())).startswith(b"HTTP/1.1 401 ")

    async def test_t30_refusals_for_want_of_a_proof_are_limited_by_address(
        self, relay: Relay, everything_logged: list[str]
    ) -> None:
        """docs/threats.md#L5: the log tells of each burst once, and neither the token's owner nor a neighbour pays."""
        text = "token-of-ann.bound"
        bearer = {"Authorization": f"Bearer {text}"}
        for _ in range(UNPROVED):
            assert (await relay.call("GET", "/v1/clusters", headers=bearer))[0] == 401
        status, answer, headers = await relay.call("GET", "/v1/clusters", headers=bearer)
        assert (status, error(answer)[0], headers["Retry-After"]) == (429, "rate_limited", "2")
        assert "came without a proof" in error(answer)[1]
        assert relay.limited["proofs"] == 1
        good = {**bearer, "Arcbridge-Proof": KEY.sign_proof(text, relay.spki, "", time.time())}
        assert (await relay.call("GET", "/v1/clusters", headers=good))[0] == 200
        assert len([line for line in everything_logged if "api token refused" in line]) == 1
        relay.clock.now += LOG_INTERVAL
        assert (await relay.call("GET", "/v1/clusters", headers=bearer))[0] == 401
        *_, last = [line for line in everything_logged if "api token refused" in line]
        assert f"'requests': {UNPROVED + 1}" in last

    async def test_the_issuer_is_out(self, relay: Relay) -> None:
        status, answer, headers = await relay.call(
            "GET", "/v1/clusters", headers={"Authorization": "Bearer issuer-out"}
        )
        assert (status, error(answer)[0], headers["Retry-After"]) == (503, "unavailable", "7")


class TestPages:
    """docs/threats.md#W5: a browser carries a page's requests into networks that the page's author cannot reach."""

    @pytest.mark.parametrize(
        "headers",
        [{"Origin": "https://page.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}],
        ids=["origin", "null", "fetch"],
    )
    async def test_w5_a_page_changes_and_reads_nothing(self, relay: Relay, headers: dict[str, str]) -> None:
        token = await relay.token()
        # As a form posts it: of a type that needs no leave.
        body = json.dumps(relay.enrolment(token, make_key())).encode()
        form = {**headers, "Content-Type": "text/plain"}
        status, answer, got = await relay.call("POST", "/v1/enrol", headers=form, data=body)
        assert (status, error(answer)[0]) == (403, "forbidden")
        for method, path in (("GET", "/v1/ca"), ("GET", "/v1/clusters"), ("OPTIONS", "/v1/enrol"), ("GET", "/none")):
            bearer = {**headers, "Authorization": "Bearer user-alice"}
            status, answer, got = await relay.call(method, path, headers=bearer)
            assert (status, error(answer)[0]) == (403, "forbidden")
            assert not [name for name in got if name.lower().startswith("access-control-")]
        assert await relay.registry.cluster("prod") is None
        status, _, _ = await relay.call("POST", "/v1/enrol", headers={"Sec-Fetch-Site": "none"}, data=body)
        assert status == 200, "the token was not used up"


class TestBadHttp:
    """Whatever arrives, the answer is ours, and nothing of what arrived is in it or in a log (docs/threats.md#A3,
    #O1).
    """

    @pytest.mark.parametrize(
        "request_head",
        [
            f"GET /v1/clusters HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {CANARY * 3000}\r\n\r\n",
            f"GET /{CANARY * 3000} HTTP/1.1\r\nHost: x\r\n\r\n",
            f"GET /v1/ca HTTP/1.1\r\nHost: x\r\nAuthorization : Bearer {CANARY}\r\n\r\n",
            f"GET /v1/ca HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {CANARY}\x00\r\n\r\n",
            f"{CANARY}\r\n\r\n",
            f"GET /v1/ca HTTP/9.9{CANARY}\r\n\r\n",
            f"GET /v1/ca HTTP/1.1\r\nHost: x\r\nContent-Length: {CANARY}\r\n\r\n",
            f"POST /v1/enrol HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{CANARY}\r\n",
            f"POST /v1/enrol HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n{CANARY}",
            f"{CANARY} /v1/ca HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            f"GET /v1/{CANARY} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            f"POST /v1/enrol HTTP/1.1\r\nHost: x\r\nExpect: {CANARY}\r\nConnection: close\r\n\r\n",
            f"GET /nowhere HTTP/1.1\r\nHost: x\r\nExpect: {CANARY}\r\nConnection: close\r\n\r\n",
            f"GET /%0A HTTP/1.1\r\nHost: x\r\nExpect: {CANARY}\r\nConnection: close\r\n\r\n",
            f"OPTIONS * HTTP/1.1\r\nHost: x\r\nExpect: {CANARY}\r\nConnection: close\r\n\r\n",
            f"GET https://{CANARY}/v1/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            f"GET /v1/clusters HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {CANARY}\r\nConnection: close\r\n\r\n",
            "GET /v1/clusters HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer bug\r\nConnection: close\r\n\r\n",
        ],
        ids=range(18),
    )
    async def test_nothing_is_quoted(self, relay: Relay, request_head: str, everything_logged: list[str]) -> None:
        answer = (await relay.raw(request_head.encode("latin-1"))).decode()
        head, _, body = answer.partition("\r\n\r\n")
        assert " ".join(head.split(" ", 2)[1:2]) in ("400", "401", "403", "404", "405", "417", "500")
        assert "Server: arcbridge" in head
        code, message = error(json.loads(body))
        assert code
        assert message
        shown = answer + "".join(everything_logged)
        assert CANARY[:12] not in shown
        assert "aiohttp" not in answer

    async def test_the_limit_of_a_header_lets_real_tokens_pass(self, relay: Relay) -> None:
        headers = {"Authorization": f"Bearer token-of-{'x' * 60_000}"}
        assert (await relay.call("GET", "/v1/clusters", headers=headers))[0] == 200

    async def test_wrong_methods_and_paths(self, relay: Relay) -> None:
        for method, path, status in (
            ("POST", "/v1/ca", 405),
            ("GET", "/v1/enrol", 405),
            ("DELETE", "/v1/clusters/prod", 405),
            ("GET", "/", 404),
            ("GET", "/v1/enrol/x", 404),
        ):
            found, answer, _ = await relay.call(method, path)
            assert found == status
            error(answer)

    async def test_expect_continue_is_met(self, relay: Relay) -> None:
        head = b"POST /v1/enrol HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n"
        answer = await relay.raw(head + b"Connection: close\r\n\r\n{}")
        assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 400 ")
