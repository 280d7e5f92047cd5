"""A client that lies: in its join, its login, its renewals and resumptions, with frames of other roles, with floods and
resets (docs/threats.md#U1, docs/threats.md#U2, docs/threats.md#U3, docs/threats.md#U4, docs/threats.md#U5).

Beside it an honest user works in the same cluster and notices nothing.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arcbridge.agent import sessions as agent_sessions
from arcbridge.client import service as client_service
from arcbridge.errors import JoinRefused, Unreachable
from arcbridge.identity.proof import ProofKey, spki_of
from arcbridge.mux.session import MuxSession
from arcbridge.net.join import JoinCode
from arcbridge.net.sockets import reset
from arcbridge.wire.frames import PING_BODY, U32, U64, FrameType, GoawayCode, frame
from arcbridge.wire.records import AuthOk, Dial, Hello, Move, Open, Revoke, Status
from tests.hostile.by_hand import ByHand, auth, hello, session_by_hand
from tests.hostile.organisation import ALICE, BOB, MALLORY, RELAY_AUDIENCE, Client, Organisation, Person, lying

BOUND = replace(MALLORY, key=ProofKey.generate())


@contextlib.asynccontextmanager
async def beside_bob(tmp_path: Path, *clusters: str) -> AsyncIterator[Organisation]:
    """An organisation in which an honest user works, before and after."""
    async with Organisation.running(tmp_path, *clusters) as org, org.client(BOB) as bob:
        await works(bob)
        yield org
        await works(bob)
        assert org.said("session lost") == []
        assert org.said("session ended", user="bob") == []


async def works(client: Client) -> None:
    """The client's user gets an answer of their own."""
    assert (await client.get()).status == 200


@contextlib.asynccontextmanager
async def joined(org: Organisation, person: Person = MALLORY, **fields: Any) -> AsyncIterator[ByHand]:
    """A user's end of a session, with nothing said yet. The access token is a bearer token."""
    access = replace(person, key=None).token(RELAY_AUDIENCE)
    async with session_by_hand(await org.joined(access, **fields)) as session:
        yield session


async def logged_in(session: ByHand, person: Person, **changes: Any) -> AuthOk:
    """Log in in order."""
    session.say(hello(join_id=session.reply.join_id), auth(person.token("cluster", **changes)))
    return AuthOk.decode(await session.next(FrameType.AUTH_OK))


def get(stream_id: int, person: str, number: int = 1) -> bytes:
    """OPEN and a GET of a tagged path."""
    head = f"GET /tagged/prod/{person}/{number} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    return frame(FrameType.OPEN, stream_id, Open("kubernetes").encode()) + frame(FrameType.DATA, stream_id, head)


# -- the join ------------------------------------------------------------------------------------------------------


NO_CLUSTER = "there is no such cluster, or you may not reach it"
JOINS: dict[str, tuple[dict[str, Any], JoinCode, str]] = {
    "agent": ({"role": "agent"}, JoinCode.UNAUTHENTICATED, "an agent's join needs its certificate"),
    "relay": ({"role": "relay"}, JoinCode.BAD_REQUEST, "a join is for a client or an agent"),
    "no role": ({"role": ""}, JoinCode.BAD_REQUEST, "a join is for a client or an agent"),
    "star": ({"cluster": "*"}, JoinCode.FORBIDDEN, NO_CLUSTER),
    "dots": ({"cluster": "../prod"}, JoinCode.FORBIDDEN, NO_CLUSTER),
    "long": ({"cluster": "p" * 60_000}, JoinCode.FORBIDDEN, NO_CLUSTER),
    "instance": ({"instance": "agent-of-another"}, JoinCode.NO_INSTANCE, "is not connected"),
    "no token": ({"access_token": ""}, JoinCode.UNAUTHENTICATED, "the relay does not accept the access token"),
    "no JWT": ({"access_token": "a.b.c"}, JoinCode.UNAUTHENTICATED, "the relay does not accept the access token"),
}


async def test_u1_joins_that_are_none(tmp_path: Path) -> None:
    async with beside_bob(tmp_path) as org:
        for which, (fields, code, words) in JOINS.items():
            with pytest.raises(JoinRefused) as caught:
                await org.joined(**{"access_token": MALLORY.token(RELAY_AUDIENCE), **fields})
            assert caught.value.code == code, which
            assert words in caught.value.message, which
            assert len(caught.value.message) < 400


async def test_u1_the_agent_of_another_cluster_by_its_instance(tmp_path: Path) -> None:
    """A user who may reach `prod` alone asks for it, and names the agent of `test`."""
    async with Organisation.running(tmp_path, "prod", "test") as org:
        async with session_by_hand(await org.joined(MALLORY.token(RELAY_AUDIENCE), "test"), "test") as session:
            session.say(hello())
            instance = Hello.decode(await session.next(FrameType.HELLO)).agent
        with pytest.raises(JoinRefused) as caught:
            await org.joined(MALLORY.token(RELAY_AUDIENCE), "prod", instance=instance)
        assert caught.value.code == JoinCode.NO_INSTANCE


# -- renewals ------------------------------------------------------------------------------------------------------

NOW = int(time.time())
RENEWALS: dict[str, tuple[dict[str, Any], GoawayCode, str]] = {
    "of another user": ({"person": BOB}, GoawayCode.FORBIDDEN, "renewed with the token of another subject"),
    "of another audience": (
        {"aud": RELAY_AUDIENCE},
        GoawayCode.UNAUTHENTICATED,
        "the token is not meant for this place (audience)",
    ),
    "of another issuer": ({"iss": "https://evil.example"}, GoawayCode.UNAUTHENTICATED, "the token"),
    "that has lapsed": ({"iat": NOW - 7200, "exp": NOW - 3600}, GoawayCode.UNAUTHENTICATED, "the token has expired"),
    "of the future": ({"nbf": NOW + 7200}, GoawayCode.UNAUTHENTICATED, "the token"),
    "that is none": ({"text": "a.b.c"}, GoawayCode.UNAUTHENTICATED, "the token"),
    "of another kind": ({"kind": "cookie"}, GoawayCode.UNAUTHENTICATED, "this kind of token is not known here"),
    "that is empty": ({"text": ""}, GoawayCode.UNAUTHENTICATED, "the token"),
}


async def test_u2_a_renewal_with_a_token(tmp_path: Path) -> None:
    async with beside_bob(tmp_path) as org:
        for which, (fields, code, reason) in RENEWALS.items():
            changes = {name: value for name, value in fields.items() if name not in ("person", "text", "kind")}
            async with joined(org) as session:
                await logged_in(session, MALLORY)
                token = fields.get("text", fields.get("person", MALLORY).token("cluster", **changes))
                session.say(auth(token, kind=fields.get("kind", "oidc")), get(1, "mallory"))
                assert (await session.goaway()).code == code, which
                assert org.said("session refused")[-1]["reason"].startswith(reason), which


async def test_u2_an_older_token_gives_back_no_group_and_no_time(tmp_path: Path) -> None:
    """A user who lost a group sends the token from before, which also lasts longer: the later one counts."""
    async with beside_bob(tmp_path) as org, joined(org) as session:
        now = int(time.time())
        ok = await logged_in(session, MALLORY, groups=["platform"], iat=now, exp=now + 300)
        older = MALLORY.token("cluster", groups=["platform", "admins"], iat=now - 60, exp=now + 3000)
        for _ in range(3):  # an old renewal, played again and again
            session.say(auth(older))
            again = AuthOk.decode(await session.next(FrameType.AUTH_OK))
            assert again.expires_in <= ok.expires_in
            assert again.session_id == ok.session_id
        session.say(get(1, "mallory"))
        await session.next(FrameType.DATA)
        (request,) = [one for one in org.requests if "mallory" in one.target]
        assert b"admins" not in b",".join(request.header("impersonate-group"))


async def test_u2_a_renewal_whose_proof_is_old_or_missing(tmp_path: Path) -> None:
    for when, reason in ((-400, "is not of now"), (None, "came without a proof")):
        (tmp_path / str(when)).mkdir()
        async with beside_bob(tmp_path / str(when)) as org, joined(org) as session:
            await prove(session, org, BOUND)
            await session.next(FrameType.AUTH_OK)
            token = BOUND.token("cluster", iat=int(time.time()) + 1)
            session.say(
                auth(token, proof="" if when is None else proof(session, org, BOUND, token, time.time() + when))
            )
            assert (await session.goaway()).code == GoawayCode.UNAUTHENTICATED
            assert reason in org.said("session refused")[-1]["reason"]


def proof(session: ByHand, org: Organisation, person: Person, token: str, now: float) -> str:
    """The person's proof towards the agent of `session`."""
    assert person.key is not None
    return person.key.sign_proof(token, spki_of(session.certificate), org.clusters["prod"].pin, now)


async def prove(session: ByHand, org: Organisation, person: Person) -> bytes:
    """Log in with a bound token; the AUTH that was sent."""
    token = person.token("cluster")
    said = auth(token, proof=proof(session, org, person, token, time.time()))
    session.say(hello(join_id=session.reply.join_id), said)
    return said


async def test_u2_an_auth_that_is_played_again(tmp_path: Path) -> None:
    """Token and proof together, at another agent of the same cluster: its key is another. Two before the first answer
    end the session."""
    async with beside_bob(tmp_path) as org:
        async with joined(org) as session:
            said = await prove(session, org, BOUND)
            await session.next(FrameType.AUTH_OK)
            first = session.certificate
        await org.start_agent(org.clusters["prod"])
        for _ in range(20):
            async with joined(org) as session:
                if session.certificate == first:
                    continue
                session.say(hello(join_id=session.reply.join_id), said)
                assert (await session.goaway()).code == GoawayCode.UNAUTHENTICATED
                assert "was made for another end than the agent" in org.said("session refused")[-1]["reason"]
                break
        else:
            pytest.fail("the second agent was never asked")
        async with joined(org) as session:
            twice = auth(MALLORY.token("cluster"))
            session.say(hello(join_id=session.reply.join_id), twice, twice)
            goaway = await session.goaway()
            assert (goaway.code, goaway.message) == (GoawayCode.PROTOCOL, "a second AUTH before the first was answered")


# -- resumptions ---------------------------------------------------------------------------------------------------


async def test_u3_the_session_of_another_user(tmp_path: Path) -> None:
    """With the right id and secret and an own token: one answer as for a stranger, an audit record, and the owner is
    undisturbed."""
    async with beside_bob(tmp_path) as org, joined(org, ALICE) as alice:
        ok = await logged_in(alice, ALICE)
        for changes, reason in (
            ({}, "subject"),
            ({"resume_secret": b"x" * 16}, "secret"),
            ({"session_id": b"x" * 16}, "unknown"),
        ):
            async with joined(org) as session:
                claim = {"session_id": ok.session_id, "resume_secret": ok.resume_secret, "epoch": 1, **changes}
                session.say(hello(join_id=session.reply.join_id, **claim), auth(MALLORY.token("cluster")))
                goaway = await session.goaway()
                assert goaway.code == GoawayCode.GONE
                assert goaway.message.startswith("there is no such session here")
                assert org.said("resumption refused")[-1]["reason"] == reason
        alice.say(get(1, "alice"))
        assert b"/tagged/prod/alice/1|alice" in await alice.next(FrameType.DATA)
        expected = {("mallory", "wrong subject"), ("mallory", "wrong secret")}
        await org.until(lambda: resumptions(org) == expected, "the audit has both")


def resumptions(org: Organisation) -> set[tuple[str, str]]:
    """User and reason of the refused resumptions in the audit; a thread writes the records."""
    return {(one["user"], one["reason"]) for one in org.clusters["prod"].audit() if one["verb"] == "resume"}


async def test_u3_an_own_session_with_an_epoch_or_counts_that_were(tmp_path: Path) -> None:
    """A resumption that is played again changes nothing; one whose counts cannot be true ends the session."""
    async with beside_bob(tmp_path) as org, joined(org) as first:
        ok = await logged_in(first, MALLORY)
        claim = {"session_id": ok.session_id, "resume_secret": ok.resume_secret}
        async with joined(org) as session:
            session.say(hello(join_id=session.reply.join_id, epoch=0, **claim), auth(MALLORY.token("cluster")))
            assert (await session.goaway()).code == GoawayCode.REPLACED
        async with joined(org) as session:
            session.say(
                hello(join_id=session.reply.join_id, epoch=1, received=2**40, **claim), auth(MALLORY.token("cluster"))
            )
            goaway = await session.goaway()
            assert (goaway.code, goaway.message) == (
                GoawayCode.PROTOCOL,
                "the session cannot be resumed: the two ends disagree about what was sent",
            )
        assert org.said("resumption refused")[-1]["reason"] == "counts"


# -- frames --------------------------------------------------------------------------------------------------------

FRAMES = {
    "AUTH_OK from the wrong side": frame(FrameType.AUTH_OK, 0, AuthOk(subject="root").encode()),
    "MOVE from the wrong side": frame(FrameType.MOVE, 0, Move("0" * 16).encode()),
    "DIAL from the wrong side": frame(FrameType.DIAL, 0, Dial("t").encode()),
    "STATUS from the wrong side": frame(FrameType.STATUS, 0, Status("t").encode()),
    "REVOKE from the wrong side": frame(FrameType.REVOKE, 0, Revoke("bob", 2**40).encode()),
    "a second HELLO": hello(),
    "OPEN with a stream id of the other side's": frame(FrameType.OPEN, 2, Open("kubernetes").encode()),
    "OPEN with a stream id that does not rise": get(3, "mallory") + get(1, "mallory"),
    "DATA for a stream that was never opened": frame(FrameType.DATA, 7, b"GET / HTTP/1.1\r\n\r\n"),
    "the other end confirms bytes that were never sent": frame(FrameType.ACK, 0, U64.pack(2**50)),
    "an impossible grant for the session": frame(FrameType.WINDOW, 0, U32.pack(2**32 - 1)) * 2,
    "a frame of unknown type 99": b"\0\0\0" + bytes([99]) + bytes(4),
    "a frame of type 2 with a body of 70000 bytes": (70_000).to_bytes(3, "big") + b"\x02" + bytes(4),
}


async def test_u4_frames_that_no_client_sends(tmp_path: Path) -> None:
    async with beside_bob(tmp_path) as org:
        for said, body in FRAMES.items():
            async with joined(org) as session:
                await logged_in(session, MALLORY)
                session.say(body)
                goaway = await session.goaway()
            code = GoawayCode.FLOW_CONTROL if "grant" in said else GoawayCode.PROTOCOL
            assert (goaway.code, goaway.message) == (code, said)
            await org.until(
                lambda reason=f"the other end broke the protocol: {said}": (
                    reason in {one["reason"] for one in org.said("session ended", user="mallory")}
                ),
                "the agent says so",
            )


async def test_u4_the_real_client_names_what_it_broke(tmp_path: Path) -> None:
    """As the user of such a client sees it: the agent's log has the details."""

    class Breaks(MuxSession):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            self._sender.prelude.append(FRAMES["AUTH_OK from the wrong side"])

    lie = {"arcbridge.client.session.connector.MuxSession": Breaks}
    async with Organisation.running(tmp_path) as org:
        with lying(client_service, lie), pytest.raises(Unreachable) as caught:
            async with org.client(MALLORY):
                pytest.fail("it began")
        assert caught.value.message == (
            'the agent of cluster "prod" ended the session because this client broke the protocol; its log says how'
        )


async def test_u4_what_comes_before_the_login(tmp_path: Path) -> None:
    """Streams that are opened before AUTH reach nothing, with or without one behind them."""
    async with beside_bob(tmp_path) as org:
        for behind in (b"", auth("a.b.c"), auth(MALLORY.token("cluster"))):
            async with joined(org) as session:
                session.say(hello(join_id=session.reply.join_id), get(1, "mallory"), behind)
                goaway = await session.goaway()
                assert (goaway.code, goaway.message) == (
                    GoawayCode.PROTOCOL,
                    "a frame of type 4 before the handshake is complete",
                )
        assert [one for one in org.requests if "mallory" in one.target] == []


# -- floods, stalls, resets ----------------------------------------------------------------------------------------

FLOODS = {
    "pings": (frame(FrameType.PING, 0, PING_BODY.pack(1, 0)) * 60_000, "control frames"),
    "grants": (frame(FrameType.WINDOW, 0, U32.pack(1)) * 60_000, "control frames"),
    "renewals": (auth("a.b.c") * 30_000, ""),
    "streams that are reset": (
        b"".join(
            frame(FrameType.OPEN, number, Open("kubernetes").encode()) + frame(FrameType.RESET, number, U32.pack(3))
            for number in range(1, 4001, 2)
        ),
        "streams end before their answers faster than is allowed",
    ),
    "unknown frames": ((b"\0\0\0" + bytes([200]) + bytes(4)) * 60_000, ""),
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_u5_floods(tmp_path: Path, flood: str) -> None:
    said, words = FLOODS[flood]
    async with Organisation.running(tmp_path) as org, org.client(BOB) as bob, joined(org) as session:
        await works(bob)
        await logged_in(session, MALLORY)
        session.say(said)
        answers = [await bob.get() for _ in range(5)]
        assert [answer.status for answer in answers] == [200] * 5
        goaway = await session.goaway()
        if flood == "renewals":
            assert goaway.code in (GoawayCode.UNAUTHENTICATED, GoawayCode.LIMIT)
        else:
            assert goaway.code == GoawayCode.LIMIT
        assert words in goaway.message
        await org.until(lambda: org.said("session ended", user="mallory"), "the agent says so")
        await works(bob)


async def test_u5_connections_that_say_nothing_and_ends_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing stays behind at the agent, and each step has its end."""
    monkeypatch.setattr(agent_sessions, "HANDSHAKE_DEADLINE", 2.0)
    async with beside_bob(tmp_path) as org:
        silent, _ = await org.joined(MALLORY.token(RELAY_AUDIENCE))
        sock, _ = await org.joined(MALLORY.token(RELAY_AUDIENCE))
        reset(sock)
        for steps in range(4):
            async with joined(org) as session:
                said = [hello(join_id=session.reply.join_id), auth(MALLORY.token("cluster")), get(1, "mallory", steps)]
                session.say(*said[:steps])
                await session.writer.drain()
                if steps >= 2:
                    await session.next(FrameType.AUTH_OK)
                session.writer.transport.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
                )
        # That of the first step, too, was reset before it had said a word.
        await org.until(lambda: len(org.said("join failed")) == 3, "the silent one and the reset ones end")
        reasons = [str(one["reason"]) for one in org.said("join failed")]
        assert all(reason.startswith("the end-to-end TLS handshake failed") for reason in reasons)
        assert [("ConnectionResetError" in reason) for reason in reasons] == [True, True, False]
        silent.close()
