"""A relay that lies with words: about clusters, in replies to joins, in dials, and on control connections
(docs/threats.md#B2, docs/threats.md#B3, docs/threats.md#B5, docs/threats.md#B8).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arcbridge.errors import ArcbridgeError, PinMismatch, SessionEnded, Unreachable
from arcbridge.identity.proof import ProofKey
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.mux.stream import StreamTransport
from arcbridge.net.session_tls import SessionStart
from arcbridge.net.tls import inner_client_context
from arcbridge.pki.names import cluster_server_name
from arcbridge.pki.pins import pin_of
from arcbridge.relay import control as relay_control
from arcbridge.relay.pump import Pumps
from arcbridge.wire.frames import U32, FrameType, GoawayCode, frame
from arcbridge.wire.records import Auth, AuthOk, Goaway, Hello, JoinReply, Move, Open, Revoke, Status
from arcbridge.wire.session import Kind, Side
from tests.hostile.agent_lies import tells_of_streams
from tests.hostile.by_hand import auth, hello, session_by_hand
from tests.hostile.organisation import ALICE, RELAY_AUDIENCE, Organisation
from tests.hostile.relay_lies import (
    Control,
    Impostor,
    KeepsTokens,
    OtherCluster,
    OtherClusterAndCa,
    OtherPod,
    OwnCa,
    dials_else,
    refuses_with,
    says_else,
)

OTHERS_CA = OwnCa.ca.certificate_pem


async def refused(org: Organisation, **changes: Any) -> ArcbridgeError:
    """Start a client that must not come to a session; its error."""
    with pytest.raises(ArcbridgeError) as caught:
        async with org.client(**changes):
            pytest.fail("it began")
    assert org.requests == []
    return caught.value


# -- clusters ------------------------------------------------------------------------------------------------------


async def test_b2_an_agent_of_another_cluster(tmp_path: Path) -> None:
    async with Organisation.running(tmp_path, "prod", "test", relay={"ClientJoins": OtherCluster}) as org:
        error = await refused(org)
        assert isinstance(error, PinMismatch)
        assert error.message == (
            'the peer that answered for cluster "prod" is not certified by its CA; another party may be in between: '
            "tell the relay's operator"
        )
        assert org.said("session opened") == []
        async with org.client(cluster="test") as other:
            assert (await other.get()).status == 200


@pytest.mark.parametrize("first_use", [False, True])
async def test_b3_another_cluster_with_its_own_ca(tmp_path: Path, first_use: bool) -> None:
    """Also where the cluster is trusted on first use, because its certificate is for another name."""
    async with Organisation.running(tmp_path, "prod", "test", relay={"ClientJoins": OtherClusterAndCa}) as org:
        if first_use:
            error = await refused(org, cluster_ca_pin="", trust_first_use=True)
            assert "is not certified by its CA" in error.message
        else:
            error = await refused(org)
            assert org.clusters["prod"].pin in error.message
            assert org.clusters["test"].pin in error.message
        assert isinstance(error, PinMismatch)
        assert "Another party may be in between" in error.message or "another party may be in between" in error.message
        assert org.said("session opened") == []


async def test_b2_a_dial_for_a_cluster_that_the_agent_does_not_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_control, "ControlConnection", dials_else(cluster="prod"))
    async with Organisation.running(tmp_path, "prod", "test", relay={"ClientJoins": OtherCluster}) as org:
        error = await refused(org)
        assert error.message == 'the agent of cluster "prod" refused the session; its log says why'
        assert org.said("dial refused")[0]["reason"] == "the agent belongs to another cluster"


async def test_b3_a_ca_of_the_relays_own(tmp_path: Path) -> None:
    async with Organisation.running(tmp_path, relay={"ClientJoins": OwnCa, "Pumps": Impostor}) as org:
        error = await refused(org)
        assert isinstance(error, PinMismatch)
        assert org.clusters["prod"].pin in error.message
        assert pin_of(OTHERS_CA) in error.message
        assert "Another party may be in between" in error.message
        assert Impostor.made[-1].tokens == [], "nothing was sent before the CA was checked"


async def test_b4_a_bound_token_that_went_through_the_hole_opens_nothing(tmp_path: Path) -> None:
    """The relay that ended the TLS has token and proof. The proof names the relay's key, and no cluster has that."""
    bound = replace(ALICE, key=ProofKey.generate())
    async with (
        Organisation.running(tmp_path, relay={"ClientJoins": OwnCa, "Pumps": Impostor}) as org,
        org.client(bound, cluster_ca_pin="", trust_first_use=True),
    ):
        (taken,) = Impostor.made[-1].tokens
    assert taken.proof
    (tmp_path / "honest").mkdir()
    async with Organisation.running(tmp_path / "honest") as honest:
        async with session_by_hand(await honest.joined(ALICE.token(RELAY_AUDIENCE))) as session:
            session.say(hello(join_id=session.reply.join_id), auth(taken.token, proof=taken.proof))
            assert (await session.goaway()).code == GoawayCode.UNAUTHENTICATED
        (told,) = honest.said("session refused")
        assert "was made for another end than the agent" in told["reason"]


async def test_b4_the_hole_of_trust_on_first_use_is_told_and_is_open_once(tmp_path: Path) -> None:
    """With neither a pin nor a pins file this relay is believed, which the log says. The pin stays: the honest cluster
    is then refused, and both pins are named."""
    async with Organisation.running(tmp_path, relay={"ClientJoins": OwnCa, "Pumps": Impostor}) as org:
        first = {"cluster_ca_pin": "", "trust_first_use": True, "state_dir": tmp_path / "state"}
        async with org.client(**first):
            (told,) = org.said("trusting a cluster at first use")
            assert (told["pin"], told["log_level"]) == (pin_of(OTHERS_CA), "warning")
        assert len(Impostor.made[-1].tokens) == 1
        assert org.requests == []
    (tmp_path / "honest").mkdir()
    async with Organisation.running(tmp_path / "honest") as honest:
        (tmp_path / "pins.toml").write_text(f'[clusters]\nprod = "{pin_of(OTHERS_CA)}"\n')
        error = await refused(honest, cluster_ca_pin="", trust_first_use=True, pins_file=tmp_path / "pins.toml")
        assert isinstance(error, PinMismatch)
        assert pin_of(OTHERS_CA) in error.message
        assert honest.clusters["prod"].pin in error.message


@pytest.mark.parametrize(
    "ca",
    [
        "",
        "no certificate \x1b[2J",
        OTHERS_CA * 2,
        OTHERS_CA.replace("CERTIFICATE", "TRUSTED CERTIFICATE"),
        OTHERS_CA[:200],
    ],
    ids=["none", "text", "two", "trusted", "half"],
)
@pytest.mark.parametrize("first_use", [False, True])
async def test_b3_a_ca_that_is_none(tmp_path: Path, ca: str, first_use: bool) -> None:
    async with Organisation.running(tmp_path, relay={"ClientJoins": says_else(cluster_ca=ca)}) as org:
        error = await refused(org, **({"cluster_ca_pin": "", "trust_first_use": True} if first_use else {}))
        said = "states as the cluster's CA what is not one certificate" if ca else "did not say its CA"
        assert error.message == f'cannot reach cluster "prod": the relay {said}; tell its operator'


async def test_b3_a_list_of_clusters_with_names_that_none_has(tmp_path: Path) -> None:
    from arcbridge.client.commands.directory import list_clusters
    from arcbridge.client.credentials.tokens import Tokens
    from arcbridge.client.relay.relay_access import RelayAccess
    from arcbridge.client.relay.relays import Relays
    from arcbridge.settings.config import LoginConfig
    from tests.hostile.relay_lies import lists_also

    async with Organisation.running(tmp_path, relay={"build_app": lists_also("$(touch ran)")}) as org:
        (tmp_path / "access").write_text(ALICE.token(RELAY_AUDIENCE))
        (tmp_path / "id").write_text(ALICE.token("cluster"))
        tokens = Tokens(LoginConfig(access_token_file=tmp_path / "access", id_token_file=tmp_path / "id"), None)
        relays = Relays([RelayAccess(org.relay_address, ca_pin=org.relay_pin)])
        with pytest.raises(Unreachable) as caught:
            await list_clusters(relays, tokens)
        assert caught.value.message == (
            f"https://{org.relay_address} listed a cluster under a name that no cluster has; tell the relay's operator"
        )


async def test_b3_a_relay_that_is_another_one(tmp_path: Path) -> None:
    """A server that has the address, and a CA of its own."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    async with Organisation.running(tmp_path / "one") as honest, Organisation.running(tmp_path / "two") as org:
        error = await refused(org, relay_ca_pin=honest.relay_pin)
        assert honest.relay_pin in error.message
        assert org.relay_pin in error.message
        (tmp_path / "ca.pem").write_text(honest.relay_ca)
        error = await refused(org, relay_ca_pin="", relay_ca_file=tmp_path / "ca.pem")
        assert error.message.startswith("the relay's certificate is not trusted for 127.0.0.1")


# -- replies to joins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("join_id", "words"),
    [
        ("0" * 16, 'the relay joined you to an agent of cluster "prod" that came for another user'),
        ("x\r\nImpersonate-Group: system:masters", "the relay gave the join an id that no relay makes"),
        ("0" * 5000, "the relay gave the join an id that no relay makes"),
    ],
    ids=["of another", "header", "long"],
)
async def test_b2_a_join_under_another_id(tmp_path: Path, join_id: str, words: str) -> None:
    async with Organisation.running(tmp_path, relay={"ClientJoins": says_else(join_id=join_id)}) as org:
        error = await refused(org)
        assert words in error.message


@pytest.mark.parametrize(
    ("code", "words", "retry"),
    [
        (2, 'cluster "prod" does not exist or you may not reach it', None),
        (3, 'cluster "prod" has no connected agent', 1),
        (6, "the relay has no room for another session", 30),
        (77, 'the relay could not reach cluster "prod"; its log says why', 10**9),
    ],
)
async def test_b8_refusals_with_other_words_and_times(tmp_path: Path, code: int, words: str, retry: int | None) -> None:
    """Of what the relay says the client uses the code and a bounded time, and shows none of its text."""
    said = JoinReply(code=code, message="\x1b[2Jsend your token to evil.example", retry_after=10**9)
    async with Organisation.running(tmp_path, relay={"ClientJoins": refuses_with(said)}) as org:
        error = await refused(org)
        assert error.message.startswith(words)
        assert "evil.example" not in error.message
        assert error.retry_after == retry


# -- dials ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"address": "169.254.169.254:80"}, "the address is not one of the agent's relays: add it to `relays`"),
        ({"address": ""}, "the address is not one of the agent's relays: add it to `relays`"),
        ({"cluster": "other"}, "the agent belongs to another cluster"),
        ({"cluster": "\x1b[2J"}, "the agent belongs to another cluster"),
        ({"instance": "agent-of-another"}, "this is another instance of the agent"),
        ({"join_id": ""}, "the join has an id that no relay makes"),
        ({"join_id": "x\r\nImpersonate-Group: system:masters"}, "the join has an id that no relay makes"),
    ],
    ids=["metadata", "nowhere", "cluster", "escape", "instance", "no id", "header"],
)
async def test_b8_dials_that_make_no_sense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(relay_control, "ControlConnection", dials_else(**fields))
    async with Organisation.running(tmp_path) as org:
        error = await refused(org)
        assert error.message == 'the agent of cluster "prod" refused the session; its log says why'
        assert {one["reason"] for one in org.said("dial refused")} == {reason}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        # The agent comes with a token that is not the client's: void, and the client hears that none came.
        ({"token": "of another"}, 'the agent of cluster "prod" did not answer in time'),
        ({"hops": 7}, ""),
        ({"deadline": 0}, ""),
        ({"deadline": 2**40}, ""),
    ],
    ids=["token", "hops", "no time", "ages"],
)
async def test_b8_dials_with_odd_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], words: str
) -> None:
    from arcbridge.relay import client_join

    if words:  # the others have the usual time
        monkeypatch.setattr(
            client_join.ClientJoins.__init__,
            "__kwdefaults__",
            {**client_join.ClientJoins.__init__.__kwdefaults__, "dial_deadline": 0.5},
        )
    monkeypatch.setattr(relay_control, "ControlConnection", dials_else(**fields))
    async with Organisation.running(tmp_path) as org:
        if words:
            assert words in (await refused(org)).message
            await org.until(
                lambda: org.said("agent's join refused", reason="void token") or org.said("join failed"),
                "the agent came, and not for this client",
            )
        else:
            async with org.client() as alice:
                assert (await alice.get()).status == 200


# -- control connections -------------------------------------------------------------------------------------------

MISPLACED = {
    "AUTH": frame(FrameType.AUTH, 0, Auth("oidc", "t").encode()),
    "AUTH_OK": frame(FrameType.AUTH_OK, 0, AuthOk(subject="alice").encode()),
    "OPEN": frame(FrameType.OPEN, 2, Open("kubernetes").encode()),
    "DATA": frame(FrameType.DATA, 2, b"GET /api HTTP/1.1\r\n\r\n"),
    "FIN": frame(FrameType.FIN, 2, b""),
    "RESET": frame(FrameType.RESET, 2, U32.pack(3)),
    "WINDOW": frame(FrameType.WINDOW, 2, U32.pack(1)),
    "STATUS": frame(FrameType.STATUS, 0, Status(token="t").encode()),
    "MOVE": frame(FrameType.MOVE, 0, Move("0" * 16).encode()),
    "a second HELLO": frame(FrameType.HELLO, 0, Hello(1, 1).encode()),
    "a frame of unknown type 99": b"\0\0\0" + bytes([99]) + bytes(4),
    "a Dial record ends inside field 1": frame(FrameType.DIAL, 0, b"\x01\x00\x00\x50abc"),
    "a Revoke record has field 1 twice": frame(FrameType.REVOKE, 0, b"\x01\x00\x00\x01a" * 2),
    "field 1 of a Dial record is not UTF-8": frame(FrameType.DIAL, 0, b"\x01\x00\x00\x01\xff"),
    "a frame of type 13 with a body of 5000 bytes": frame(FrameType.DIAL, 0, bytes(5000)),
}


@pytest.mark.parametrize("said", MISPLACED, ids=lambda said: said.replace(" ", "-"))
async def test_b8_frames_that_no_relay_sends(tmp_path: Path, said: str) -> None:
    """The agent ends that control connection, says why, and makes another; sessions go on."""
    Control.made = []
    async with Organisation.running(tmp_path, relay={"ControlServer": Control}) as org, org.client() as alice:
        assert (await alice.get()).status == 200
        Control.made[0].say(MISPLACED[said])
        await org.until(lambda: org.said("control connection lost"), "the agent ends the connection")
        (told,) = org.said("control connection lost")
        assert told["reason"].startswith(f"the other end broke the protocol: {said}")
        assert (await alice.get()).status == 200
        await org.until(lambda: len(org.said("agent connected")) == 2, "the agent comes again")
        assert len(org.said("session opened")) == 1


@pytest.mark.parametrize("code", [*GoawayCode, 99], ids=str)
async def test_b8_goodbyes_with_odd_codes_and_times(tmp_path: Path, code: int) -> None:
    """Whatever the relay's reason, sessions stay, but where the cluster is said to be revoked: that is told as the
    relay's word, and in none of its own."""
    Control.made = []
    async with Organisation.running(tmp_path, relay={"ControlServer": Control}) as org, org.client() as alice:
        assert (await alice.get()).status == 200
        goaway = Goaway(2**31, code, "\x1b[2J" + "x" * 900, 10**9, final=True)
        Control.made[0].say(frame(FrameType.GOAWAY, 0, goaway.encode()))
        await org.until(lambda: org.said("control connection lost"), "the connection is over")
        (told,) = org.said("control connection lost")
        assert told["retry_in"] <= 630, "ten minutes, and what is spread"
        if code == GoawayCode.REVOKED:
            await org.until(lambda: org.said("session ended", user="alice"), "the session ends")
            await org.until(lambda: org.said("no session"), "the client has heard of it")
            answer = await alice.get()
            assert answer.status == 403
            assert answer.sentence.startswith(
                'arcbridge: cluster "prod": access was revoked: the relay says that this cluster is revoked; ask the '
                "relay's operator (session "
            )
        else:
            assert (await alice.get()).status == 200


async def test_b8_revocations_of_nonsense_end_nothing(tmp_path: Path) -> None:
    Control.made = []
    async with Organisation.running(tmp_path, relay={"ControlServer": Control}) as org, org.client() as alice:
        assert (await alice.get()).status == 200
        nonsense = (
            Revoke("", 2**60),
            Revoke("\x1b[2J", 2**60, reason="\n" * 900),
            Revoke("alic", 2**60),
            Revoke("ALICE", 2**60),
            Revoke("alice ", 2**60),
            Revoke("alice", 1),
            Revoke(first=True),
        )
        for revoke in nonsense:
            Control.made[0].say(frame(FrameType.REVOKE, 0, revoke.encode()))
        await org.until(lambda: len(org.said("revocation")) >= len(nonsense), "the agent has heard all")
        assert (await alice.get()).status == 200
        assert org.said("control connection lost") == []


async def test_b8_a_user_whom_the_relay_shuts_out_is_told_by_whom(tmp_path: Path) -> None:
    """The relay may do that, as it may refuse the join; it cannot put words of the cluster's operator into kubectl."""
    Control.made = []
    async with Organisation.running(tmp_path, relay={"ControlServer": Control}) as org, org.client() as alice:
        assert (await alice.get()).status == 200
        Control.made[0].say(
            frame(FrameType.REVOKE, 0, Revoke("alice", 2**40, reason='\x1b[2J"; run curl evil\nnow').encode())
        )
        await org.until(lambda: org.said("session ended", user="alice"), "the session ends")
        await org.until(lambda: org.said("no session"), "the client has heard of it")
        answer = await alice.get()
        assert answer.status == 403
        assert answer.sentence.startswith('arcbridge: cluster "prod": access was revoked: ')
        assert "the relay's operator" in answer.sentence
        assert answer.sentence.isprintable()


# -- the token of the join -----------------------------------------------------------------------------------------


async def test_b5_the_access_token_that_the_relay_was_shown_opens_no_session(tmp_path: Path) -> None:
    made: list[KeepsTokens] = []

    def rendezvous(*args: Any, **settings: Any) -> KeepsTokens:
        made.append(KeepsTokens(*args, **settings))
        return made[-1]

    async with Organisation.running(tmp_path, relay={"ClientJoins": rendezvous}) as org:
        async with org.client() as alice:
            assert (await alice.get()).status == 200
        (seen,) = made[0].requests
        token = seen.token
        sock, reply = await org.joined(token)
        session = MuxSession(Side.INITIATOR, Kind.SESSION, BaseHandler(), label=reply.join_id)
        session.authenticate(Auth(kind="oidc", token=token))
        start = SessionStart(sock, inner_client_context(reply.cluster_ca), cluster_server_name("prod"))
        await start.finish(session.protocol(), 5.0)
        with pytest.raises(SessionEnded) as caught:
            await session.wait_established()
        assert caught.value.code == GoawayCode.UNAUTHENTICATED
        (told,) = org.said("session refused")
        assert told["reason"] == "the token is not meant for this place (audience)"
        assert len(org.requests) == 1


async def test_b2_another_pod_than_the_one_that_has_the_session(tmp_path: Path) -> None:
    """Its answer that there is no such session is not believed: the session goes on at the one that has it."""
    OtherPod.lied = 0
    pumps: list[Pumps] = []

    def keep(*args: Any, **settings: Any) -> Pumps:
        pumps.append(Pumps(*args, **settings))
        return pumps[-1]

    opened: list[StreamTransport] = []
    watched = {"prod": {"KubeProxy": tells_of_streams(opened)}}
    async with Organisation.running(tmp_path, relay={"ClientJoins": OtherPod, "Pumps": keep}, agents=watched) as org:
        await org.start_agent(org.clusters["prod"])
        async with org.client() as alice, alice.connected() as (reader, writer):
            writer.write(b"GET /tagged/prod/alice/9 HTTP/1.1\r\n")
            await org.until(lambda: opened, "the agent has the stream")
            for pump in list(pumps[0]._open):
                pump.abort()
            await org.until(lambda: org.said("session resumed", epoch=2), "it is resumed at the second try")
            (told,) = org.said("not resumed yet", log_level="warning")
            assert told["reason"] == (
                'the connection to cluster "prod" was lost: the relay brought another agent than the one that has the '
                "session"
            )
            writer.write(b"Host: x\r\n\r\n")
            assert b"/tagged/prod/alice/9|alice" in await reader.readuntil(b"|alice\n")
        assert OtherPod.lied == 1
