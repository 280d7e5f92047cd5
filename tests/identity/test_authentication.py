"""AuthenticationConfiguration: what is read, and that everything else is refused by its path."""

from __future__ import annotations

from pathlib import Path

import pytest

from arcbridge.errors import ConfigError
from arcbridge.identity.authentication import load, parse

HEAD = "apiVersion: apiserver.config.k8s.io/v1\nkind: AuthenticationConfiguration\n"
FULL = (
    HEAD
    + """
jwt:
- issuer:
    url: https://issuer.example/realm
    discoveryURL: https://inside.example/.well-known/openid-configuration
    certificateAuthority: |
      -----BEGIN CERTIFICATE-----
      AAAA
      -----END CERTIFICATE-----
    audiences: [one, two]
    audienceMatchPolicy: MatchAny
  claimValidationRules:
  - claim: hd
    requiredValue: example.com
  claimMappings:
    username: {claim: email, prefix: ""}
    groups: {claim: groups, prefix: "oidc:"}
    uid: {claim: oid}
  userValidationRules:
  - expression: "!user.username.startsWith('system:')"
    message: username cannot use reserved system prefix
  - expression: "user.groups.all(group, !group.startsWith('system:'))"
"""
)
SMALL = (
    HEAD
    + """
jwt:
- issuer:
    url: https://issuer.example
    audiences: [one]
  claimMappings:
    username: {claim: sub, prefix: ""}
"""
)


def test_a_full_file_of_kube_apiserver() -> None:
    (issuer,) = parse(FULL).issuers
    assert issuer.url == "https://issuer.example/realm"
    assert issuer.discovery_url.startswith("https://inside.example/")
    assert issuer.ca_pem is not None
    assert issuer.audiences == ("one", "two")
    assert issuer.rules[0].required_value == "example.com"
    assert issuer.username.claim == "email"
    assert issuer.groups is not None
    assert issuer.groups.prefix == "oidc:"
    assert issuer.uid_claim == "oid"
    assert parse(FULL).issuer("https://issuer.example/realm") is not None
    assert parse(FULL).issuer("https://issuer.example/realm/") is None


BAD = [
    (SMALL.replace("/v1\n", "/v2\n"), "apiVersion: must be"),
    (SMALL.replace("kind: A", "kind: B"), "kind: must be"),
    (SMALL + "anonymous: {enabled: true}\n", "anonymous: "),
    (SMALL + "other: 1\n", "other: unknown field"),
    (HEAD, "jwt: at least one"),
    (HEAD + "jwt: {}\n", "jwt: must be a list"),
    (SMALL.replace("https://", "http://"), "jwt[0].issuer.url: must be an https URL"),
    (SMALL.replace("https://issuer", "https://u:p@issuer"), "jwt[0].issuer.url: must have no user information"),
    (SMALL.replace("issuer.example", "issuer.example?a=b"), "jwt[0].issuer.url: must have no user"),
    (SMALL.replace("issuer.example", "issuer.example#a"), "jwt[0].issuer.url"),
    (SMALL.replace("    url: https://issuer.example\n", ""), "jwt[0].issuer.url: missing"),
    (SMALL.replace("[one]", "[]"), "jwt[0].issuer.audiences: at least one"),
    (SMALL.replace("[one]", "[one, two]"), "jwt[0].issuer.audienceMatchPolicy"),
    (
        SMALL.replace("[one]", "[one, one]\n    audienceMatchPolicy: MatchAny"),
        "jwt[0].issuer.audiences[1]: is given twice",
    ),
    (SMALL.replace("[one]", '[""]'), "jwt[0].issuer.audiences[0]: must be"),
    (
        SMALL.replace("[one]", "[one]\n    discoveryURL: https://issuer.example/"),
        "jwt[0].issuer.discoveryURL: must differ",
    ),
    (SMALL.replace("[one]", "[one]\n    egressSelectorType: cluster"), "jwt[0].issuer.egressSelectorType"),
    (SMALL.replace("[one]", "[one]\n    certificateAuthority: x"), "jwt[0].issuer.certificateAuthority"),
    (SMALL.replace("[one]", "[one]\n    extra: x"), "jwt[0].issuer.extra: unknown field"),
    (SMALL.replace(', prefix: ""', ""), "jwt[0].claimMappings.username.prefix: must be given"),
    (SMALL.replace('{claim: sub, prefix: ""}', "{expression: claims.sub}"), "jwt[0].claimMappings.username.expression"),
    (
        SMALL.replace('    username: {claim: sub, prefix: ""}\n', "    groups: {claim: g, prefix: ''}\n"),
        "username: missing",
    ),
    (SMALL + "    groups: {expression: claims.g}\n", "jwt[0].claimMappings.groups.expression"),
    (SMALL + "    uid: {expression: claims.g}\n", "jwt[0].claimMappings.uid.expression"),
    (SMALL + "    uid: {claim: a, prefix: b}\n", "jwt[0].claimMappings.uid.prefix: unknown field"),
    (
        SMALL + "    extra: [{key: example.com/a, valueExpression: claims.a}]\n",
        "claimMappings.extra[0].valueExpression",
    ),
    (SMALL + "    other: 1\n", "jwt[0].claimMappings.other: unknown field"),
    (SMALL + "  claimValidationRules: [{expression: 'true'}]\n", "jwt[0].claimValidationRules[0].expression"),
    (
        SMALL + "  claimValidationRules: [{claim: a}, {claim: a}]\n",
        "jwt[0].claimValidationRules[1].claim: is given twice",
    ),
    (SMALL + "  claimValidationRules: [{claim: a, requiredValue: 7}]\n", "requiredValue: must be a string"),
    (SMALL + "  userValidationRules: [{expression: 'false'}]\n", "jwt[0].userValidationRules[0].expression"),
    (SMALL + "  userValidationRules: [{}]\n", "jwt[0].userValidationRules[0].expression: missing"),
    (SMALL + SMALL[len(HEAD) + 1 :].replace("jwt:\n", ""), "jwt[1].issuer.url: is given twice"),
    (SMALL + "  issuer: {}\n", "line 10: key 'issuer' is given twice"),
    (SMALL + "  1: {}\n", "a key must be a string"),
    ("a: [", "not valid YAML"),
    ("[]", "document: must be a mapping"),
    ("!!python/object/apply:os.system ['true']", "not valid YAML"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[row[1] for row in BAD])
def test_refused_by_path(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, source="auth.yaml")
    assert caught.value.message.startswith("auth.yaml: ")
    assert message in caught.value.message


def test_at_most_64_issuers() -> None:
    entry = (
        "- issuer: {url: https://i%d.example, audiences: [a]}\n  claimMappings: {username: {claim: sub, prefix: ''}}\n"
    )
    assert len(parse(HEAD + "jwt:\n" + "".join(entry % n for n in range(64))).issuers) == 64
    with pytest.raises(ConfigError, match="at most 64"):
        parse(HEAD + "jwt:\n" + "".join(entry % n for n in range(65)))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: the authentication configuration cannot be read"):
        load(tmp_path / "missing.yaml")


def test_json_is_yaml(tmp_path: Path) -> None:
    path = tmp_path / "auth.json"
    path.write_text(
        '{"apiVersion":"apiserver.config.k8s.io/v1","kind":"AuthenticationConfiguration","jwt":[{"issuer":'
        '{"url":"https://i.example","audiences":["a"]},"claimMappings":{"username":{"claim":"sub","prefix":""}}}]}'
    )
    assert load(path).issuers[0].url == "https://i.example"
