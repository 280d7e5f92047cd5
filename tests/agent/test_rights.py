"""The rights that an authentication file's mappings need, and what is said of one that is missing."""

from __future__ import annotations

import json

import pytest

from arcbridge.agent import self_checks as looks
from arcbridge.agent.kube.apiserver import ApiServer
from arcbridge.agent.rights import ACCESS
from arcbridge.checks.diagnosis import FindingState
from arcbridge.identity.authentication import parse
from tests.support.fake_apiserver import Exchange, FakeApiServer, reply

from .test_self_checks import AGENT, AUTHENTICATION, CONSTRAINED, has_rules, one, rule

MAPPED = """\
kind: AuthenticationConfiguration
apiVersion: apiserver.config.k8s.io/v1
jwt:
- issuer: {url: https://one.example.org, audiences: [a]}
  claimMappings:
    username: {claim: sub, prefix: ""}
    uid: {claim: sub}
    extra: [{key: example.org/tenant, valueExpression: claims.tenant}]
"""
OTHER = """\
- issuer: {url: https://two.example.org, audiences: [a]}
  claimMappings: {username: {claim: sub, prefix: ""}}
"""
BOTH = ("uids", "userextras/example.org/tenant")


@pytest.mark.parametrize("verb", ["impersonate", "impersonate:user-info"])
@pytest.mark.parametrize(
    ("given", "granted", "issuers", "state", "missing"),
    [
        pytest.param(BOTH, (), MAPPED, FindingState.OK, "", id="all"),
        pytest.param((), BOTH, MAPPED, FindingState.OK, "", id="all by another authorizer"),
        pytest.param(BOTH[1:], (), MAPPED, FindingState.FAILED, "uids", id="no uid"),
        pytest.param(BOTH[:1], (), MAPPED, FindingState.FAILED, "userextras/example.org/tenant", id="no extra"),
        pytest.param(BOTH[1:], (), MAPPED + OTHER, FindingState.WARNING, "uids", id="of one issuer"),
    ],
)
async def test_the_rights_that_the_mappings_need(
    fake: FakeApiServer,
    api: ApiServer,
    verb: str,
    given: tuple[str, ...],
    granted: tuple[str, ...],
    issuers: str,
    state: FindingState,
    missing: str,
) -> None:
    """What is missing is said as the API server says it, with the field that sends it and the verb of this mode."""
    api.upstream.own_refusals.user = AGENT
    group = AUTHENTICATION if verb != "impersonate" else ""
    has_rules(fake, [rule(verb, "users", "groups", group=group), rule(verb, *given, group=AUTHENTICATION),
                     CONSTRAINED[1]])  # fmt: skip

    async def review(exchange: Exchange) -> None:
        asked = json.loads(exchange.request.body)["spec"]["resourceAttributes"]
        assert (asked["group"], asked["verb"]) == (AUTHENTICATION, verb)
        name = "/".join(filter(None, (asked["resource"], asked.get("subresource"))))
        await exchange.send(reply(201, json.dumps({"status": {"allowed": name in granted}}).encode()))

    fake.routes[ACCESS] = review
    found = await looks.look_at_impersonation(api, parse(issuers))
    assert one(found) == (state, "impersonation_attributes" if missing else "")
    if missing:
        where = f'in API group "{AUTHENTICATION}" at the cluster scope'
        words = f'User "{AGENT}" cannot {verb} resource "{missing}" {where}'
        assert words in found.detail
        assert "jwt[0].claimMappings." in found.detail
        # A user of the other issuer may be refused for something else.
        assert api.upstream.own_refusals.lacking == ((missing, words) if state is FindingState.FAILED else None)
