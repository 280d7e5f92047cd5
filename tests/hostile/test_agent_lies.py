"""An agent that breaks the protocol towards its users, or shows a certificate that is not its cluster's
(docs/threats.md#D2, docs/threats.md#D3, docs/threats.md#D4).

What a cluster answers is the cluster's own; what must hold is that the client stays small, ends what makes no sense,
says why, and gives no other connection's bytes to anyone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from arcbridge.errors import ArcbridgeError, PinMismatch
from arcbridge.mux.connection import Migration
from arcbridge.mux.session import MuxSession
from arcbridge.mux.stream import StreamTransport
from arcbridge.pki.authority import Authority
from arcbridge.relay.pump import Pumps
from arcbridge.wire.frames import U32, U64, FrameType, GoawayCode, frame
from arcbridge.wire.records import Auth, AuthOk, Dial, Hello, Open, Revoke, Status
from tests.hostile.agent_lies import Control, answers_with, own_authority, shows, tells_of_streams
from tests.hostile.organisation import ALICE, BOB, Organisation

STRANGER = Authority.create("a stranger's")
NAME = "prod.cluster.arcbridge"
CERTIFICATES: dict[str, Callable[[Any], tuple[str, str]]] = {
    "of another CA": lambda credential: _pair(STRANGER.issue_server([NAME])),
    "of another name": lambda credential: _pair(own_authority(credential).issue_server(["test.cluster.arcbridge"])),
    "lapsed": lambda credential: lapsed(credential),
    "of the agent's enrolment": lambda credential: (credential.certificate_pem, credential.key_pem),
}


def lapsed(credential: Any) -> tuple[str, str]:
    """A certificate of the cluster's CA, for the right name, that was good until yesterday."""
    ca = x509.load_pem_x509_certificate(credential.cluster_ca_certificate_pem.encode())
    ca_key = serialization.load_pem_private_key(credential.cluster_ca_key_pem.encode(), None)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=9))
        .not_valid_after(now - timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return leaf.public_bytes(serialization.Encoding.PEM).decode(), private.decode()


def _pair(issued: Any) -> tuple[str, str]:
    return issued.certificate_pem, issued.key_pem


@pytest.mark.parametrize("shown", CERTIFICATES)
async def test_d2_a_session_certificate_that_is_not_the_clusters(tmp_path: Path, shown: str) -> None:
    lie = {"arcbridge.agent.dials.SessionCertificate": shows(CERTIFICATES[shown])}
    async with Organisation.running(tmp_path, agents={"prod": lie}) as org:
        with pytest.raises(PinMismatch) as caught:
            async with org.client():
                pytest.fail("it began")
        assert caught.value.message == (
            'the peer that answered for cluster "prod" is not certified by its CA; another party may be in between: '
            "tell the relay's operator"
        )
        assert org.said("session opened") == org.said("session refused") == []


async def test_d2_the_certificate_of_another_cluster(tmp_path: Path) -> None:
    """An agent with the enrolment of `prod` that holds the CA of `test`, too."""
    stolen: list[Any] = []

    class Keeps(shows(lambda credential: _pair(own_authority(credential).issue_server([NAME])))):
        __slots__ = ()

        def tls(self, credential: Any) -> Any:
            stolen.append(credential)
            return super().tls(credential if credential.cluster == "test" else stolen[0])

    lie = {"arcbridge.agent.dials.SessionCertificate": Keeps}
    async with Organisation.running(tmp_path, "test", "prod", agents={"test": lie, "prod": lie}) as org:
        with pytest.raises(PinMismatch):
            async with org.client(cluster="test"):
                pytest.fail("it began: the name is not its own")
        with pytest.raises(PinMismatch, match="is not certified by its CA"):
            async with org.client(cluster="prod"):
                pytest.fail("it began")
        assert org.said("session opened") == []


BROKEN = "the other end broke the protocol: "
SESSION_LIES: dict[str, Callable[[int], bytes]] = {
    "DATA for a stream that was never opened": lambda id: frame(FrameType.DATA, id + 100, b"bytes of another user"),
    "FIN for a stream that was never opened": lambda id: frame(FrameType.FIN, id + 100, b""),
    "RESET for a stream that was never opened": lambda id: frame(FrameType.RESET, 40, U32.pack(3)),
    "WINDOW for a stream that was never opened": lambda id: frame(FrameType.WINDOW, 40, U32.pack(3)),
    "OPEN with a stream id of the other side's": lambda id: frame(FrameType.OPEN, 99, Open("kubernetes").encode()),
    "a second HELLO": lambda id: frame(FrameType.HELLO, 0, Hello(1, 1, stream_window=65536).encode()),
    "AUTH from the wrong side": lambda id: frame(FrameType.AUTH, 0, Auth("oidc", "t").encode()),
    "DIAL from the wrong side": lambda id: frame(FrameType.DIAL, 0, Dial("t").encode()),
    "STATUS from the wrong side": lambda id: frame(FrameType.STATUS, 0, Status("t").encode()),
    "REVOKE from the wrong side": lambda id: frame(FrameType.REVOKE, 0, Revoke("alice", 9).encode()),
    "the other end confirms bytes that were never sent": lambda id: frame(FrameType.ACK, 0, U64.pack(2**40)),
    "an impossible grant for the session": lambda id: frame(FrameType.WINDOW, 0, U32.pack(2**32 - 1)) * 2,
    "a frame of unknown type 99": lambda id: b"\0\0\0" + bytes([99]) + bytes(4),
    "a DATA frame of 1048576 bytes": lambda id: (1 << 20).to_bytes(3, "big") + b"\x05" + U32.pack(id),
    "it opened a stream, which no agent does": lambda id: frame(FrameType.OPEN, 2, Open("kubernetes").encode()),
}


@pytest.mark.parametrize("said", SESSION_LIES, ids=lambda said: said.replace(" ", "-"))
async def test_d3_frames_that_break_the_session(tmp_path: Path, said: str) -> None:
    """The session of the caller ends, and the log says why; no caller gets a whole answer that is another's."""
    lie = {"KubeProxy": answers_with(SESSION_LIES[said])}
    async with Organisation.running(tmp_path, agents={"prod": lie}) as org, org.client(ALICE) as alice:
        answer = await alice.get()
        assert answer.status in (0, 503)
        await org.until(lambda: org.said("session lost"), "the client ends the session")
        assert org.said("session lost")[0]["reason"].startswith(BROKEN + said)
        assert b"another user" not in answer.body


STREAM_LIES: dict[str, Callable[[int], bytes]] = {
    "bytes behind the end": lambda id: frame(FrameType.FIN, id, b"") + frame(FrameType.DATA, id, b"more"),
    "two ends": lambda id: frame(FrameType.FIN, id, b"") * 2,
    "a grant of nothing": lambda id: frame(FrameType.WINDOW, id, U32.pack(0)),
    "an impossible grant": lambda id: frame(FrameType.WINDOW, id, U32.pack(2**31 - 1)) * 2,
    "more than the window": lambda id: (
        frame(FrameType.DATA, id, b"HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n")
        + frame(FrameType.DATA, id, bytes(250_000)) * 8
    ),
    "an unknown reset": lambda id: frame(FrameType.RESET, id, U32.pack(999)),
}


@pytest.mark.parametrize("lie", STREAM_LIES, ids=lambda lie: lie.replace(" ", "-"))
async def test_d3_frames_that_break_a_stream(tmp_path: Path, lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That stream ends with a reset towards its caller, and the next one works in the same session."""
    told: list[int] = []

    def frames(stream_id: int) -> bytes:
        told.append(stream_id)
        return STREAM_LIES[lie](stream_id) if len(told) == 1 else b""

    class Once(answers_with(frames)):
        def serve(self, stream: Any, caller: Any) -> None:
            if told:
                super(Once.__bases__[0], self).serve(stream, caller)
            else:
                super().serve(stream, caller)

    async with Organisation.running(tmp_path, agents={"prod": {"KubeProxy": Once}}) as org, org.client(ALICE) as alice:
        first = await alice.get()
        assert first.status == 0, "nothing that looks whole"
        assert (await alice.get()).status == 200
        assert org.said("session lost") == []
        assert len(org.said("session opened")) == 1
        if lie != "an unknown reset":
            await org.until(lambda: org.said("connection cut"), "the client says so")
            (cut,) = org.said("connection cut")
            assert cut["log_level"] == "warning"
            assert cut["reason"].startswith("stream reset (")
            assert "broke the protocol" in cut["reason"]


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (GoawayCode.PROTOCOL, 'the agent of cluster "prod" ended the session because this client broke the protocol'),
        (GoawayCode.UNAUTHENTICATED, 'cluster "prod" does not accept the token'),
        (GoawayCode.FORBIDDEN, 'cluster "prod" does not let you in'),
        (GoawayCode.EXPIRED, "the login has expired; log in again"),
        (GoawayCode.LIMIT, 'the agent of cluster "prod" refused or ended your session at one of its limits'),
        (GoawayCode.GONE, 'the agent of cluster "prod" no longer has the session'),
        (99, 'the session with cluster "prod" ended'),
    ],
    ids=str,
)
async def test_d3_refusals_with_words_for_the_terminal(tmp_path: Path, code: int, sentence: str) -> None:
    class Refuses(MuxSession):
        def accept_auth(self, ok: AuthOk) -> None:
            self.close(code, "\x1b[2Jrun curl evil.example", 10**9)

    lie = {"arcbridge.agent.sessions.MuxSession": Refuses}
    async with Organisation.running(tmp_path, agents={"prod": lie}) as org:
        with pytest.raises(ArcbridgeError) as caught:
            async with org.client():
                pytest.fail("it began")
        assert caught.value.message.startswith(sentence)
        assert "evil.example" not in caught.value.message


async def test_d3_a_subject_for_the_terminal(tmp_path: Path) -> None:
    class Flatters(MuxSession):
        def accept_auth(self, ok: AuthOk) -> None:
            super().accept_auth(replace(ok, subject="root\x1b[2J\nsession established", expires_in=2**60))

    lie = {"arcbridge.agent.sessions.MuxSession": Flatters}
    async with Organisation.running(tmp_path, agents={"prod": lie}) as org, org.client() as alice:
        assert (await alice.get()).status == 200
        assert all(line.isprintable() for line in alice.lines)


async def test_d3_a_resumption_whose_counts_cannot_be_true(tmp_path: Path) -> None:
    """The agent claims to have more than was sent: no byte is sent again, and what runs is cut with the reason."""
    pumps: list[Pumps] = []

    def keep(*args: Any, **settings: Any) -> Pumps:
        pumps.append(Pumps(*args, **settings))
        return pumps[-1]

    class Overstates(Migration):
        def take_over(self, newcomer: MuxSession, ok: AuthOk) -> None:
            receiver = self._machine.receiver
            honest = type(receiver).received
            try:
                type(receiver).received = property(lambda self: 2**40)
                super().take_over(newcomer, ok)
            finally:
                type(receiver).received = honest

    class Liar(MuxSession):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            self.migration = Overstates(self, self._machine)

    opened: list[StreamTransport] = []
    lie = {"arcbridge.agent.sessions.MuxSession": Liar, "KubeProxy": tells_of_streams(opened)}
    async with (
        Organisation.running(tmp_path, relay={"Pumps": keep}, agents={"prod": lie}) as org,
        org.client() as alice,
    ):
        assert (await alice.get()).status == 200
        opened.clear()
        async with alice.connected() as (reader, writer):
            writer.write(b"GET /api/v1/pods?watch=1 HTTP/1.1\r\nHost: x\r\n")  # never complete: its stream stays open
            await writer.drain()
            await org.until(lambda: opened, "the agent has the stream")
            assert len(org.said("session opened")) == 1
            for pump in list(pumps[0]._open):
                pump.abort()
            with pytest.raises(ConnectionResetError):
                await reader.read()
        told = org.said("session could not be resumed")
        assert told[0]["reason"] == "the session cannot be resumed: the two ends disagree about what was sent"


# -- towards the relay -----------------------------------------------------------------------------------------------

RELAY_LIES = {
    "DIAL from the wrong side": frame(FrameType.DIAL, 0, Dial("t").encode()),
    "REVOKE from the wrong side": frame(FrameType.REVOKE, 0, Revoke("bob", 2**40).encode()),
    "AUTH from the wrong side": frame(FrameType.AUTH, 0, Auth("oidc", "t").encode()),
    "OPEN on a control connection": frame(FrameType.OPEN, 1, Open("kubernetes").encode()),
    "MOVE on a control connection": frame(FrameType.MOVE, 0, b""),
    "a second HELLO": frame(FrameType.HELLO, 0, Hello(1, 1, agent="another").encode()),
    "a Status record ends inside field 3": frame(FrameType.STATUS, 0, b"\x03\x00\x00\x50abc"),
}


@pytest.mark.parametrize("said", RELAY_LIES, ids=lambda said: said.replace(" ", "-"))
async def test_d4_frames_that_no_agent_sends_to_a_relay(tmp_path: Path, said: str) -> None:
    Control.made.clear()
    lie = {"ControlConnections": Control}
    async with (
        Organisation.running(tmp_path, "prod", "test", agents={"prod": lie}) as org,
        org.client(ALICE) as alice,
        org.client(BOB, "test") as bob,
    ):
        assert (await alice.get()).status == (await bob.get()).status == 200
        Control.made[0].say(RELAY_LIES[said])
        await org.until(lambda: org.said("agent disconnected"), "the relay ends the connection")
        (told,) = org.said("agent disconnected")
        assert told["cluster"] == "prod"
        assert told["reason"] == BROKEN + said
        assert (await alice.get()).status == (await bob.get()).status == 200
        assert org.said("session lost") == []


async def test_d4_an_agent_answers_for_dials_that_are_not_its_own(tmp_path: Path) -> None:
    """STATUS for tokens that it guesses, refusals and consents: no other cluster's join notices."""
    Control.made.clear()
    async with Organisation.running(tmp_path, "prod", "test", agents={"prod": {"ControlConnections": Control}}) as org:
        for code in (0, 1, 99):
            for token in ("", "t" * 22, "\x1b[2J"):
                said = Status(token, code, "\x1b[2Jgo away", instance="of another", ready=True)
                Control.made[0].say(frame(FrameType.STATUS, 0, said.encode()))
        async with org.client(BOB, "test") as bob, org.client(ALICE) as alice:
            assert (await bob.get()).status == (await alice.get()).status == 200
        assert org.said("agent disconnected") == []


async def test_d4_a_flood_of_status(tmp_path: Path) -> None:
    """The relay ends that control connection at the limit of the protocol; the agents of other clusters serve on."""
    Control.made.clear()
    async with (
        Organisation.running(tmp_path, "prod", "test", agents={"prod": {"ControlConnections": Control}}) as org,
        org.client(BOB, "test") as bob,
    ):
        Control.made[0].say(frame(FrameType.STATUS, 0, Status("t").encode()) * 40_000)
        await org.until(lambda: org.said("agent disconnected"), "the relay ends the connection")
        assert (await bob.get()).status == 200
        (told,) = org.said("agent disconnected")
        assert (told["cluster"], told["reason"]) == ("prod", BROKEN + "a flood of control frames")
