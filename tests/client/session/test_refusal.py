"""Statuses: the right object, and Retry-After only where a repeat is safe and may help."""

from __future__ import annotations

import base64
import errno
import json

import pytest

from arcbridge.client.session.refusal import (
    SAID_LIMIT,
    Shown,
    is_unanswered,
    of_join,
    of_session,
    raise_user_error,
    relay_unreachable,
    response,
    status_body,
)
from arcbridge.errors import (
    ArcbridgeError,
    ConnectionLost,
    JoinRefused,
    PermissionRefused,
    PinMismatch,
    RemoteProtocolError,
    SessionEnded,
    StateError,
    Unauthenticated,
    Unreachable,
)
from arcbridge.net.dialer import CredentialsMissing, ProxyRefused
from arcbridge.net.join import JoinCode
from arcbridge.refusals import read_refusal
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.records import JoinReply


def test_the_object() -> None:
    assert json.loads(status_body(Unreachable('cluster "x" has no connected agent'))) == {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": 'arcbridge: cluster "x" has no connected agent',
        "reason": "ServiceUnavailable",
        "code": 503,
    }


@pytest.mark.parametrize(
    "error", [Unreachable("x"), Unauthenticated("x"), PermissionRefused("x"), PinMismatch("x"), StateError("x")]
)
def test_the_response(error: ArcbridgeError) -> None:
    head, _, body = response(error).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0].startswith(f"HTTP/1.1 {error.status_code} ")
    assert f"Content-Length: {len(body)}" in lines
    assert "Connection: close" in lines
    assert not any(line.startswith("Retry-After") for line in lines)
    assert response(error, head_only=True) == head + b"\r\n\r\n"


def test_retry_after() -> None:
    assert b"\r\nRetry-After: 1\r\n" in response(Unreachable("x", retry_after=1))


def test_kubectl_is_not_kept_silent_for_minutes() -> None:
    """kubectl repeats ten times: a long Retry-After is not passed on, nor one after a long wait."""
    assert b"Retry-After" not in response(Unreachable("x", retry_after=5))
    assert of_join(JoinRefused(JoinCode.NO_AGENT, "", retry_after=5), "prod").retry_after == 1
    assert of_join(JoinRefused(JoinCode.AGENT_TIMEOUT, "", retry_after=5), "prod").retry_after is None


def test_every_join_code_has_words() -> None:
    for code in [*JoinCode][1:]:
        found = of_join(JoinRefused(code, "FOREIGN\x1b"), "prod")
        assert "FOREIGN" not in found.message
        assert not found.message.endswith(".")
    assert of_join(JoinRefused(999, ""), "prod").status_code == 503


def shown(source: str = "ci/id", **claims: object) -> Shown:
    body = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return Shown(f"e30.{body}.c2ln", source)


@pytest.mark.parametrize(
    ("rule", "wanted", "claims", "expected"),
    [
        (
            "token.aud",
            "arcbridge-relay",
            {"aud": "arcbridge-cluster"},
            'ci/id is for audience "arcbridge-cluster", the relay wants "arcbridge-relay"',
        ),
        ("token.aud", "r", {"aud": ["a", "b"]}, 'ci/id is for audience "a", "b", the relay wants "r"'),
        (
            "token.iss",
            "",
            {"iss": "https://elsewhere"},
            'ci/id comes from the issuer "https://elsewhere", which the relay does not accept',
        ),
        ("claims.rule", "hd", {}, 'the relay requires the claim "hd", which ci/id does not have'),
        ("claims.elsewhere", "roles", {}, 'reads the claim "roles", to which ci/id only points; have'),
        ("claims.username", "email", {}, 'the relay needs the claim "email"'),
        ("claims.username", "", {}, "ci/id lacks something that the relay requires of its users"),
        ("token.exp", "", {}, "ci/id has expired; log in again"),
        ("token.aud", "", {}, "ci/id is for another audience; have one issued for the relay"),
        ("token.aud.forbidden", "", {}, "ci/id is good at another place as well"),
        ("proof.missing", "", {}, "the token is bound to a key and came without a proof of it"),
    ],
)
def test_a_refused_token_is_explained_from_the_token_itself(
    rule: str, wanted: str, claims: dict[str, object], expected: str
) -> None:
    refusal = read_refusal(rule, wanted)
    error = JoinRefused(JoinCode.UNAUTHENTICATED, "FOREIGN", session="a7681c0e5b1f2d34", refusal=refusal)
    found = of_join(error, "prod", shown(**claims))
    assert isinstance(found, Unauthenticated)
    assert expected in found.message
    with pytest.raises(Unauthenticated) as raised:
        raise_user_error(error, "prod", shown=shown(**claims))
    assert raised.value.told() == f"{found.message} (session a7681c0e5b1f2d34)"
    assert "FOREIGN" not in found.message
    assert "e30." not in found.message, "never the token"


def test_a_token_without_a_file_and_an_agent_that_refuses() -> None:
    error = SessionEnded(GoawayCode.UNAUTHENTICATED, "words", refusal=read_refusal("token.aud", "cluster"))
    with pytest.raises(Unauthenticated) as raised:
        raise_user_error(error, "prod", shown=shown("", aud="relay"), session="a7681c0e5b1f2d34")
    assert raised.value.told() == (
        'cluster "prod" does not accept the token: the token is for audience "relay", its agent wants "cluster" '
        "(login.cluster_audience, ARCBRIDGE_CLUSTER_AUDIENCE) (session a7681c0e5b1f2d34)"
    )
    assert "the token names no audience" in of_session(error, "prod", shown("")).message


def test_what_a_token_says_cannot_move_the_terminal() -> None:
    error = JoinRefused(JoinCode.UNAUTHENTICATED, "words", refusal=read_refusal("token.iss"))
    assert "\x1b" not in of_join(error, "prod", shown(iss="https://x\x1b[2J")).message


@pytest.mark.parametrize("rule", ["", "token.alg", "token.new"])
def test_without_a_rule_that_helps_the_audience_is_shown(rule: str) -> None:
    error = JoinRefused(JoinCode.UNAUTHENTICATED, "words", refusal=read_refusal(rule))
    found = of_join(error, "prod", shown(aud="x"))
    words = "log in again, or put a new token there"
    assert found.message == f"the relay does not accept the access token (its audience is x); {words}"
    assert of_join(error, "prod").message == (f"the relay does not accept the access token; {words}")


def test_an_issuer_whose_keys_cannot_be_had_is_told() -> None:
    refusal = read_refusal("issuer.keys")
    by_relay, by_agent = JoinRefused(5, "words", refusal=refusal), SessionEnded(5, "words", refusal=refusal)
    by_relay.code, by_agent.code = JoinCode.INTERNAL, GoawayCode.UNAVAILABLE
    assert "keys of your login's issuer" in of_join(by_relay, "prod").message
    assert "keys of your login's issuer" in of_session(by_agent, "prod").message


def test_the_sentences_of_the_previous_version_are_understood() -> None:
    """`legacy_refusals` has them; this goes with it."""
    old = JoinRefused(JoinCode.UNAUTHENTICATED, 'not meant for this place (token.aud wants "relay")')
    assert 'the relay wants "relay"' in of_join(old, "prod", shown(aud="x")).message
    aged = SessionEnded(GoawayCode.EXPIRED, "a session lasts 12 h here at most; start again what ran in it")
    assert "greatest age" in of_session(aged, "prod").message


@pytest.mark.parametrize(("said", "obeyed"), [(None, 1), (5, 5), (10**9, 30)])
def test_a_relays_time_is_bounded(said: int | None, obeyed: int) -> None:
    assert of_join(JoinRefused(JoinCode.OVERLOADED, "", retry_after=said), "prod").retry_after == obeyed


def test_every_goaway_has_words() -> None:
    for code in GoawayCode:
        assert of_session(SessionEnded(code, "FOREIGN"), "prod").message
        shown = "FOREIGN" in of_session(SessionEnded(code, "FOREIGN"), "prod").message
        assert shown is (code is GoawayCode.REVOKED), "an operator's reason is for the user"
    refusal = read_refusal("groups.unavailable")
    refused = of_join(JoinRefused(JoinCode.INTERNAL, "FOREIGN", refusal=refusal), "prod")
    assert refused.message.startswith("the relay cannot look up which groups you are in")
    assert "FOREIGN" not in refused.message
    said = "the groups of this login cannot be looked up now: Microsoft Graph is busy; try again shortly"
    groups = of_session(SessionEnded(GoawayCode.UNAVAILABLE, said, refusal=refusal), "prod")
    assert groups.message == f'cluster "prod": {said}'
    assert (groups.status_code, groups.retry_after) == (503, None)
    limit = of_session(SessionEnded(GoawayCode.LIMIT, "9 sessions"), "prod")
    assert (limit.status_code, limit.reason, limit.retry_after) == (429, "TooManyRequests", 1)
    lost = of_session(ConnectionLost("found silent"), "prod")
    assert (lost.status_code, lost.retry_after) == (503, 1)
    other = PinMismatch("p")
    assert of_session(other, "prod") is other
    broken = of_session(RemoteProtocolError("the other end broke the protocol: a second HELLO"), "prod")
    assert (broken.status_code, broken.message) == (
        503,
        'the session with cluster "prod" ended: the other end broke the protocol: a second HELLO',
    )
    crossed = of_session(SessionEnded(GoawayCode.CROSSED, "FOREIGN"), "prod")
    assert "came for another user" in crossed.message


def test_v14_the_words_of_a_revocation_are_one_clean_line() -> None:
    said = "access was revoked: the relay's operator says \"left\"; ask the relay's operator for access"
    found = of_session(SessionEnded(GoawayCode.REVOKED, said), "prod")
    assert (found.status_code, found.reason, found.retry_after) == (403, "Forbidden", None)
    assert found.message == f'cluster "prod": {said}'
    odd = of_session(SessionEnded(GoawayCode.REVOKED, "a\x1b[2J\nb" + "x" * 5000), "prod")
    assert odd.message.isprintable()
    assert len(odd.message) < SAID_LIMIT + 100


def test_a_session_that_was_too_old_is_no_login_that_failed() -> None:
    """What comes next is tried at once, with the token that is there (docs/threats.md#V16)."""
    aged = SessionEnded(GoawayCode.EXPIRED, "words", refusal=read_refusal("session.age"))
    found = of_session(aged, "prod")
    assert (found.status_code, found.retry_after) == (503, 1)
    assert "greatest age" in found.message
    assert "log in again" in found.message
    assert of_session(SessionEnded(GoawayCode.EXPIRED, "the token has expired"), "prod").status_code == 401


@pytest.mark.parametrize(
    ("error", "cause", "unanswered"),
    [
        (Unreachable("cannot reach relay:443"), OSError(), True),
        (Unreachable("cannot reach relay:443"), None, True),
        (Unreachable("the agent is not connected"), JoinRefused(JoinCode.NO_INSTANCE, ""), False),
        (Unreachable("no agent is connected"), JoinRefused(JoinCode.NO_AGENT, ""), False),
    ],
)
def test_whether_any_relay_has_answered(error: Unreachable, cause: Exception | None, unanswered: bool) -> None:
    error.__cause__ = cause
    assert is_unanswered(error) is unanswered


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (JoinReply(rule="policy.rule", groups="a\nb", more_groups=2), '(known groups: "a", "b"; 2 more came)'),
        (JoinReply(rule="policy.rule"), "(known groups: none)"),
        (
            JoinReply(rule="policy.rule", wanted="roles"),
            '(the relay takes your groups from the claim "roles", which your token does not have)',
        ),
        (JoinReply(rule="policy.rule", wanted='r"\x1b', groups="\x1b"), "(known groups: none; 1 more came)"),
        # An older relay says nothing of it.
        (JoinReply(), "ask the relay's operator for access"),
    ],
)
def test_whom_the_policy_refuses_reads_which_groups_came(reply: JoinReply, expected: str) -> None:
    refusal = read_refusal(reply.rule, reply.wanted, reply.groups, reply.more_groups)
    found = of_join(JoinRefused(JoinCode.FORBIDDEN, "FOREIGN", refusal=refusal), "prod")
    assert found.message.startswith('cluster "prod" does not exist or you may not reach it; ask the relay')
    assert found.message.endswith(expected)


def test_a_cause_that_names_its_cure_gets_no_other_one() -> None:
    found = []
    for cause in (
        OSError(errno.ECONNREFUSED, "refused"),
        OSError(errno.EMFILE, "none left"),
        CredentialsMissing("x"),
        ProxyRefused("x"),
    ):
        error = Unreachable("cannot reach relay.test:443")
        error.detail, error.__cause__ = "why", cause
        found.append(relay_unreachable("https://relay.test", error).message)
    why = "the relay https://relay.test cannot be reached (why)"
    assert found == [f"{why}; check its address and this machine's network", why, why, why]
