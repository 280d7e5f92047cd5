"""Login, policy, agent, session and API server: facts in, findings out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from arcbridge.checks.diagnosis import first_failure
from arcbridge.client.credentials.jwt_unverified import UnverifiedClaims
from arcbridge.client.credentials.tokens import NoLogin, OneToken, TokenExpired
from arcbridge.client.doctor.access_judgement import (
    ApiFacts,
    LoginFacts,
    SessionFacts,
    judge_api,
    judge_login,
    judge_policy,
    judge_session,
)
from arcbridge.client.session.refusal import of_join, of_session, of_token
from arcbridge.errors import (
    ArcbridgeError,
    ConfigError,
    ConnectionLost,
    JoinRefused,
    PermissionRefused,
    PinMismatch,
    SessionEnded,
    StreamReset,
    Unauthenticated,
    Unreachable,
)
from arcbridge.net.join import JoinCode
from arcbridge.refusals import Refusal, RefusalRule
from arcbridge.wire.frames import GoawayCode, ResetCode
from tests.client.doctor.test_relay_hops import verdict

NOW = 1_000_000_000.0
TOKEN = UnverifiedClaims(NOW + 3600, "", "alice", "https://login.example.org", ("arcbridge-relay",))


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (LoginFacts(relay=TOKEN, cluster=TOKEN), ("ok", "")),
        (LoginFacts(), ("ok", "")),
        (LoginFacts(relay=replace(TOKEN, expires_at=NOW)), ("failed", "token_expired")),
        (LoginFacts(relay=TOKEN, cluster=replace(TOKEN, expires_at=NOW + 60)), ("warning", "token_ends")),
        (LoginFacts(relay=TOKEN, not_before=NOW + 600), ("failed", "token_not_yet")),
        (LoginFacts(NoLogin("no login")), ("failed", "login_missing")),
        (LoginFacts(Unauthenticated("the login has ended")), ("failed", "login_missing")),
        (LoginFacts(TokenExpired("the token of x has expired")), ("failed", "token_expired")),
        (LoginFacts(OneToken("x")), ("failed", "one_token")),
        (LoginFacts(ConfigError("x")), ("failed", "login_settings")),
        (LoginFacts(Unreachable("the issuer cannot be reached")), ("failed", "issuer")),
    ],
)
def test_login(facts: LoginFacts, expected: tuple[str, str]) -> None:
    assert verdict(judge_login(facts, NOW)) == expected


def not_taken(rule: RefusalRule) -> Unauthenticated:
    return of_token("the relay does not accept the access token", Refusal(rule), "the relay")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, ("ok", "")),
        (not_taken(RefusalRule.TOKEN_AUD), ("failed", "relay_token_audience")),
        (not_taken(RefusalRule.TOKEN_AUD_FORBIDDEN), ("failed", "relay_token_audience")),
        (not_taken(RefusalRule.TOKEN_ISS), ("failed", "relay_token_issuer")),
        (not_taken(RefusalRule.TOKEN_SIGNATURE), ("failed", "relay_token_issuer")),
        (not_taken(RefusalRule.TOKEN_EXP), ("failed", "token_expired")),
        (not_taken(RefusalRule.TOKEN_NBF), ("failed", "token_not_yet")),
        (not_taken(RefusalRule.CLAIMS_RULE), ("failed", "relay_token")),
        (not_taken(RefusalRule.NONE), ("failed", "relay_token")),
        (PermissionRefused("x"), ("failed", "policy")),
        (Unreachable("status 503"), ("failed", "relay_busy")),
    ],
)
def test_policy(error: ArcbridgeError | None, expected: tuple[str, str]) -> None:
    assert verdict(judge_policy(error, ["prod"], "prod", TOKEN)) == expected


def test_policy_lists_the_cluster() -> None:
    assert verdict(judge_policy(None, ["prod"], "", TOKEN)) == ("ok", "")
    assert verdict(judge_policy(None, ["prod"], "other", TOKEN)) == ("failed", "policy")
    found = judge_policy(not_taken(RefusalRule.TOKEN_AUD), [], "prod", TOKEN)
    assert found.detail == 'the token is for "arcbridge-relay", and the relay wants one for itself'


def caused(error: ArcbridgeError, cause: ArcbridgeError) -> ArcbridgeError:
    error.__cause__ = cause
    return error


def by_join(code: int) -> ArcbridgeError:
    cause = JoinRefused(code, "words of the relay")
    return caused(of_join(cause, "prod"), cause)


def by_agent(code: GoawayCode, rule: RefusalRule = RefusalRule.NONE) -> ArcbridgeError:
    cause = SessionEnded(code, "", refusal=Refusal(rule))
    return caused(of_session(cause, "prod"), cause)


@pytest.mark.parametrize(
    ("error", "hop", "code"),
    [
        (by_join(JoinCode.NO_AGENT), "agent", "agent_missing"),
        (by_join(JoinCode.AGENT_TIMEOUT), "agent", "agent_silent"),
        (by_join(JoinCode.AGENT_REFUSED), "agent", "agent_refused"),
        (by_join(JoinCode.FORBIDDEN), "policy", "policy"),
        (by_join(JoinCode.UNAUTHENTICATED), "policy", "relay_token"),
        (by_join(JoinCode.OVERLOADED), "agent", "relay_busy"),
        (by_join(99), "agent", "relay_busy"),
        (by_agent(GoawayCode.UNAUTHENTICATED, RefusalRule.TOKEN_AUD), "session", "cluster_token_audience"),
        (by_agent(GoawayCode.UNAUTHENTICATED, RefusalRule.TOKEN_ISS), "session", "cluster_token_issuer"),
        (by_agent(GoawayCode.UNAUTHENTICATED, RefusalRule.CLAIMS_RULE), "session", "cluster_token_claim"),
        (by_agent(GoawayCode.UNAUTHENTICATED), "session", "cluster_token"),
        (by_agent(GoawayCode.EXPIRED), "session", "cluster_token"),
        (by_agent(GoawayCode.FORBIDDEN), "session", "agent_forbids"),
        (by_agent(GoawayCode.REVOKED), "session", "access_revoked"),
        (by_agent(GoawayCode.UNAVAILABLE), "session", "agent_unavailable"),
        (by_agent(GoawayCode.VERSION), "session", "session"),
        (ConnectionLost("x"), "session", "session"),
        (PinMismatch("two pins"), "session", "cluster_pin"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_session(error: ArcbridgeError, hop: str, code: str) -> None:
    found = judge_session(SessionFacts("prod", error), TOKEN)
    failure = first_failure(found)
    assert failure is not None
    assert failure.remedy
    assert (failure.hop, failure.code) == (hop, code)
    assert "words of the relay" not in failure.detail


def test_a_session() -> None:
    facts = SessionFacts("prod", subject="alice", session="a768")
    assert [verdict(finding) for finding in judge_session(facts, TOKEN)] == [("ok", ""), ("ok", "")]
    unknown = judge_session(SessionFacts("prod", PinMismatch("x"), known=False), TOKEN)
    assert verdict(unknown[-1]) == ("failed", "cluster_unknown")


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (ApiFacts(201, user="alice", groups=("platform",)), ("ok", "")),
        (ApiFacts(404), ("ok", "")),
        (ApiFacts(error=StreamReset(ResetCode.CONNECT_FAILED)), ("failed", "api_server")),
        (ApiFacts(error=ConnectionLost("x")), ("failed", "api_server")),
        (ApiFacts(502, message="arcbridge: the API server cannot be reached"), ("failed", "api_server")),
        (ApiFacts(401, message="Unauthorized"), ("failed", "agent_credential")),
        (ApiFacts(502, rule=RefusalRule.AGENT_CREDENTIAL), ("failed", "agent_credential")),
        (ApiFacts(401, message="Unauthorized", token_mode=True), ("failed", "cluster_credential")),
        (ApiFacts(502, rule=RefusalRule.AGENT_IMPERSONATION), ("failed", "agent_impersonation")),
        (ApiFacts(403, message="forbidden"), ("ok", "")),
    ],
)  # fmt: skip
def test_api(facts: ApiFacts, expected: tuple[str, str]) -> None:
    assert verdict(judge_api(facts)) == expected


def test_the_request_s_id_is_there() -> None:
    for message in ("down", "down (request a-1-1)"):
        assert judge_api(ApiFacts(502, message=message, request_id="a-1-1")).detail.count("(request a-1-1)") == 1
