"""What the API refuses to callers who ask too often, too slowly or too much, over real TLS connections."""

import asyncio
import json
import time
from collections.abc import Mapping

import pytest

from arcbridge.pki.authority import Issued
from arcbridge.pki.enrolment import JoinToken, make_csr, make_key
from arcbridge.relay.admission import Ticket
from arcbridge.relay.http import server as api_server
from arcbridge.relay.http.api import RENEWALS, RENEWALS_RATE, STRANGERS, STRANGERS_RATE
from arcbridge.relay.http.server import ANONYMOUS_REQUESTS, HttpApiServer
from tests.relay.api_station import Relay, error
from tests.support.eventually import until


class Kept:
    """A connection that is kept from one request to the next."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay

    async def __aenter__(self) -> "Kept":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.relay.port, ssl=self.relay.context())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except OSError:
            pass

    async def ask(self, path: str, token: str = "") -> tuple[int, Mapping[str, str]]:
        """Return status and headers of the answer. Raises `asyncio.IncompleteReadError` when there is none."""
        credential = f"Authorization: Bearer {token}\r\n" if token else ""
        self.writer.write(f"GET {path} HTTP/1.1\r\nHost: relay\r\n{credential}\r\n".encode())
        async with asyncio.timeout(20):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.rstrip().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            await self.reader.readexactly(int(headers["content-length"]))
        return int(first.split()[1]), headers


class TestLimits:
    """docs/threats.md#J15 and #L5: what a connection without a credential may do, and how often each caller may ask."""

    async def test_a_stranger_has_a_hundred_requests(self, relay: Relay) -> None:
        async with Kept(relay) as kept:
            answers = [await kept.ask("/v1/ca") for _ in range(ANONYMOUS_REQUESTS)]
            assert [status for status, _ in answers] == [200] * ANONYMOUS_REQUESTS
            assert [headers.get("connection") for _, headers in answers] == [None] * 99 + ["close"]
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await kept.ask("/v1/ca")

    async def test_a_token_that_is_good_counts_anew(self, relay: Relay) -> None:
        async with Kept(relay) as kept:
            for _ in range(ANONYMOUS_REQUESTS + 10):
                relay.clock.now += 2
                status, headers = await kept.ask("/v1/clusters", "token-of-ann")
                assert (status, headers.get("connection")) == (200, None)
            # A refusal that is not about the credential does not end the connection either.
            status, headers = await kept.ask("/v1/clusters/none", "token-of-ann")
            assert (status, headers.get("connection")) == (404, None)
            assert (await kept.ask("/v1/clusters", "token-of-bob"))[0] == 200

    @pytest.mark.parametrize(("path", "token"), [("/v1/clusters", ""), ("/v1/clusters", "wrong"), ("/nowhere", "")])
    async def test_a_refused_stranger_needs_another_connection(self, relay: Relay, path: str, token: str) -> None:
        """Each bad credential costs a connection, whose number the address bounds."""
        async with Kept(relay) as kept:
            status, headers = await kept.ask(path, token)
            assert status in (401, 404)
            assert headers["connection"] == "close"

    async def test_a_stranger_has_a_minute(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(api_server, "ANONYMOUS_LIFE", 0.1)

        async def ask_without_a_pause(kept: Kept) -> None:
            # No timer for idle connections would notice it.
            for _ in range(ANONYMOUS_REQUESTS):
                await kept.ask("/v1/ca")
                await asyncio.sleep(0.005)

        async with Kept(relay) as kept:
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await ask_without_a_pause(kept)
        await until(lambda: relay.server.outlived)

    async def test_the_minute_begins_again_with_a_good_token(self, relay: Relay) -> None:
        loop = asyncio.get_running_loop()
        made: list[asyncio.Protocol] = []

        class Watched(HttpApiServer):
            def __call__(self, ticket: Ticket) -> asyncio.Protocol:
                made.append(super().__call__(ticket))
                return made[-1]

        relay.server.__class__ = Watched
        async with Kept(relay) as kept:
            await kept.ask("/v1/ca")
            (connection,) = made
            ends = connection._life_timer.when()
            assert ends - loop.time() <= api_server.ANONYMOUS_LIFE + 0.01
            await kept.ask("/v1/clusters", "wrong")
            assert connection._life_timer is None or connection._life_timer.when() == ends
        made.clear()
        async with Kept(relay) as kept:
            await kept.ask("/v1/ca")
            (connection,) = made
            ends = connection._life_timer.when()
            await asyncio.sleep(0.01)
            await kept.ask("/v1/clusters", "token-of-ann")
            assert connection._life_timer.when() > ends

    async def test_a_body_that_trickles_does_not_outlive_it(
        self, relay: Relay, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(api_server, "ANONYMOUS_LIFE", 0.1)
        monkeypatch.setattr(api_server, "ANSWER_DEADLINE", 0.1)
        async with Kept(relay) as kept:
            kept.writer.write(b"POST /v1/enrol HTTP/1.1\r\nHost: relay\r\nContent-Length: 1000\r\n\r\n")

            async def trickle() -> None:
                while True:
                    kept.writer.write(b" ")
                    await asyncio.sleep(0.01)

            trickling = asyncio.ensure_future(trickle())
            try:
                assert await asyncio.wait_for(kept.reader.read(), 5) == b""
            except ConnectionError:
                pass
            trickling.cancel()
        assert relay.server.outlived == 1

    async def test_requests_without_a_credential_from_one_address(self, relay: Relay) -> None:
        for _ in range(STRANGERS // ANONYMOUS_REQUESTS):
            async with Kept(relay) as kept:
                for _ in range(ANONYMOUS_REQUESTS):
                    assert (await kept.ask("/v1/ca"))[0] == 200
        async with Kept(relay) as kept:
            status, headers = await kept.ask("/v1/ca")
            assert (status, headers["retry-after"], headers["connection"]) == (429, "1", "close")
        assert relay.limited["address"] == 1
        relay.clock.now += 2 / STRANGERS_RATE
        assert (await relay.call("GET", "/v1/ca"))[0] == 200

    async def test_requests_of_one_user(self, relay: Relay, everything_logged: list[str]) -> None:
        ann = {"Authorization": "Bearer token-of-ann"}
        async with Kept(relay) as kept:
            for _ in range(30):
                assert (await kept.ask("/v1/clusters", "token-of-ann"))[0] == 200
            for _ in range(3):
                status, headers = await kept.ask("/v1/clusters", "token-of-ann")
                assert (status, headers["retry-after"]) == (429, "2")
        _, answer, _ = await relay.call("GET", "/v1/clusters", headers=ann)
        assert error(answer) == ("rate_limited", "you ask this relay too often: wait 2 s and try again")
        assert (await relay.call("GET", "/v1/clusters", headers={"Authorization": "Bearer token-of-bob"}))[0] == 200
        assert relay.limited["user"] == 4
        assert len([line for line in everything_logged if "api requests refused" in line]) == 1
        relay.clock.now += 2
        assert (await relay.call("GET", "/v1/clusters", headers=ann))[0] == 200

    async def test_renewals_of_one_cluster(self, relay: Relay) -> None:
        agent, other = await relay.enrolled(), await relay.enrolled("test")
        for _ in range(RENEWALS):
            body = {"csr": make_csr(agent.key_pem)}
            status, answer, _ = await relay.call("POST", "/v1/renew", body, certificate=agent)
            assert status == 200
            agent = Issued(answer["certificate"], agent.key_pem)
        body = {"csr": make_csr(agent.key_pem)}
        status, answer, headers = await relay.call("POST", "/v1/renew", body, certificate=agent)
        assert (status, error(answer)[0]) == (429, "rate_limited")
        assert int(headers["Retry-After"]) >= 1
        body = {"csr": make_csr(other.key_pem)}
        assert (await relay.call("POST", "/v1/renew", body, certificate=other))[0] == 200
        # What was refused is no second renewal: the same one is granted later.
        relay.clock.now += 1 / RENEWALS_RATE
        body = {"csr": make_csr(agent.key_pem)}
        assert (await relay.call("POST", "/v1/renew", body, certificate=agent))[0] == 200
        assert not relay.counters.certificates_renewed_twice

    async def test_what_waits_for_its_peer_may_have_to_make_room(
        self, relay: Relay, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The ticket says so, before a request, within its body, and after the answer; not while the relay works."""
        seen: list[float] = []
        redeem = relay.registry.redeem_join_token

        async def looked_at(*arguments: object) -> object:
            seen.append(relay.tickets[-1].waits_since)
            return await redeem(*arguments)

        monkeypatch.setattr(relay.registry, "redeem_join_token", looked_at)
        body = json.dumps(relay.enrolment(await relay.token(), make_key())).encode()
        async with Kept(relay) as kept:
            await until(lambda: relay.tickets)
            (ticket,) = relay.tickets
            before = ticket.waits_since
            kept.writer.write(b"POST /v1/enrol HTTP/1.1\r\nHost: relay\r\nContent-Length: %d\r\n\r\n" % len(body))
            await until(lambda: ticket.waits_since != before)
            within = ticket.waits_since
            kept.writer.write(body)
            assert (await kept.reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
            await until(lambda: ticket.waits_since != within)
            assert seen == [float("inf")]
            assert before < within < ticket.waits_since < float("inf")

    async def test_behind_a_balancer_the_origin_counts(self, relay: Relay, everything_logged: list[str]) -> None:
        """The listener knows where a connection is from; the socket's peer is the balancer."""
        relay.origin = "192.0.2.7"
        body = relay.enrolment(JoinToken.create().text, make_key())
        assert (await relay.call("POST", "/v1/enrol", body))[0] == 403
        assert any("192.0.2.7" in line for line in everything_logged)


async def test_a_request_is_charged_to_its_address_and_then_to_its_user(relay: Relay) -> None:
    """docs/threats.md#L46."""
    address, ann = relay.admission.loop_times.of("127.0.0.1", 0.0), relay.payers.of("ann", 0.0)
    async with Kept(relay) as kept:
        assert (await kept.ask("/v1/ca"))[0] == 200
        spent = address.spent
        assert spent > 0.0
        assert ann.spent == 0.0
        assert (await kept.ask("/v1/clusters", "token-of-ann"))[0] == 200
        assert address.spent > spent
        assert ann.spent == ann.inner > 0.0


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /v1/ca HTTP/1.1\r\nExpect: a-gift", 417),
        ("GET /nowhere HTTP/1.1\r\nExpect: a-gift", 417),
        ("GET /%0A HTTP/1.1\r\nExpect: a-gift", 417),
        ("OPTIONS * HTTP/1.1\r\nExpect: a-gift", 417),
        ("GET /nowhere HTTP/1.1\r\nExpect: 100-continue", 404),
        ("GET /nowhere HTTP/1.1", 404),
        ("GET /%0A HTTP/1.1", 404),
        ("OPTIONS * HTTP/1.1", 404),
        ("POST /v1/ca HTTP/1.1", 405),
        ("GET /v1/ca HTTP/1.1\r\nOrigin: null", 403),
    ],
)
async def test_l50_each_answer_counts_whoever_makes_it(relay: Relay, request_line: str, status: int) -> None:
    request = f"{request_line}\r\nHost: x\r\n\r\n".encode()
    answers = (await relay.raw(request * 3)).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    assert answers.startswith(f"HTTP/1.1 {status} ".encode())
    assert answers.count(b"HTTP/1.1 ") == 1, "a stranger who was refused needs another connection"
    relay.admission.loop_times.of("127.0.0.1", 0.0).refused_until = time.monotonic() + 60.0
    answers = await relay.raw(request * 3)
    assert answers.startswith(b"HTTP/1.1 429 ")
    assert answers.count(b"HTTP/1.1 ") == 1, "nothing is sent to an address that is refused, no 100 either"


async def test_l50_what_is_no_http_ends_its_connection(relay: Relay) -> None:
    for request in (b"GET /v1/ca HTTP/1.1\r\nHost : x\r\n\r\n", b"GET /" + b"a" * 80_000 + b" HTTP/1.1\r\n\r\n"):
        answers = await relay.raw(request * 3)
        assert answers.startswith(b"HTTP/1.0 400 ")
        assert answers.count(b"HTTP/1.0 ") == 1


async def test_requests_of_who_takes_too_much_of_the_loop_wait_and_are_refused_at_last(relay: Relay) -> None:
    """docs/threats.md#L46."""
    address, ann = relay.admission.loop_times.of("127.0.0.1", 0.0), relay.payers.of("ann", 0.0)
    async with Kept(relay) as kept:
        for payer in (address, ann):
            payer.held_until = time.monotonic() + 0.2
            assert (await kept.ask("/v1/clusters", "token-of-ann"))[0] == 200
            assert time.monotonic() > payer.held_until
        ann.refused_until = time.monotonic() + 7.0
        status, headers = await kept.ask("/v1/clusters", "token-of-ann")
        assert (status, headers["retry-after"] in ("6", "7")) == (429, True)
        assert (await kept.ask("/v1/clusters", "token-of-bob"))[0] == 200, "it is the user's alone"
        address.refused_until = time.monotonic() + 7.0
        assert (await kept.ask("/v1/clusters", "token-of-bob"))[0] == 429
