"""What is about the agent and what is about the caller, and that no caller is blamed for the agent."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from arcbridge.agent.kube.own_refusal import MOST, SENTENCE, OwnRefusals
from arcbridge.agent.kube.status import status_body
from tests.support.fake_apiserver import chunked, closing, reply

from .bench import Bench

AGENT = "system:serviceaccount:arcbridge:arcbridge-agent"
PATH = "/api/v1/namespaces/default/pods"


def status(message: str, code: int = 403) -> bytes:
    return json.dumps({"kind": "Status", "apiVersion": "v1", "message": message, "code": code}).encode()


def protobuf(message: str, behind: str = "") -> bytes:
    """As the API server sends a Status in protobuf, with what stands behind the message."""
    text, details = message.encode(), behind.encode()
    size = bytes([len(text) & 127 | 128, len(text) >> 7]) if len(text) > 127 else bytes([len(text)])
    begin = b"k8s\0\n\x0c\n\x02v1\x12\x06Status\x12\x80\x02\n\x06\n\0\x12\0\x1a\0\x12\x07Failure\x1a"
    return begin + size + text + b"\x22\x09Forbidden" + details


def answer(body: bytes, *, at: int | None = None) -> bytes:
    """As the agent holds it: chunked where `at` says where the first chunk ends."""
    if at is None:
        return reply(403, body)
    head = b"HTTP/1.1 403 Forbidden\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (at, body[:at], len(body) - at, body[at:])


def about(user: str, verb: str = "impersonate", resource: str = "users") -> str:
    """As the API server's `forbiddenMessage` has it."""
    return (
        f'{resource} "alice" is forbidden: User "{user}" cannot {verb} resource "{resource}" in API group "" at the '
        "cluster scope"
    )


@pytest.mark.parametrize(
    ("body", "own"),
    [
        pytest.param(status(about(AGENT)), True, id="legacy"),
        pytest.param(status(about(AGENT, "impersonate:user-info", "groups")), True, id="constrained"),
        pytest.param(protobuf(about(AGENT)), True, id="protobuf"),
        pytest.param(status(about("alice", "get", "pods")), False, id="caller"),
        pytest.param(status(about("alice")), False, id="another user"),
        pytest.param(b"", False, id="nothing"),
        pytest.param(b'forbidden: User "' + b"x" * 600 + b'" cannot impersonate resource "users"', False, id="long"),
    ],
)
def test_a_403_is_the_agents_where_its_own_user_may_not_impersonate(body: bytes, own: bool) -> None:
    refusals = OwnRefusals()
    refusals.user = AGENT
    noticed: list[str] = []
    refusals.noticed = noticed.append
    found = refusals.forbidden(answer(body))
    assert (found is not None) == own
    assert noticed == ["impersonation"] * own
    assert refusals.counts == {"credential": 0, "impersonation": int(own), "verb": 0}
    if found is not None:
        assert found.status_code == 502
        assert AGENT in found.message
        assert "tell the cluster's operator" in found.message
        assert len(found.message) < 250, "kubectl says it up to six times"


def quoted(text: str) -> str:
    """As Go's `%q` has it."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


CHOSEN = [
    f'x User "{AGENT}" cannot impersonate resource "users',
    f'users "x" is forbidden: User "{AGENT}" cannot impersonate resource "users" in API group "" at the cluster scope',
    f'forbidden: User "{AGENT}" cannot impersonate path "/',
    f'x\r\n1\r\nforbidden: User "{AGENT}" cannot impersonate resource "users"',
]


# The authorizer's words, and those of others that refuse with 403: a quota, and who may not grant a role's rights.
REFUSALS = [
    '{resource} {name} is forbidden: User "alice" cannot get resource {what} in API group {group} in the namespace '
    "{namespace}",
    "{resource} {name} is forbidden: exceeded quota: {name}",
    '{resource} {name} is forbidden: user "alice" (groups=["dev"]) is attempting to grant RBAC permissions',
    'admission webhook "w" denied the request: {resource} {name}',
]


@pytest.mark.parametrize("known", [AGENT, ""], ids=["known", "unknown"])
@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("place", ["name", "resource", "group", "namespace"])
def test_h41_no_name_that_a_caller_chose_makes_a_403_the_agents(
    place: str, refusal: str, chosen: str, known: str
) -> None:
    """The API server quotes a name and a namespace; before `is forbidden`, resource and group stand as they came."""
    parts = {"name": "p", "resource": "pods", "group": "", "namespace": "n", place: chosen}
    message = refusal.format(
        resource=".".join(filter(None, (parts["resource"], parts["group"]))),
        name=quoted(parts["name"]),
        what=quoted(parts["resource"]),
        group=quoted(parts["group"]),
        namespace=quoted(parts["namespace"]),
    )
    refusals = OwnRefusals()
    refusals.user = known
    for body in (status(message), protobuf(message, parts["name"] + parts["resource"])):
        for at in (None, *range(0, len(body), 7)):
            assert refusals.forbidden(answer(body, at=at)) is None


@pytest.mark.parametrize("name", ["alice", *CHOSEN])
@pytest.mark.parametrize("form", [status, protobuf])
def test_h41_the_agents_refusal_is_found_whatever_the_callers_name(name: str, form: Callable[[str], bytes]) -> None:
    refusals = OwnRefusals()
    refusals.user = AGENT
    body = form(about(AGENT).replace('"alice"', quoted(name)))
    for at in (None, *range(1, len(body))):
        found = refusals.forbidden(answer(body, at=at))
        assert f'its account {AGENT} lacks the right "impersonate" for users' in found.message


@pytest.mark.parametrize("what", ['resource "pods" in API group ""', 'path "/api"'])
def test_a_verb_that_the_agent_may_not_act_with(what: str) -> None:
    """As an API server of 1.36 says it, also where the agent has no right at all."""
    refusals = OwnRefusals()
    refusals.user = AGENT
    found = refusals.forbidden(answer(status(f'forbidden: User "{AGENT}" cannot impersonate-on:user-info:list {what}')))
    assert '"impersonate-on:user-info:list"' in found.message
    assert refusals.counts == {"credential": 0, "impersonation": 0, "verb": 1}


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        (("uids", f'User "{AGENT}" cannot impersonate resource "uids"'), 'right "impersonate" for uids;'),
        (None, "no rule names your user, or a group of yours"),
    ],
)
def test_an_agent_of_the_older_mode_is_not_said_to_lack_a_right_of_the_other(
    lacking: tuple[str, str] | None, words: str
) -> None:
    """An API server of 1.36 names the constrained verb, although the agent's rules are those of the older mode."""
    refusals = OwnRefusals()
    refusals.user, refusals.legacy, refusals.lacking = AGENT, True, lacking
    message = f'forbidden: User "{AGENT}" cannot impersonate-on:user-info:create resource "pods" in API group ""'
    found = refusals.forbidden(answer(status(message)))
    assert words in found.message + found.more
    assert "user-info" not in found.message + found.more
    assert found.more == f"By the agent's rules: {refusals.sentence}"
    assert lacking is None or refusals.sentence == lacking[1]
    assert refusals.counts == {"credential": 0, "impersonation": 1, "verb": 0}


@pytest.mark.parametrize("form", [status, protobuf])
def test_the_api_servers_own_sentence_is_repeated_within_a_bound(form: Callable[[str], bytes]) -> None:
    refusals = OwnRefusals()
    refusals.user = AGENT
    found = refusals.forbidden(answer(form(about(AGENT))))
    assert found.more == f"The API server: {about(AGENT)}"
    assert json.loads(status_body(found))["details"]["causes"][0]["message"] == found.more
    assert refusals.sentence == about(AGENT)
    refusals.forbidden(answer(form(about(AGENT).replace('"alice"', quoted("x" * 6000)))))
    assert len(refusals.sentence.encode()) <= SENTENCE


def test_before_the_agent_knows_its_own_name_the_words_alone_decide() -> None:
    assert OwnRefusals().forbidden(answer(status(about(AGENT)))) is not None
    assert OwnRefusals().forbidden(answer(status(about("alice", "get", "pods")))) is None


ENTRANCES = {
    "plain": f"GET {PATH} HTTP/1.1\nHost: k",
    "general": f"POST {PATH} HTTP/1.1\nHost: k\nContent-Length: 2",
    "upgrade": f"POST {PATH}/x/exec?command=id HTTP/1.1\nHost: k\nContent-Length: 0\nConnection: Upgrade\n"
    "Upgrade: SPDY/3.1\nX-Stream-Protocol-Version: v4.channel.k8s.io",
}


@pytest.mark.parametrize("entrance", ENTRANCES)
async def test_a_401_for_the_agents_credential_is_502_and_blames_no_user(bench: Bench, entrance: str) -> None:
    refused = reply(401, status("Unauthorized", 401), "WWW-Authenticate: Bearer")
    bench.api.routes[PATH] = bench.api.routes[f"{PATH}/x/exec"] = refused
    answer = await bench.ask(ENTRANCES[entrance], b"{}" if entrance == "general" else b"")
    assert answer.status == 502
    assert answer.header("www-authenticate") == []
    assert "not about your login" in answer.status_object["message"]
    record = (await bench.audit.wait(1))[-1]
    assert record.status == 502
    assert record.outcome == "refused"
    assert bench.proxy.api.upstream.own_refusals.counts["credential"] == 1


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("framing", [reply, chunked], ids=["length", "chunked"])
async def test_a_403_for_impersonation_is_502(bench: Bench, entrance: str, framing: object) -> None:
    assert callable(framing)
    bench.api.routes[PATH] = bench.api.routes[f"{PATH}/x/exec"] = framing(403, status(about(AGENT)))
    answer = await bench.ask(ENTRANCES[entrance], b"{}" if entrance == "general" else b"")
    assert answer.status == 502
    assert "may not act as you" in answer.status_object["message"]
    assert (await bench.audit.wait(1))[-1].bytes_down == 0


@pytest.mark.parametrize("entrance", ENTRANCES)
async def test_the_callers_own_403_passes_unchanged(bench: Bench, entrance: str) -> None:
    body = status(about("alice", "get", "pods"))
    bench.api.routes[PATH] = bench.api.routes[f"{PATH}/x/exec"] = reply(403, body)
    answer = await bench.ask(ENTRANCES[entrance], b"{}" if entrance == "general" else b"")
    assert (answer.status, answer.body) == (403, body)
    record = (await bench.audit.wait(1))[-1]
    assert (record.status, record.bytes_down) == (403, len(body))


async def test_a_long_403_is_not_kept_back_for_ever(bench: Bench) -> None:
    body = b"x" * (3 * MOST)
    bench.api.routes[PATH] = bench.api.routes[f"{PATH}/x/exec"] = reply(403, body)
    answer = await bench.get(PATH)
    assert (answer.status, answer.body) == (403, body)


async def test_a_403_that_breaks_off_is_not_passed_on_as_complete(bench: Bench) -> None:
    bench.api.routes[PATH] = closing(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 100\r\n\r\nhalf")
    assert (await bench.get(PATH)).status == 502
