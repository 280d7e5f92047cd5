"""Each look at the API server, with answers as Kubernetes gives them; and when an agent is unready."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme

from arcbridge.agent import self_checks as looks
from arcbridge.agent.authenticator import REVIEW
from arcbridge.agent.kube.apiserver import ApiServer, endpoint_of
from arcbridge.agent.kube.own_credential import POD_CERTIFICATE
from arcbridge.agent.rights import ACCESS
from arcbridge.agent.self_checks import checks_of
from arcbridge.checks.diagnosis import Finding, FindingState
from arcbridge.checks.self_checks import AGENT_CHECKS
from arcbridge.identity.authentication import AuthenticationConfig, parse
from arcbridge.identity.groups import GroupSources
from arcbridge.identity.verifier import TokenVerifier
from arcbridge.net.fetch import HttpFetcher
from arcbridge.settings.config import AgentConfig, GraphConfig
from tests.identity import issuer as issuing
from tests.support.fake_apiserver import FakeApiServer, reply

AGENT = "system:serviceaccount:arcbridge:arcbridge-agent"


def one(finding: Finding) -> tuple[FindingState, str]:
    assert (finding.code == "") == (finding.state in (FindingState.OK, FindingState.SKIPPED))
    assert finding.remedy or not finding.code
    return finding.state, finding.code


async def test_the_api_server_answers(api: ApiServer) -> None:
    assert one(await looks.look_at_api_server(api)) == (FindingState.OK, "")


async def test_another_port(config: AgentConfig) -> None:
    api = ApiServer(endpoint_of(replace(config.kubernetes, server="https://127.0.0.1:1"), {}))
    assert one(await looks.look_at_api_server(api)) == (FindingState.FAILED, "api_unreachable")
    assert one(await looks.look_at_credential(api)) == (FindingState.SKIPPED, "")
    assert one(await looks.look_at_impersonation(api, NO_ISSUER)) == (FindingState.SKIPPED, "")
    await api.close()


async def test_another_ca(config: AgentConfig, tmp_path: Path) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.crt"))
    api = ApiServer(endpoint_of(replace(config.kubernetes, ca_file=tmp_path / "other.crt"), {}))
    assert one(await looks.look_at_api_server(api)) == (FindingState.FAILED, "api_ca")
    await api.close()


@pytest.mark.parametrize(
    ("code", "user", "expected"),
    [
        (201, AGENT, (FindingState.OK, "")),
        (201, "system:anonymous", (FindingState.FAILED, "agent_credential")),
        (401, "", (FindingState.FAILED, "agent_credential")),
        (404, "", (FindingState.WARNING, "review")),
        (201, "", (FindingState.WARNING, "review")),
    ],
)
async def test_the_agents_own_credential(
    fake: FakeApiServer, api: ApiServer, code: int, user: str, expected: tuple[FindingState, str]
) -> None:
    body = {"status": {"userInfo": {"username": user}}} if user else {}
    fake.routes[REVIEW] = reply(code, json.dumps(body).encode())
    assert one(await looks.look_at_credential(api)) == expected
    assert api.upstream.own_refusals.user == (AGENT if expected[0] is FindingState.OK else "")


@pytest.mark.parametrize(
    ("validity", "detail", "expected"),
    [
        (None, "the agent is anna, by a token", (FindingState.OK, "")),
        ((0, 86400), "the agent is anna, by a token that ends in 23 h (1970-01-02T00:00:00Z)", (FindingState.OK, "")),
        ((-78000, 8400), "and was not renewed", (FindingState.WARNING, "credential_renewal")),
        # Of a long life a tenth would be weeks.
        ((-8640000, 7200 + 86400), "", (FindingState.OK, "")),
        ((-8640000, 3600), "", (FindingState.WARNING, "credential_renewal")),
    ],
)
def test_the_credential_and_its_end(
    validity: tuple[float, float] | None, detail: str, expected: tuple[FindingState, str]
) -> None:
    found = looks.credential_finding("anna", "a token", validity, 3600.0)
    assert one(found) == expected
    assert detail in found.detail


def test_a_pods_certificate_may_be_renewed_as_late_as_its_signer_says() -> None:
    """The latest time that an API server takes is ten minutes before the end: of a day, not 2.4 hours."""
    for left, state in ((3600, FindingState.OK), (590, FindingState.OK), (290, FindingState.WARNING)):
        found = looks.credential_finding("anna", POD_CERTIFICATE, (0, 86400), 86400.0 - left)
        assert one(found)[0] is state


NO_ISSUER = AuthenticationConfig(())
AUTHENTICATION = "authentication.k8s.io"


def rule(verb: str, *resources: str, group: str = "") -> dict[str, list[str]]:
    return {"verbs": [verb], "resources": list(resources), "apiGroups": [group], "resourceNames": ["alice"]}


CONSTRAINED = [
    rule("impersonate:user-info", "users", "groups", group=AUTHENTICATION),
    rule("impersonate-on:user-info:get", "*", group="*"),
]


@pytest.mark.parametrize(
    ("rules", "incomplete", "expected"),
    [
        pytest.param([rule("impersonate", "users", "groups")], False, (FindingState.OK, ""), id="legacy"),
        pytest.param(CONSTRAINED, False, (FindingState.OK, ""), id="constrained"),
        pytest.param(CONSTRAINED[:1], False, (FindingState.FAILED, "impersonation_verbs"), id="for nothing"),
        pytest.param(
            [rule("impersonate:user-info", "users", "groups")], False, (FindingState.FAILED, "impersonation"), id="name"
        ),
        pytest.param([rule("*", "*")], False, (FindingState.OK, ""), id="everything"),
        pytest.param(
            [rule("impersonate", "users")], False, (FindingState.WARNING, "impersonation_groups"), id="no group"
        ),
        pytest.param(
            [rule("get", "users", "groups")], False, (FindingState.FAILED, "impersonation"), id="another verb"
        ),
        pytest.param([], False, (FindingState.FAILED, "impersonation"), id="none"),
        pytest.param([], True, (FindingState.WARNING, "impersonation_unknown"), id="another authorizer"),
        pytest.param(None, False, (FindingState.WARNING, "review"), id="no answer"),
    ],
)
async def test_the_right_to_impersonate(
    fake: FakeApiServer, api: ApiServer, rules: object, incomplete: bool, expected: tuple[FindingState, str]
) -> None:
    has_rules(fake, rules, incomplete=incomplete)
    assert one(await looks.look_at_impersonation(api, NO_ISSUER)) == expected


def has_rules(
    fake: FakeApiServer, rules: object, *, incomplete: bool = False, extras: Sequence[str] = ("restricted", "actor")
) -> None:
    """`extras`: the keys of the agent's own which the rules give besides."""
    if isinstance(rules, list):
        resources = [f"userextras/arcbridge.io/{key}" for key in extras]
        verbs = ("impersonate", "impersonate:user-info")
        rules = [*rules, *(rule(one, *resources, group=AUTHENTICATION) for one in verbs if resources)]
    status = {"resourceRules": rules, "incomplete": incomplete}
    fake.routes[looks.RULES] = reply(201, json.dumps({"status": status}).encode())


@pytest.mark.parametrize("rules", [[rule("impersonate", "users", "groups")], CONSTRAINED])
@pytest.mark.parametrize(
    ("extras", "lacks"), [((), "restricted"), (("actor",), "restricted"), (("restricted",), "actor")]
)
async def test_rules_of_an_agent_that_knew_no_restricted_sessions_or_no_actors(
    fake: FakeApiServer, api: ApiServer, rules: list[object], extras: tuple[str, ...], lacks: str
) -> None:
    """A warning: all other sessions work, and none of these needs it."""
    has_rules(fake, rules, extras=extras)
    found = await looks.look_at_impersonation(api, NO_ISSUER)
    assert one(found) == (FindingState.WARNING, f"impersonation_{lacks}")
    assert f'resource "userextras/arcbridge.io/{lacks}" in API group "authentication.k8s.io"' in found.detail
    assert api.upstream.own_refusals.lacking is None
    fake.routes[ACCESS] = reply(201, b'{"status": {"allowed": true}}')
    assert one(await looks.look_at_impersonation(api, NO_ISSUER)) == (FindingState.OK, "")


async def test_users_whom_no_rule_names(fake: FakeApiServer, api: ApiServer) -> None:
    rules = [rule("impersonate", "users", "groups")]
    fake.routes[looks.RULES] = reply(201, json.dumps({"status": {"resourceRules": rules}}).encode())
    api.upstream.own_refusals.sentence = "the API server's words"
    found = await looks.look_at_impersonation(api, NO_ISSUER, lambda: 3)
    assert one(found) == (FindingState.WARNING, "impersonation_users")
    assert found.detail.endswith(": the API server's words")


async def test_refusals_while_a_right_was_missing_are_over_once_it_is_given(
    fake: FakeApiServer, api: ApiServer
) -> None:
    backlog = [4, 0]
    has_rules(fake, [rule("impersonate", "users")])
    found = await looks.look_at_impersonation(api, NO_ISSUER, lambda: backlog.pop(0))
    assert one(found) == (FindingState.WARNING, "impersonation_groups")
    has_rules(fake, [rule("impersonate", "users", "groups")])
    found = await looks.look_at_impersonation(api, NO_ISSUER, lambda: backlog.pop(0))
    assert one(found) == (FindingState.OK, "")


async def test_files_that_cannot_be_read_again(fake: FakeApiServer, api: ApiServer) -> None:
    assert one(await looks.look_at_reload(api)) == (FindingState.OK, "")
    fake.token_file.write_text("two words")
    api.reread()
    assert one(await looks.look_at_reload(api)) == (FindingState.FAILED, "reload")
    fake.token_file.write_text("word")
    api.reread()
    assert one(await looks.look_at_reload(api)) == (FindingState.OK, "")


@pytest.mark.parametrize("token_mode", [True, False])
async def test_an_agent_that_can_verify_no_token_is_unready_unless_it_takes_others(token_mode: bool) -> None:
    fetcher = HttpFetcher()
    verifier = TokenVerifier(parse(issuing.CONFIG.replace(issuing.URL, "https://127.0.0.1:1")), fetcher)
    check = looks.issuers_check(verifier, token_mode=lambda: token_mode)
    (found,) = await check.look()
    assert (found.state, found.code) == (FindingState.FAILED, "issuer_unreachable")
    assert callable(check.gates)
    assert check.gates() is not token_mode
    await verifier.close()
    await fetcher.close()


async def test_a_directory_that_cannot_be_asked_fails_and_gates_nothing(tmp_path: Path) -> None:
    fetcher, issuers = HttpFetcher(), parse(issuing.CONFIG)
    (tmp_path / "secret").write_text("word")
    graph = GraphConfig(
        (issuing.URL,),
        "11111111-1111-1111-1111-111111111111",
        "reader",
        client_secret_file=tmp_path / "secret",
        token_endpoint="https://127.0.0.1:1/token",
    )
    # A clock that stands: a failure is remembered for seconds.
    groups = GroupSources(fetcher.ask, directories={"example": graph}, monotonic=lambda: 0.0)
    verifier = TokenVerifier(issuers, fetcher, groups=groups)
    (check,) = looks.groups_checks(verifier)
    assert check.gates is False
    assert one(*await check.look()) == (FindingState.FAILED, "graph_unreachable")
    assert one(*await check.look()) == (FindingState.FAILED, "graph_unreachable")
    assert verifier.graph_tokens() == {"granted": 0, "failed": 1}, "it is not asked again by each look"
    assert looks.groups_checks(TokenVerifier(issuers, fetcher)) == looks.groups_checks(None) == []
    await verifier.close()
    await fetcher.close()


@pytest.mark.parametrize(
    ("life", "left", "state"),
    [(90, 60, FindingState.OK), (90, 0.9, FindingState.FAILED), (1, 0.2, FindingState.OK), (7, 0, FindingState.FAILED)],
)
def test_the_certificates_end(life: float, left: float, state: FindingState) -> None:
    day = 86400.0
    assert looks.certificate_finding((left - life) * day, left * day, 0.0).state is state


def test_a_relay_knows_the_names_of_all_checks() -> None:
    parts: Any = SimpleNamespace(
        api=SimpleNamespace(upstream=SimpleNamespace(own_refusals=SimpleNamespace(counts={"impersonation": 0}))),
        verifier=SimpleNamespace(has_directories=True),
        sessions=SimpleNamespace(audit=None, elevation=SimpleNamespace()),
        control=None,
        keeper=None,
    )
    assert tuple(check.name for check in checks_of(parts)) == AGENT_CHECKS
