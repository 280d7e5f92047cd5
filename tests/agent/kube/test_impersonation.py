"""From any headers and an identity to exactly the headers that may leave, or a refusal (docs/threats.md#H1,
docs/threats.md#H2, docs/threats.md#H4).
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.agent.kube.impersonation import (
    Subject,
    check_impersonated,
    cleaned_headers,
    impersonated_headers,
    own_token_headers,
    passed_lines,
    requested_subject,
)
from arcbridge.agent.kube.request_facts import RequestFacts, read_facts
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.http_fields import HOP_BY_HOP
from arcbridge.identity.claims import Identity

ALICE = Subject("alice", "u-1", ("dev", "ops"), (("example.com/Scopes".lower(), "a"), ("example.com/scopes", "b")))
OURS = [
    ("Authorization", "Bearer agent"), ("Impersonate-User", "alice"), ("Impersonate-Uid", "u-1"),
    ("Impersonate-Group", "dev"), ("Impersonate-Group", "ops"), ("Impersonate-Extra-example.com%2Fscopes", "a"),
    ("Impersonate-Extra-example.com%2Fscopes", "b"),
]  # fmt: skip


def raw(*lines: tuple[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in lines]


def facts(*lines: tuple[str, str]) -> RequestFacts:
    return read_facts("GET", "/", raw(*lines))


def built(*lines: tuple[str, str], subject: Subject = ALICE) -> list[tuple[str, str]]:
    return impersonated_headers(cleaned_headers(facts(*lines)), subject, authorization="Bearer agent")


DROPPED = [
    "Impersonate-User", "impersonate-user", "IMPERSONATE-USER", "iMpErSoNaTe-UsEr", "Impersonate-Group",
    "Impersonate-Uid", "Impersonate-UID", "Impersonate-Extra-Scopes", "Impersonate-Extra-", "Impersonate-Extra",
    "Impersonate-Future", "Impersonate-", "impersonate-user-name", "Authorization", "authorization", "AUTHORIZATION",
    "Proxy-Authorization", "Proxy-Anything", "X-Remote-User", "X-Remote-Group", "x-remote-extra-scopes",
    "X-Forwarded-For", "X-Forwarded-Host", "x-forwarded-user", "Forwarded", "X-Real-Ip", "Audit-ID", "Host",
    "Content-Length", "Expect", *sorted(HOP_BY_HOP),
]  # fmt: skip


@pytest.mark.parametrize("name", DROPPED)
def test_h1_dropped_whatever_the_spelling(name: str) -> None:
    assert built((name, "root")) == OURS
    assert built((name, "a"), (name, "b"), ("Accept", "x")) == [("Accept", "x"), *OURS]


REFUSED = [
    ("Impersonate_User", "root"), ("impersonate-user_", "root"), ("X_Y", "1"), ("Impersonate-User ", "root"),
    (" Impersonate-User", "root"), ("Impersonate-User\t", "root"), ("Impersonate\x00-User", "root"),
    ("Impersonate-Us\xe9r", "root"), ("Impersonate User", "root"), ("", "root"), ("X", "a\r\nImpersonate-User: root"),
    ("X", "a\nb"), ("X", "a\rb"), ("X", "a\x00b"), ("X", "a\x0bb"), ("X", "a\x7fb"), ("X", "\xff\xfe"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=range(len(REFUSED)))
def test_h1_refused_because_parsers_differ(name: str, value: str) -> None:
    with pytest.raises(RequestRefusal) as caught:
        built((name, value))
    assert caught.value.status_code == 400
    assert "root" not in caught.value.message


KEPT = [
    ("X-Impersonate-User", "someone"), ("Not-Impersonate-User", "someone"), ("User-Agent", "kubectl"),
    ("Kubectl-Session", "x"), ("Sec-WebSocket-Protocol", "v5.channel.k8s.io"), ("traceparent", "00-1-2-01"),
    ("If-None-Match", '"x"'), ("Warning", "m\u00c3\u00bcller"), ("Empty", ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), KEPT)
def test_negative_other_headers_pass(name: str, value: str) -> None:
    expected = value.encode("latin-1").decode("utf-8")
    assert built((name, value)) == [(name, expected), *OURS]


def test_repeats_keep_their_order() -> None:
    headers = built(("X-Stream-Protocol-Version", "v5"), ("Accept", "a"), ("x-stream-protocol-version", "v4"))
    assert headers[:3] == [("X-Stream-Protocol-Version", "v5"), ("Accept", "a"), ("x-stream-protocol-version", "v4")]


@pytest.mark.parametrize("carrier", ["Connection", "connection", "Proxy-Connection", "Keep-Alive", "TE", "Trailer"])
@pytest.mark.parametrize("name", [name for name, _ in OURS])
def test_h2_ours_survive_being_named_hop_by_hop(carrier: str, name: str) -> None:
    assert built((carrier, f"close, {name}"), (carrier, name.lower())) == OURS


def test_h2_what_connection_names_goes() -> None:
    assert built(("Connection", "X-Drop ,x-other"), ("X-Drop", "1"), ("X-Other", "2"), ("X-Stay", "3")) == [
        ("X-Stay", "3"),
        *OURS,
    ]


BAD_SUBJECTS = [
    Subject(""), Subject(" alice"), Subject("alice "), Subject("a\r\nb"), Subject("a\x00b"),
    Subject("alice", groups=("a\nb",)), Subject("alice", uid="\n"), Subject("alice", extra=(("key", "a\rb"),)),
]  # fmt: skip


@pytest.mark.parametrize("subject", BAD_SUBJECTS, ids=range(len(BAD_SUBJECTS)))
def test_h4_a_subject_that_cannot_be_said_in_headers_fails_closed(subject: Subject) -> None:
    with pytest.raises(RequestRefusal) as caught:
        built(subject=subject)
    assert caught.value.status_code == 500


LOST = [
    [], [("Impersonate-Group", "dev")], [("Impersonate-User", "alice"), ("Impersonate-User", "alice")],
    [("Impersonate-User", "alice"), ("impersonate-user", "root")], [("Impersonate-User", "bob")],
    [("Impersonate-User", "alice"), ("Impersonate-Group", "dev")],
    [("Impersonate-User", "alice"), ("Impersonate-Uid", "x")],
    [("Impersonate-User", "alice"), ("Impersonate-Extra-a", "b")],
    [("Impersonate-User", "alice"), ("Impersonate-New", "b")],
    [("Impersonate-User", "alice"), ("Impersonate_User", "b")],
    [("Impersonate-User", "alice"), ("X", "a\nImpersonate-User: root")],
]  # fmt: skip


@pytest.mark.parametrize("headers", LOST, ids=range(len(LOST)))
def test_a_result_that_is_not_what_was_meant_never_leaves(headers: list[tuple[str, str]]) -> None:
    with pytest.raises(RequestRefusal) as caught:
        check_impersonated(headers, Subject("alice"))
    assert caught.value.status_code == 500


def test_a_plain_subject_passes_its_check() -> None:
    check_impersonated([("Impersonate-User", "alice"), ("X", "y")], Subject("alice"))


@given(
    st.lists(st.tuples(st.binary(max_size=30), st.binary(max_size=30)), max_size=10),
    st.text(min_size=1, max_size=20),
    st.lists(st.text(max_size=20), max_size=4),
    st.lists(st.tuples(st.text(min_size=1, max_size=10), st.text(max_size=10)), max_size=3),
)
def test_any_headers_any_identity(
    inbound: list[tuple[bytes, bytes]], user: str, groups: list[str], extra: list[tuple[str, str]]
) -> None:
    """docs/security.md: a request leaves with exactly one Impersonate-User and exactly the groups, or not at all."""
    identity = Identity(user, "", tuple(groups), "s", "i", 0.0, {key: (value,) for key, value in extra})
    subject = Subject.of(identity)
    try:
        headers = impersonated_headers(cleaned_headers(read_facts("GET", "/", inbound)), subject)
    except RequestRefusal:
        return
    assert b"\r\nimpersonate" not in b"\r\n" + passed_lines(read_facts("GET", "/", inbound)).lower()
    assert [v for n, v in headers if n.lower() == "impersonate-user"] == [user]
    assert [v for n, v in headers if n.lower() == "impersonate-group"] == groups
    assert not any(n.lower() in HOP_BY_HOP or "\n" in v or "\r" in v for n, v in headers)


@given(st.text(alphabet=st.characters(codec="utf-8"), min_size=1, max_size=30))
def test_h4_extra_keys_survive_a_round_trip(key: str) -> None:
    subject = Subject("alice", extra=((key.lower(), "v"),))
    try:
        (name,) = [n for n, _ in impersonated_headers([], subject) if "Extra" in n]
        assert name.isascii()
        found = requested_subject([("impersonate-user", "a"), (name.lower(), "v")])
    except RequestRefusal:  # a key of blanks or control characters is refused on either way
        assert not key.strip() or not key.isprintable()
        return
    assert found.extra == ((key.lower(), "v"),)


# -- what --as asks for ---------------------------------------------------------------------------------------------


def test_a_request_without_impersonation() -> None:
    found = facts(("Accept", "x"), ("X-Impersonate-User", "y"))
    assert requested_subject(found.impersonation) is None


def test_everything_asked_for() -> None:
    asked = requested_subject(
        facts(
            ("impersonate-user", "bob"),
            ("IMPERSONATE-GROUP", "g1"),
            ("Impersonate-Uid", "u"),
            ("Impersonate-Group", "g2"),
            ("Impersonate-Extra-Example.com%2Fa", "1"),
            ("Connection", "impersonate-user"),
        ).impersonation
    )
    assert asked == Subject("bob", "u", ("g1", "g2"), (("example.com/a", "1"),))


INCOMPLETE = [
    [("Impersonate-Group", "g")], [("Impersonate-Uid", "u")], [("Impersonate-Extra-a", "b")],
    [("Impersonate-User", "")], [("Impersonate-User", "a"), ("Impersonate-User", "b")],
    [("Impersonate-User", "a"), ("Impersonate-Uid", "b"), ("Impersonate-Uid", "c")],
    [("Impersonate-User", "a"), ("Impersonate-Group", "")], [("Impersonate-User", "a"), ("Impersonate-Extra-", "b")],
    [("Impersonate-User", "a"), ("Impersonate-Extra-%zz", "b")],
    [("Impersonate-User", "a"), ("Impersonate-Extra-%ff", "b")],
    [("Impersonate-User", "a"), ("Impersonate-Extra-%0a", "b")],
    [("Impersonate-User", "a"), ("Impersonate-Extra-arcbridge.io%2Foriginal-user", "b")],
    [("Impersonate-User", "a"), ("Impersonate-Extra-arcbridge.io%2FActor", "b")],
    [("Impersonate-User", "a"), ("Impersonate-Future", "b")],
]  # fmt: skip


@pytest.mark.parametrize("lines", INCOMPLETE, ids=range(len(INCOMPLETE)))
def test_what_is_incomplete_is_refused_and_never_ignored(lines: list[tuple[str, str]]) -> None:
    with pytest.raises(RequestRefusal) as caught:
        requested_subject(facts(*lines).impersonation)
    assert caught.value.status_code == 400


# -- token mode -----------------------------------------------------------------------------------------------------


def test_the_own_token_and_as_go_on_unchanged() -> None:
    headers = own_token_headers(
        facts(
            ("authorization", "Bearer abc"),
            ("Impersonate-User", "bob"),
            ("Connection", "Authorization, Impersonate-User, X"),
            ("X", "1"),
            ("X-Remote-User", "root"),
        )
    )
    assert headers == [("authorization", "Bearer abc"), ("Impersonate-User", "bob")]


NO_TOKEN = [[], [""], ["Bearer"], ["Bearer "], ["Basic abc"], ["Bearer a b"], ["Bearer a", "Bearer b"], ["bearera"]]


@pytest.mark.parametrize("values", NO_TOKEN, ids=range(len(NO_TOKEN)))
def test_without_exactly_one_token_it_is_a_401(values: list[str]) -> None:
    with pytest.raises(RequestRefusal) as caught:
        own_token_headers(facts(*(("Authorization", value) for value in values)))
    assert caught.value.status_code == 401
