"""How a credential is made, shared and renewed, and how an agent recovers after it has expired (docs/threats.md#E2,
docs/threats.md#E3, docs/threats.md#E7, docs/threats.md#B8).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from arcbridge.agent import enrol
from arcbridge.agent.enrol import CredentialKeeper, outer_context
from arcbridge.errors import ConfigError, EnrolmentRefused, PinMismatch, StateError, Unreachable
from arcbridge.net.address import parse_address
from arcbridge.net.tls import ALPN_CONTROL, ALPN_JOIN
from arcbridge.pki import credentials as entries
from arcbridge.pki.authority import Authority, _builder
from arcbridge.pki.credentials import DirectoryStore
from arcbridge.pki.enrolment import key_hash, make_csr, make_key
from arcbridge.pki.pins import pin_of
from arcbridge.pki.rotation import Rotation
from tests.support.eventually import until

from .fake_relay import FakeRelay


@pytest.fixture
async def relay() -> AsyncIterator[FakeRelay]:
    async with FakeRelay.serving() as made:
        made.tokens["id.secret"] = "one"
        yield made


@pytest.fixture
async def second(relay: FakeRelay) -> AsyncIterator[FakeRelay]:
    """Another relay over the same CA, with a registry of its own."""
    async with FakeRelay.serving(authority=relay.authority) as made:
        yield made


class Clock:
    ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


def keeper(
    relay: FakeRelay,
    directory: Path,
    *,
    token: str = "id.secret",
    clock: Any = time.time,
    then: tuple[FakeRelay, ...] = (),
    **changes: Any,
) -> CredentialKeeper:
    """The keeper of an agent whose list is `relay` and those of `then`."""
    file = directory / f"token-{token}"
    file.write_text(token + "\n")
    settings: dict[str, Any] = {"relay_ca_pin": relay.pin, "join_token_file": file, **changes}
    relays = [parse_address(one.address) for one in (relay, *then)]
    return CredentialKeeper(DirectoryStore(directory / "state"), relays, clock=clock, jitter=lambda: 0.0, **settings)


async def test_first_start_and_second_start(relay: FakeRelay, tmp_path: Path) -> None:
    first = await keeper(relay, tmp_path).start()
    assert first.cluster == "one"
    assert pin_of(first.relay_ca_pem) == relay.pin
    (call,) = relay.calls
    assert call[0] == "/v1/enrol"
    assert set(call[1]) == {"join_token", "csr", "cluster_ca"}
    assert call[1]["cluster_ca"] == first.cluster_ca_certificate_pem
    second = await keeper(relay, tmp_path, join_token_file=None).start()
    assert second == first
    assert len(relay.calls) == 1


async def test_the_context_towards_relays_is_kept_until_the_credential_changes(
    relay: FakeRelay, tmp_path: Path
) -> None:
    with pytest.raises(StateError):
        outer_context(keeper(relay, tmp_path).current, ALPN_CONTROL)
    credential = await keeper(relay, tmp_path).start()
    first = outer_context(credential, ALPN_CONTROL)
    assert outer_context(credential, ALPN_CONTROL) is first
    assert outer_context(credential, ALPN_JOIN) is not first
    assert outer_context(replace(credential, cluster="other"), ALPN_CONTROL) is not first


async def test_e3_pods_that_start_at_once_share_one_ca_and_one_token(relay: FakeRelay, tmp_path: Path) -> None:
    found = await asyncio.gather(*(keeper(relay, tmp_path).start() for _ in range(5)))
    assert len({one.cluster_ca_certificate_pem for one in found}) == 1
    assert len({one.key_pem for one in found}) == 1


async def test_e2_an_answer_that_was_lost_costs_nothing(relay: FakeRelay, tmp_path: Path) -> None:
    relay.answers["/v1/enrol"] = (503, {"error": {"message": "busy"}})
    first = keeper(relay, tmp_path)
    starting = asyncio.ensure_future(first.start())
    await until(lambda: relay.calls)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    relay.redeemed["id.secret"] = key_hash(relay.calls[0][1]["csr"])
    del relay.answers["/v1/enrol"]
    again = await keeper(relay, tmp_path).start()
    assert again.cluster == "one"
    assert relay.calls[0][1]["cluster_ca"] == relay.calls[-1][1]["cluster_ca"], "the CA of the first try is kept"


async def test_renewal_over_the_certificate_itself(relay: FakeRelay, tmp_path: Path) -> None:
    clock = Clock()
    one = keeper(relay, tmp_path, clock=clock)
    sibling = keeper(relay, tmp_path, clock=clock)
    before = await one.start()
    await sibling.start()
    await one._check_store()
    assert len(relay.calls) == 1
    clock.ahead = 3600 * 0.7
    await one._check_store()
    assert relay.calls[-1][0] == "/v1/renew"
    assert one.current.certificate_pem != before.certificate_pem
    assert one.current.key_pem == before.key_pem
    assert one.renewals == 1
    clock.ahead = 0.0
    await sibling._check_store()
    assert sibling.current == one.current, "the others adopt it"
    assert len(relay.calls) == 2


async def test_what_is_damaged_in_the_store_is_not_adopted(relay: FakeRelay, tmp_path: Path) -> None:
    """A rotation of another CA than the one that was restored beside it: what was read before serves on meanwhile."""
    one = keeper(relay, tmp_path)
    before = await one.start()
    store, other = DirectoryStore(tmp_path / "state"), Authority.create("other")
    rotation = Rotation(other.certificate_pem, other.key_pem).take("next", time.time()).encode()
    for entry in (rotation, b""):
        snapshot = await store.load()
        assert snapshot is not None
        await store.save({entries.CLUSTER_ROTATION: entry}, expect_version=snapshot.version)
        if entry:
            with pytest.raises(StateError, match="of another CA than the certificate beside it"):
                await one._check_store()
        else:
            await one._check_store()
        assert one.current == before
        assert one.announcement is None


async def test_a_renewal_s_request_is_stored_before_it_is_sent(relay: FakeRelay, tmp_path: Path) -> None:
    """docs/threats.md#E11: its answer is lost, and it is asked for again, by another process even."""
    clock = Clock()
    before = await keeper(relay, tmp_path, clock=clock).start()
    clock.ahead = 3600 * 0.7
    relay.answers["/v1/renew"] = (503, {"error": {"message": "busy"}})
    for _ in range(2):
        one = keeper(relay, tmp_path, clock=clock)
        await one.start()
        with pytest.raises(Unreachable):
            await one._check_store()
    snapshot = await DirectoryStore(tmp_path / "state").load()
    del relay.answers["/v1/renew"]
    again = keeper(relay, tmp_path, clock=clock)
    await again.start()
    await again._check_store()
    requests = [call[1] for call in relay.calls if call[0] == "/v1/renew"]
    assert requests == [{"csr": snapshot[entries.RENEWAL_REQUEST].decode(), "stored": "yes"}] * 3
    assert again.current.key_pem == before.key_pem
    # The next renewal is another one.
    await again._check_store()
    assert again.renewals == 2
    assert relay.calls[-1][1]["csr"] != requests[0]["csr"]
    snapshot = await DirectoryStore(tmp_path / "state").load()
    assert snapshot[entries.RENEWAL_REQUEST] == b""


async def test_pods_that_renew_at_once_send_one_request(tmp_path: Path) -> None:
    clock = Clock()
    async with FakeRelay.serving(authority=Authority.create("relay", clock=clock)) as relay:
        relay.tokens["id.secret"] = "one"
        pods = [keeper(relay, tmp_path, clock=clock) for _ in range(5)]
        for pod in pods:
            await pod.start()
        clock.ahead = 3600 * 0.7
        await asyncio.gather(*(pod._check_store() for pod in pods))
        assert len({call[1]["csr"] for call in relay.calls if call[0] == "/v1/renew"}) == 1
        for pod in pods:
            await pod._check_store()
        assert len({pod.current.certificate_pem for pod in pods}) == 1


async def test_a_pod_that_comes_late_renews_no_former_certificate(relay: FakeRelay, tmp_path: Path) -> None:
    """Its clock says that what its sibling has just stored is old too; it adopts that first all the same."""
    clock = Clock()
    one, late = (keeper(relay, tmp_path, clock=clock) for _ in range(2))
    await one.start()
    await late.start()
    clock.ahead = 3600 * 0.7
    store = DirectoryStore(tmp_path / "state")
    before = await store.load()
    await one._check_store()
    await late._renew(before)
    assert late.current == one.current
    assert len([call for call in relay.calls if call[0] == "/v1/renew"]) == 1


async def test_a_stored_request_over_another_key_is_not_sent(relay: FakeRelay, tmp_path: Path) -> None:
    clock = Clock()
    one = keeper(relay, tmp_path, clock=clock)
    before = await one.start()
    store = DirectoryStore(tmp_path / "state")
    for foreign in (make_csr(make_key()).encode(), b"nonsense"):
        snapshot = await store.load()
        await store.save({entries.RENEWAL_REQUEST: foreign}, expect_version=snapshot.version)
        clock.ahead = 3600 * 0.7
        await one._check_store()
        assert relay.calls[-1][1]["csr"].encode() != foreign
    assert one.renewals == 2
    assert one.current.key_pem == before.key_pem


async def test_a_state_that_was_removed_is_stored_again_with_the_renewal(relay: FakeRelay, tmp_path: Path) -> None:
    clock = Clock()
    one = keeper(relay, tmp_path, clock=clock)
    before = await one.start()
    for file in (tmp_path / "state").iterdir():
        file.unlink()
    clock.ahead = 3600 * 0.7
    await one._check_store()
    assert one.renewals == 1
    stored = await keeper(relay, tmp_path, clock=clock).start()
    assert stored == one.current
    assert stored.cluster_ca_key_pem == before.cluster_ca_key_pem


async def test_lapsed_comes_back_with_a_new_token_and_keeps_its_ca(relay: FakeRelay, tmp_path: Path) -> None:
    clock = Clock()
    before = await keeper(relay, tmp_path, clock=clock).start()
    clock.ahead = 2 * 3600
    relay.life = 4 * 3600
    with pytest.raises(ConfigError, match="has lapsed and needs a join token"):
        await keeper(relay, tmp_path, clock=clock, join_token_file=None).start()
    relay.tokens["id2.secret"] = "one"
    after = await keeper(relay, tmp_path, token="id2.secret", clock=clock).start()
    assert after.cluster_ca_certificate_pem == before.cluster_ca_certificate_pem
    assert after.certificate_pem != before.certificate_pem


async def test_lapsed_while_it_runs(relay: FakeRelay, tmp_path: Path) -> None:
    clock = Clock()
    one = keeper(relay, tmp_path, clock=clock)
    await one.start()
    clock.ahead = 2 * 3600
    relay.life = 4 * 3600
    await one._check_store()
    assert relay.calls[-1][0] == "/v1/enrol"
    assert one.seconds_left > 0


async def test_a_token_of_another_cluster_is_refused(relay: FakeRelay, tmp_path: Path) -> None:
    clock = Clock()
    await keeper(relay, tmp_path, clock=clock).start()
    clock.ahead = 2 * 3600
    relay.life = 4 * 3600
    relay.tokens["id2.secret"] = "two"
    with pytest.raises(EnrolmentRefused, match="is for cluster two, but this agent's state belongs to cluster one"):
        await keeper(relay, tmp_path, token="id2.secret", clock=clock).start()


async def test_a_refused_token_says_so(relay: FakeRelay, tmp_path: Path) -> None:
    with pytest.raises(EnrolmentRefused, match="the join token is not good"):
        await keeper(relay, tmp_path, token="other.secret").start()


async def test_b8_a_certificate_over_another_key_is_not_taken(relay: FakeRelay, tmp_path: Path) -> None:
    foreign = relay.authority.sign_agent(make_csr(make_key()), "one", life=3600)
    relay.answers["/v1/enrol"] = (200, {"certificate": foreign, "cluster": "one", "ca": "", "not_after": 0})
    with pytest.raises(EnrolmentRefused, match="over another key"):
        await keeper(relay, tmp_path).start()


async def test_another_pin_is_a_hard_error_and_nothing_is_sent(relay: FakeRelay, tmp_path: Path) -> None:
    with pytest.raises(PinMismatch):
        await keeper(relay, tmp_path, relay_ca_pin=Authority.create("x").pin).start()
    assert relay.calls == []


async def test_ca_file(relay: FakeRelay, tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text(relay.authority.certificate_pem)
    assert (await keeper(relay, tmp_path, relay_ca_pin="", relay_ca_file=file).start()).cluster == "one"
    with pytest.raises(ConfigError, match="contradict"):
        await keeper(relay, tmp_path, relay_ca_pin=Authority.create("x").pin, relay_ca_file=file).start()


MISSING: list[tuple[dict[str, Any], str]] = [
    ({"relay_ca_pin": ""}, "relay_ca_pin or relay_ca_file"),
    ({"join_token_file": None}, "join_token_file: the agent is not enrolled"),
    (
        {"join_token_file": Path("/nowhere/token")},
        "the agent is not enrolled and /nowhere/token does not exist: it needs a join token; make one with",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MISSING, ids=[row[1] for row in MISSING])
async def test_missing_settings_are_named(
    relay: FakeRelay, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        await keeper(relay, tmp_path, **changes).start()


async def test_half_a_cluster_ca_is_never_replaced(relay: FakeRelay, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "state")
    await store.save({entries.CLUSTER_CA_CERTIFICATE: b"x"}, expect_version=None)
    with pytest.raises(StateError, match="incomplete"):
        await keeper(relay, tmp_path).start()


def waits(monkeypatch: pytest.MonkeyPatch, then: Callable[[], object]) -> list[float | None]:
    """Wait no time before the next try but call `then`; return the hints of relays."""
    hints: list[float | None] = []

    class NoWait:
        def next_delay(self, *, hint: float | None = None) -> float:
            hints.append(hint)
            then()
            return 0.0

    monkeypatch.setattr(enrol, "Backoff", NoWait)
    return hints


async def test_a_relay_that_is_down_is_tried_again(
    relay: FakeRelay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay.answers["/v1/enrol"] = (503, {"error": {"message": "draining"}})
    hints, one = waits(monkeypatch, relay.answers.clear), keeper(relay, tmp_path)
    assert (await one.start()).cluster == "one"
    assert hints == [None]
    assert one.failures == 1


async def test_a_store_that_is_away_is_waited_for(
    relay: FakeRelay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that starts while its API server does is not to end, and then wait for the kubelet's backoff."""
    first = await keeper(relay, tmp_path).start()
    one = keeper(relay, tmp_path, join_token_file=None)
    load = one._store.load

    async def away() -> None:
        raise Unreachable("the Secret arcbridge/agent cannot be reached: the API server does not answer")

    monkeypatch.setattr(one._store, "load", away)
    hints = waits(monkeypatch, lambda: monkeypatch.setattr(one._store, "load", load))
    assert await one.start() == first
    assert (hints, one.failures, one.last_failure) == ([None], 1, "")


# -- a list of relays, each with a registry of its own ----------------------------------------------------------


async def test_a_token_that_one_relay_does_not_know_is_shown_to_the_next(
    relay: FakeRelay, second: FakeRelay, tmp_path: Path
) -> None:
    assert (await keeper(second, tmp_path, then=(relay,)).start()).cluster == "one"
    assert [path for path, _ in second.calls] == ["/v1/enrol"]
    assert [path for path, _ in relay.calls] == ["/v1/enrol"]


async def test_when_all_refuse_each_ones_answer_is_told(relay: FakeRelay, second: FakeRelay, tmp_path: Path) -> None:
    second.answers["/v1/enrol"] = (403, {"error": {"message": "the join token has expired"}})
    with pytest.raises(EnrolmentRefused) as caught:
        await keeper(relay, tmp_path, token="other.secret", then=(second,)).start()
    assert f"https://{relay.address}: the join token is not good" in caught.value.message
    assert f"https://{second.address}: the join token has expired" in caught.value.message


async def test_a_refusal_is_not_the_last_word_while_another_relay_is_down(
    relay: FakeRelay, second: FakeRelay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = waits(monkeypatch, relay.start)
    await relay.stop()
    assert (await keeper(relay, tmp_path, then=(second,)).start()).cluster == "one"
    assert waited == [enrol.REFUSED_AMONG]


async def test_renewal_at_any_relay(relay: FakeRelay, second: FakeRelay, tmp_path: Path) -> None:
    clock = Clock()
    one = keeper(relay, tmp_path, clock=clock, then=(second,))
    before = await one.start()
    clock.ahead = 3600 * 0.7
    relay.answers["/v1/renew"] = (403, {"error": {"message": "there is no such cluster"}})
    await one._check_store()
    assert second.calls[-1][0] == "/v1/renew"
    assert one.current.certificate_pem != before.certificate_pem


def rotation_of(authority: Authority, *steps: str) -> Rotation:
    state = Rotation(authority.certificate_pem, authority.key_pem)
    for step in steps:
        state = state.take(step, time.time())
    return state


class TestRotation:
    """The relay's CA is rotated, or replaced (docs/threats.md#E14)."""

    async def test_an_agent_follows_and_renews_and_keeps_what_it_knows(self, relay: FakeRelay, tmp_path: Path) -> None:
        one, told = keeper(relay, tmp_path), []
        one.changed = lambda: told.append(one.known_relay_ca)
        await one.start()
        first = relay.pin
        state = rotation_of(relay.authority, "next")
        await one.follow_relay(state.list.text)
        await one.follow_relay(state.list.text)
        assert told == [state.list.pins[1]]
        assert one.certificate_ca == first
        state = state.take("activate", time.time())
        relay.authority.become(state.authority())
        running = asyncio.ensure_future(one.run())
        await one.follow_relay(state.list.text)
        await until(lambda: one.certificate_ca == state.list.pins[1])
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await one.follow_relay(state.take("retire", time.time()).list.text)
        # With the settings of the first day, and with those of today.
        for pin in (first, state.list.pins[1]):
            again = keeper(relay, tmp_path, relay_ca_pin=pin)
            await again.start()
            assert again.known_relay_ca == state.list.pins[1]
            assert again.trust.ca_pem == state.list.cas[1]
        assert [call[0] for call in relay.calls] == ["/v1/enrol", "/v1/renew"]

    async def test_a_hostile_relay_announces_nothing(self, relay: FakeRelay, tmp_path: Path) -> None:
        one = keeper(relay, tmp_path)
        await one.start()
        right, hostile = rotation_of(relay.authority, "next"), rotation_of(Authority.create("x"), "next")
        await one.follow_relay(right.list.text)
        stored = await DirectoryStore(tmp_path / "state").load()
        unsigned = right.list.text.replace(right.list.cas[1], hostile.list.cas[1])
        second = rotation_of(relay.authority, "next").list.text
        for text in (unsigned, hostile.list.text, second, right.list.text + " " * 65_536, ""):
            with pytest.raises((ConfigError, PinMismatch)):
                await one.follow_relay(text)
        await one.follow_relay(rotation_of(relay.authority).list.text)  # an older one says nothing
        assert one.known_relay_ca == right.list.pins[1]
        assert await DirectoryStore(tmp_path / "state").load() == stored

    async def test_a_ca_that_was_replaced_needs_its_pin_and_a_join_token(
        self, relay: FakeRelay, tmp_path: Path
    ) -> None:
        before = await keeper(relay, tmp_path).start()
        async with FakeRelay.serving() as replaced:
            replaced.tokens["new.secret"] = "one"
            with pytest.raises(ConfigError, match="needs a join token"):
                await keeper(replaced, tmp_path, join_token_file=None).start()
            after = await keeper(replaced, tmp_path, token="new.secret").start()
            assert after.cluster_ca_certificate_pem == before.cluster_ca_certificate_pem
            assert after.key_pem == before.key_pem
            assert after.certificate_pem != before.certificate_pem
            assert replaced.calls[-1][1]["cluster_ca"] == before.cluster_ca_certificate_pem

    async def test_an_agent_that_has_not_been_told_yet_needs_no_join_token(
        self, relay: FakeRelay, tmp_path: Path
    ) -> None:
        """It enrolled, or renewed, behind `activate` with the pin of the first day, and stops before the relay has
        announced anything; so does an agent of an earlier version that is upgraded."""
        first, state = relay.pin, rotation_of(relay.authority, "next", "activate")
        relay.rotate(state)
        await keeper(relay, tmp_path, relay_ca_pin=first).start()
        store = DirectoryStore(tmp_path / "state")
        for known in (None, b""):
            snapshot = await store.load()
            if known is not None and snapshot is not None:
                await store.save({entries.RELAY_CAS: known}, expect_version=snapshot.version)
            again = keeper(relay, tmp_path, relay_ca_pin=first, join_token_file=None)
            await again.start()
            await again.follow_relay(state.list.text)
            assert (again.known_relay_ca, again.certificate_ca) == (state.list.pins[1], state.list.pins[1])
        assert [call[0] for call in relay.calls] == ["/v1/enrol"]

    async def test_an_agent_that_was_away_takes_the_pin_of_today(self, relay: FakeRelay, tmp_path: Path) -> None:
        first = relay.pin
        await keeper(relay, tmp_path).start()
        state = rotation_of(relay.authority, "next", "activate")
        relay.rotate(state)
        one = keeper(relay, tmp_path, relay_ca_pin=state.list.pins[1], join_token_file=None)
        await one.start()
        assert one.certificate_ca == first
        assert one.trust.ca_pem == state.list.cas[1], "the settings name no former one"
        assert [call[0] for call in relay.calls] == ["/v1/enrol"]

    async def test_a_ca_that_has_ended_can_still_be_named_by_its_pin(self, tmp_path: Path) -> None:
        began = time.time() - 86400.0 * 30
        first = Authority.create("relay", life=86400.0 * 20, clock=lambda: began)
        state = Rotation(first.certificate_pem, first.key_pem).take("next", began).take("activate", began)
        async with FakeRelay.serving(authority=state.authority()) as relay:
            relay.tokens["id.secret"] = "one"
            one = keeper(relay, tmp_path, relay_ca_pin=first.pin)
            await one.start()
            assert one.certificate_ca == state.list.pins[1]

    async def test_a_replaced_ca_is_trusted_no_more_whatever_its_key_has_signed(
        self, relay: FakeRelay, tmp_path: Path
    ) -> None:
        """A thief of the former key certifies the new one, which it has not, so that agents keep the former."""
        await keeper(relay, tmp_path).start()
        stolen = relay.authority
        async with FakeRelay.serving() as replaced:
            right = replaced.authority
            subject, key = stolen._certificate.subject, right._key.public_key()
            identifier = x509.SubjectKeyIdentifier.from_public_key(stolen._key.public_key())
            life = stolen._certificate.not_valid_before_utc, stolen._certificate.not_valid_after_utc
            builder = _builder(subject, subject, key, life, identifier, is_ca=True)
            link = builder.sign(stolen._key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()
            right.succession = stolen.succession.extended(link)
            one = keeper(replaced, tmp_path, relay_ca_pin=right.pin, join_token_file=None)
            await one.start()
            assert "".join((one.trust.ca_pem or "").split()) == "".join(link.split()), "the right key alone"

    @pytest.mark.parametrize("cas", [1, 2], ids=["one CA", "a file of two"])
    async def test_beside_a_relay_certificate_of_another_ca(self, tmp_path: Path, cas: int) -> None:
        """The file says how the relay is verified, and the announcement by whom certificates are."""
        company = [Authority.create("company") for _ in range(cas)]
        (tmp_path / "ca.pem").write_text("".join(one.certificate_pem for one in company))
        async with FakeRelay.serving(vouching=company[0]) as relay:
            relay.tokens["id.secret"] = "one"
            first, state = relay.pin, rotation_of(relay.authority, "next")
            settings: dict[str, Any] = {"relay_ca_pin": "", "relay_ca_file": tmp_path / "ca.pem"}
            one = keeper(relay, tmp_path, **settings)
            await one.start()
            await one.follow_relay(state.list.text)
            assert (one.known_relay_ca, one.certificate_ca) == (state.list.pins[1], first)
            state = state.take("activate", time.time())
            relay.rotate(state)
            running = asyncio.ensure_future(one.run())
            await one.follow_relay(state.list.text)
            await until(lambda: one.certificate_ca == state.list.pins[1])
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await one.follow_relay(state.take("retire", time.time()).list.text)
            again = keeper(relay, tmp_path, **settings)
            await again.start()
            assert (again.known_relay_ca, again.certificate_ca) == (state.list.pins[1], state.list.pins[1])
            assert one.trust.ca_pem == again.trust.ca_pem == (tmp_path / "ca.pem").read_text()
            with pytest.raises((ConfigError, PinMismatch)):
                await again.follow_relay(rotation_of(Authority.create("x"), "next").list.text)
