"""The session's life against a real join, TLS and mux: what is sent before what is known, and how it comes back."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from arcbridge.client.credentials import proof_keys
from arcbridge.client.credentials.tokens import Tokens
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.relay.relays import Relays
from arcbridge.client.session.session_manager import SessionManager
from arcbridge.client.session.trust import ClusterTrust
from arcbridge.errors import ArcbridgeError, PermissionRefused, SessionEnded, StateError, Unauthenticated, Unreachable
from arcbridge.identity.proof import ProofKey, check_proof
from arcbridge.net.backoff import Backoff
from arcbridge.net.join import JoinCode
from arcbridge.pki.private_files import write_private
from arcbridge.refusals import Refusal, RefusalRule
from arcbridge.settings.config import ClientConfig, LoginConfig
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.records import AuthOk, JoinReply
from tests.client.echo_stream import Stream
from tests.client.far_side import CLUSTER, CLUSTER_CA, OTHER_CA, RELAY_CA, FarSide
from tests.support.eventually import until
from tests.support.stream_io import StreamIO


def jwt_like(life: float, mark: str = "", **more: object) -> str:
    text = json.dumps({"exp": time.time() + life, "mark": mark, **more})
    claims = base64.urlsafe_b64encode(text.encode()).rstrip(b"=")
    return f"eyJh.{claims.decode()}.sig"


def login(directory: Path, *, access: str = "the-access-token", cluster: str = "the-id-token") -> LoginConfig:
    (directory / "access").write_text(access + "\n")
    (directory / "id").write_text(cluster + "\n")
    return LoginConfig(access_token_file=directory / "access", id_token_file=directory / "id")


def settings(far: FarSide, directory: Path, **more: Any) -> ClientConfig:
    """The settings of a client that knows relay and cluster, and has its tokens in files."""
    (directory / "relay-ca.pem").write_text(RELAY_CA.certificate_pem)
    known = {"relay": far.address, "relay_ca_file": directory / "relay-ca.pem", "cluster_ca_pin": CLUSTER_CA.pin}
    return ClientConfig(**{**known, "state_dir": directory / "state", "login": login(directory), **more})


def make(far: FarSide, directory: Path, **options: Any) -> SessionManager:
    trust = options.pop("trust", None) or ClusterTrust(pin=CLUSTER_CA.pin)
    tokens = options.pop("tokens", None) or Tokens(login(directory), None)
    ca_file = directory / "relay-ca.pem"
    ca_file.write_text(RELAY_CA.certificate_pem)
    others = cast(tuple[FarSide, ...], options.pop("others", ()))
    # In the order given, not a random one.
    relays = Relays([RelayAccess(one.address, ca_file=ca_file) for one in (far, *others)], draw=lambda: 0.0)
    return SessionManager(relays, CLUSTER, tokens, trust, backoff=Backoff(first=0.01, cap=0.05), **options)


@contextlib.asynccontextmanager
async def running(session: SessionManager) -> AsyncIterator[SessionManager]:
    task = asyncio.get_running_loop().create_task(session.run())
    try:
        yield session
    finally:
        task.cancel()
        await asyncio.wait([task])
        for _ in range(10):
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def streaming(far: FarSide, directory: Path, **options: Any) -> AsyncIterator[tuple[SessionManager, Stream]]:
    """A session that runs, and a stream in it."""
    async with running(make(far, directory, **options)) as session:
        yield session, await Stream.open(session)


async def echo(session: SessionManager, data: bytes = b"hello") -> bytes:
    io = StreamIO()
    (await session.ready()).open("tcp:echo", io)
    await io.write(data)
    return await io.read_exactly(len(data))


async def echo_again(session: SessionManager, error: type[ArcbridgeError] = Unreachable) -> bytes:
    """Ask for an echo until a session gives one, as kubectl does, which tries again after an error."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(error):
                return await echo(session)
            await asyncio.sleep(0.01)


class TestTheGoodWay:
    async def test_it_is_gone_when_the_agent_has_heard_of_the_end(
        self, far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("arcbridge.client.session.session_manager.CLOSE_TIMEOUT", 60.0)
        session = make(far, tmp_path)
        async with running(session):
            await echo(session)
            mine = session.current
            assert mine is not None
            session.close()
            assert mine.transport is not None
            await session.wait_closed()
            assert mine.transport is None
            error = await far.sessions[0].wait_ended()
            assert isinstance(error, SessionEnded)
            assert error.code == GoawayCode.DONE
            await session.wait_closed()  # nothing is left to wait for
            with pytest.raises(Unreachable, match="arcbridge is ending"):
                await asyncio.wait_for(session.ready(), 5)

    async def test_tokens_go_where_they_belong(self, far: FarSide, tmp_path: Path) -> None:
        async with running(make(far, tmp_path)) as session:
            assert await echo(session) == b"hello"
            assert session.subject == "alice"
        assert [(r.role, r.cluster, r.token) for r in far.requests] == [("client", CLUSTER, "the-access-token")]
        assert [(a.kind, a.token) for a in far.auths] == [("oidc", "the-id-token")]

    async def test_token_mode(self, far: FarSide, tmp_path: Path) -> None:
        tokens = Tokens(login(tmp_path), None, token="sa-token")
        async with running(make(far, tmp_path, tokens=tokens)) as session:
            await session.ready()
        assert [(a.kind, a.token) for a in far.auths] == [("bearer", "sa-token")]
        assert far.requests[0].token == "the-access-token"

    async def test_one_attempt_for_all(self, far: FarSide, tmp_path: Path) -> None:
        async with running(make(far, tmp_path)) as session:
            sessions = await asyncio.gather(*(session.ready() for _ in range(20)))
            assert len(set(sessions)) == 1
        assert len(far.requests) == 1

    async def test_a_stream_opened_before_auth_follows_the_token(self, far: FarSide, tmp_path: Path) -> None:
        async with running(make(far, tmp_path)) as session:
            early = await session.ready(before_auth=True)
            assert session.current is None, "the agent has not said yes"
            io = StreamIO()
            early.open("tcp:echo", io)
            await io.write(b"hello")
            assert await io.read_exactly(5) == b"hello"
            assert session.current is early
            assert await session.ready(before_auth=True) is early
        assert len(far.requests) == 1

    async def test_a_stream_opened_before_auth_hears_of_a_refusal_too(self, far: FarSide, tmp_path: Path) -> None:
        far.auth_answer = (GoawayCode.UNAUTHENTICATED, "no")
        async with running(make(far, tmp_path)) as session:
            io = StreamIO()
            (await session.ready(before_auth=True)).open("tcp:echo", io)
            with pytest.raises(SessionEnded):
                await io.read_exactly(1)
            with pytest.raises(Unauthenticated):
                await session.ready()
        assert far.targets == [], "the agent has opened nothing"


class TestRefusals:
    @pytest.mark.parametrize(
        ("code", "kind", "words", "retry"),
        [
            (JoinCode.FORBIDDEN, PermissionRefused, 'cluster "prod" does not exist or you may not', None),
            (JoinCode.OVERLOADED, Unreachable, "no room", 1),
        ],
    )
    async def test_of_the_join(
        self, far: FarSide, tmp_path: Path, code: JoinCode, kind: type[ArcbridgeError], words: str, retry: int | None
    ) -> None:
        far.reply = JoinReply(code=code, message="\x1b[31mforeign text")
        session = make(far, tmp_path)
        with pytest.raises(kind) as caught:
            await session.connect_once()
        assert words in caught.value.message
        assert "foreign" not in caught.value.message
        assert caught.value.retry_after == retry
        assert far.auths == []

    async def test_a_relay_of_another_ca(self, far: FarSide, tmp_path: Path) -> None:
        session = make(far, tmp_path)
        (tmp_path / "relay-ca.pem").write_text(OTHER_CA.certificate_pem)
        with pytest.raises(Unreachable, match="certificate is not trusted"):
            await session.connect_once()
        assert far.requests == []

    async def test_an_agent_that_is_silent(self, far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("arcbridge.client.session.connection.HANDSHAKE_DEADLINE", 0.2)
        far.silent_agent = True
        with pytest.raises(Unreachable, match="did not answer in time"):
            await make(far, tmp_path).connect_once()

    async def test_no_login(self, far: FarSide, tmp_path: Path) -> None:
        with pytest.raises(Unauthenticated, match="no login is configured"):
            await make(far, tmp_path, tokens=Tokens(LoginConfig(), None)).connect_once()
        assert far.requests == []


class TestComingBack:
    async def test_a_drain_moves_new_streams_and_keeps_old_ones(self, far: FarSide, tmp_path: Path) -> None:
        async with streaming(far, tmp_path) as (session, old):
            far.sessions[0].goaway(GoawayCode.DRAINING)
            async with asyncio.timeout(10):
                await until(lambda: session.current is None or len(far.sessions) != 1)
                assert await echo(session) == b"hello"
                await old.check(b"b")
            assert len(far.sessions) == 2

    async def test_renewal_within_the_session(
        self, far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("arcbridge.client.session.renewal.RENEWAL_RETRY", 0.02)
        far.auth_answer = AuthOk(subject="alice", expires_in=1)
        config = login(tmp_path)
        async with running(make(far, tmp_path, tokens=Tokens(config, None))) as session:
            await session.ready()
            far.auth_answer = replace(far.auth_answer, expires_in=3600)
            (tmp_path / "id").write_text("a-newer-token")
            await until(lambda: len(far.auths) >= 2)
        assert [auth.token for auth in far.auths] == ["the-id-token", "a-newer-token"]
        assert len(far.requests) == 1

    async def test_an_end_by_expiry_says_to_log_in(self, far: FarSide, tmp_path: Path) -> None:
        async with running(make(far, tmp_path)) as session:
            await session.ready()
            far.auth_answer = (GoawayCode.EXPIRED, "expired")
            far.sessions[0].close(GoawayCode.EXPIRED, "the token has expired")
            await until(lambda: isinstance(session.failure, Unauthenticated))
            with pytest.raises(Unauthenticated, match="log in again"):
                await session.ready()

    async def test_an_end_by_expiry_counts_although_a_goaway_comes_first(self, far: FarSide, tmp_path: Path) -> None:
        async with running(make(far, tmp_path)) as session:
            await session.ready()
            far.sessions[0].close(GoawayCode.EXPIRED, "the token has expired")
            async with asyncio.timeout(10):
                await until(lambda: session.counters.failures != 0)
                await until(lambda: session.current is not None)
        assert session.counters.failures == 1

    @pytest.mark.parametrize("running_session", [True, False], ids=["a session ends", "AUTH is refused"])
    async def test_v18_a_revoked_client_does_not_come_back_with_the_same_token(
        self, far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running_session: bool
    ) -> None:
        monkeypatch.setattr("arcbridge.client.session.waiters.FAILURE_HOLD", 0.001)
        # Longer than any machine takes for what follows: after the hold the same token would be tried again.
        monkeypatch.setattr("arcbridge.client.session.connector.HOLD_FIRST", 3600.0)
        monkeypatch.setattr("arcbridge.client.session.connector.HOLD_LONGEST", 3600.0)
        said = "access was revoked: ask the cluster's operator for access"
        accepted = far.auth_answer
        if not running_session:
            far.auth_answer = (GoawayCode.REVOKED, said)
        async with running(make(far, tmp_path)) as session:
            if running_session:
                await session.ready()
                far.auth_answer = (GoawayCode.REVOKED, said)
                far.sessions[0].close(GoawayCode.REVOKED, said)
            await until(lambda: session.failure is not None)
            for _ in range(50):  # its backoff is 50 ms at most, so it had the time to come back
                with pytest.raises(PermissionRefused, match='cluster "prod": access was revoked: ask the cluster'):
                    await session.ready()
                await asyncio.sleep(0.01)
            assert len(far.requests) == 1
            # Another token is tried at once, and once.
            (tmp_path / "id").write_text("a-newer-token")
            async with asyncio.timeout(10):
                while len(far.auths) < 2:
                    with pytest.raises(PermissionRefused):
                        await session.ready()
                    await asyncio.sleep(0.01)
            for _ in range(5):
                with pytest.raises(PermissionRefused):
                    await session.ready()
                await asyncio.sleep(0.01)
            assert [auth.token for auth in far.auths] == ["the-id-token", "a-newer-token"]
            far.auth_answer = accepted
            (tmp_path / "id").write_text("a-third-token")
            # The last refusal counts for FAILURE_HOLD more.
            assert await echo_again(session, PermissionRefused) == b"hello"
            assert len(far.requests) == 3

    async def test_v18_after_the_wait_a_caller_brings_it_back_with_the_same_token(
        self, far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An operator may take a revocation back."""
        monkeypatch.setattr("arcbridge.client.session.waiters.FAILURE_HOLD", 0.001)
        monkeypatch.setattr("arcbridge.client.session.connector.HOLD_FIRST", 0.2)
        async with running(make(far, tmp_path)) as session:
            await session.ready()
            far.sessions[0].close(GoawayCode.REVOKED, "access was revoked")
            await until(lambda: session.failure is not None)
            assert await echo_again(session, PermissionRefused) == b"hello"
        assert len(far.requests) == 2

    async def test_v18_a_relay_that_refuses_the_revoked_user_does_not_hide_why(
        self, far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("arcbridge.client.session.waiters.FAILURE_HOLD", 0.001)
        monkeypatch.setattr("arcbridge.client.session.connector.HOLD_FIRST", 0.01)
        async with running(make(far, tmp_path)) as session:
            await session.ready()
            far.reply = JoinReply(code=JoinCode.FORBIDDEN)
            far.sessions[0].close(GoawayCode.REVOKED, "access was revoked: ask the cluster's operator for access")
            async with asyncio.timeout(10):
                while len(far.requests) < 3:
                    await asyncio.sleep(0.01)
                    if session.failure is not None:
                        with pytest.raises(PermissionRefused, match="was revoked: ask the cluster's operator"):
                            await session.ready()

    async def test_an_end_at_the_greatest_age_is_followed_by_another_session(
        self, far: FarSide, tmp_path: Path
    ) -> None:
        async with running(make(far, tmp_path)) as session:
            await session.ready()
            far.sessions[0].close(GoawayCode.EXPIRED, "old", refusal=Refusal(RefusalRule.SESSION_AGE))
            async with asyncio.timeout(10):
                await until(lambda: len(far.sessions) >= 2)
                assert await echo(session) == b"hello"
        assert session.counters.failures == 0

    async def test_an_expired_token_is_never_sent(self, far: FarSide, tmp_path: Path) -> None:
        tokens = Tokens(login(tmp_path, cluster=jwt_like(-5)), None)
        with pytest.raises(Unauthenticated, match="has expired"):
            await make(far, tmp_path, tokens=tokens).connect_once()
        assert far.auths == []


class TestBoundTokens:
    """What a client whose tokens are bound to its key sends (docs/threats.md#T30); its agent shows another certificate
    in each connection here."""

    KEY = ProofKey.generate()

    def tokens(self, directory: Path, *, life: float = 600.0) -> Tokens:
        settings = login(directory, access=self.bound(life, "access"), cluster=self.bound(life, "id"))
        write_private(directory / "key", self.KEY.to_jwk())
        return Tokens(replace(settings, proof_key_file=directory / "key"), None)

    def bound(self, life: float, mark: str) -> str:
        return jwt_like(life, mark, nonce=self.KEY.nonce())

    def check(self, proof: str, token: str, key: bytes, pin: str) -> None:
        found = check_proof(proof, token=token, peer_spki=key, pin=pin, now=time.time())
        assert found == self.KEY.thumbprint

    async def test_each_end_gets_a_proof_for_itself(self, far: FarSide, tmp_path: Path) -> None:
        async with running(make(far, tmp_path, tokens=self.tokens(tmp_path))) as session:
            assert await echo(session) == b"hello"
        self.check(far.requests[0].proof, far.requests[0].token, far.relay_keys[0], "")
        self.check(far.auths[0].proof, far.auths[0].token, far.agent_keys[0], CLUSTER_CA.pin)

    async def test_a_resumption_and_a_renewal_get_their_own(self, far: FarSide, tmp_path: Path) -> None:
        async with streaming(far, tmp_path, tokens=self.tokens(tmp_path)) as (session, stream):
            far.cut()
            await stream.check(b"after")
            (tmp_path / "id").write_text(self.bound(900, "newer"))
            assert session._current is not None
            await session._current.renewal.renew(session._current.session)
            await until(lambda: len(far.auths) >= 3)
        assert len(far.agent_keys) == len(set(far.agent_keys)) == 2
        self.check(far.requests[1].proof, far.requests[1].token, far.relay_keys[1], "")
        self.check(far.auths[1].proof, far.auths[1].token, far.agent_keys[1], CLUSTER_CA.pin)
        self.check(far.auths[2].proof, far.auths[2].token, far.agent_keys[1], CLUSTER_CA.pin)
        assert far.auths[2].token != far.auths[1].token

    @pytest.mark.parametrize("error", [StateError("the key is damaged"), Unreachable("no certificate can be read")])
    async def test_a_renewal_without_a_proof_is_tried_again(
        self, far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: ArcbridgeError
    ) -> None:
        def fails(*_: object) -> str:
            raise error

        async with running(make(far, tmp_path, tokens=self.tokens(tmp_path))) as session:
            await session.ready()
            resumable = session._current
            assert resumable is not None
            renewal = resumable.renewal
            (tmp_path / "id").write_text(self.bound(900, "newer"))
            with monkeypatch.context() as patched:
                patched.setattr(renewal, "auth", fails)
                renewal.schedule.at = 0.0
                await renewal.renew(resumable.session)
            assert renewal.schedule.at > 0.0
            await renewal.renew(resumable.session)
            await until(lambda: len(far.auths) >= 2)
            self.check(far.auths[1].proof, far.auths[1].token, far.agent_keys[0], CLUSTER_CA.pin)

    async def test_tokens_of_another_key_and_of_none_go_without(self, far: FarSide, tmp_path: Path) -> None:
        tokens = self.tokens(tmp_path)
        (tmp_path / "access").write_text(jwt_like(600, nonce=ProofKey.generate().nonce()))
        (tmp_path / "id").write_text(jwt_like(600))
        async with running(make(far, tmp_path, tokens=tokens)) as session:
            await session.ready()
        assert (far.requests[0].proof, far.auths[0].proof) == ("", "")

    async def test_a_damaged_key_is_told_and_nothing_is_sent(self, far: FarSide, tmp_path: Path) -> None:
        tokens = self.tokens(tmp_path)
        other = json.loads(ProofKey.generate().to_jwk())["d"]
        (tmp_path / "key").write_text(json.dumps({**json.loads(self.KEY.to_jwk()), "d": other}))
        async with running(make(far, tmp_path, tokens=tokens)) as session:
            with pytest.raises(StateError, match="damaged"):
                await session.ready()
            assert far.requests == []
            # The same behind the join, where a connection to the agent stands already.
            (tmp_path / "access").write_text(jwt_like(600))
            await asyncio.sleep(0)
            async with asyncio.timeout(20):
                while not far.requests:
                    with pytest.raises(StateError, match="damaged"):
                        await session.ready()
                    await asyncio.sleep(0.01)
            with pytest.raises(StateError, match="damaged"):
                await session.ready()
            assert far.auths == []
            proof_keys.remove(tmp_path / "key")
            write_private(tmp_path / "key", self.KEY.to_jwk())
            await echo_again(session, StateError)
        self.check(far.auths[0].proof, far.auths[0].token, far.agent_keys[-1], CLUSTER_CA.pin)

    async def test_a_key_that_is_damaged_meanwhile_ends_no_stream(self, far: FarSide, tmp_path: Path) -> None:
        async with streaming(far, tmp_path, tokens=self.tokens(tmp_path)) as (_session, stream):
            good = (tmp_path / "key").read_bytes()
            other = ProofKey.generate()
            (tmp_path / "key").write_bytes(
                json.dumps({**json.loads(good), "d": json.loads(other.to_jwk())["d"]}).encode()
            )
            (tmp_path / "access").write_text(jwt_like(600))
            far.cut()
            checked = asyncio.ensure_future(stream.check(b"after"))
            await until(lambda: len(far.agent_keys) >= 3)
            assert len(far.auths) == 1
            (tmp_path / "key").write_bytes(good)
            await checked
