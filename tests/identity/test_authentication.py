"""AuthenticationConfiguration: what is read, and that everything else is refused by its path."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
import yaml

from arcbridge.errors import ConfigError
from arcbridge.identity import authentication
from arcbridge.identity.authentication import ClaimRule, PrefixedClaim, inspect, load, parse
from arcbridge.identity.cel.values import Claims

CA = (Path(__file__).parents[1] / "fuzz/corpus/certificate/p256").read_text()
HEAD = "apiVersion: apiserver.config.k8s.io/v1\nkind: AuthenticationConfiguration\n"
FULL = (
    HEAD
    + f"""
jwt:
- issuer:
    url: https://issuer.example/realm
    discoveryURL: https://inside.example/.well-known/openid-configuration
    certificateAuthority: |
{indent(CA, "      ")}
    audiences: [one, two]
    audienceMatchPolicy: MatchAny
  claimValidationRules:
  - claim: hd
    requiredValue: example.com
  claimMappings:
    username: {{claim: email, prefix: ""}}
    groups: {{claim: groups, prefix: "oidc:"}}
    uid: {{claim: oid}}
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
    assert issuer.username is not None
    assert issuer.username.claim == "email"
    assert issuer.expressions is None
    assert issuer.groups is not None
    assert issuer.groups.prefix == "oidc:"
    assert issuer.uid_claim == "oid"
    assert parse(FULL).issuer("https://issuer.example/realm") is not None
    assert parse(FULL).issuer("https://issuer.example/realm/") is None


# What is put behind SMALL, and the error.
ADDED = [
    ("anonymous: {enabled: true}", "anonymous: "),
    ("other: 1", "other: unknown field"),
    ("    uid: {claim: a, expression: claims.g}", "jwt[0].claimMappings.uid: claim and expression"),
    ("    uid: {claim: a, prefix: b}", "jwt[0].claimMappings.uid.prefix: unknown field"),
    ("    extra: [{key: example.com/a}]", "claimMappings.extra[0].valueExpression: missing"),
    ("    extra: [{valueExpression: claims.a}]", "claimMappings.extra[0].key: missing"),
    (
        "    extra: [{key: a.b/c, valueExpression: claims.a}, {key: a.b/c, valueExpression: claims.b}]",
        "extra[1].key: is given twice",
    ),
    ("    other: 1", "jwt[0].claimMappings.other: unknown field"),
    ("  claimValidationRules: [{}]", "jwt[0].claimValidationRules[0].claim: needs either"),
    ("  claimValidationRules: [{claim: a, expression: 'true'}]", "claimValidationRules[0].claim: needs either"),
    ("  claimValidationRules: [{claim: a, message: b}]", "claimValidationRules[0].message: belongs to"),
    ("  claimValidationRules: [{expression: 'true', requiredValue: b}]", "Rules[0].requiredValue: belongs to claim"),
    ("  claimValidationRules: [{expression: 'true'}, {expression: 'true'}]", "[1].expression: is given twice"),
    ("  claimValidationRules: [{claim: a}, {claim: a}]", "jwt[0].claimValidationRules[1].claim: is given twice"),
    ("  claimValidationRules: [{claim: a, requiredValue: 7}]", "requiredValue: must be a string"),
    (
        "  userValidationRules: [{expression: 'false'}, {expression: 'false'}]",
        "userValidationRules[1].expression: is given twice",
    ),
    ("  userValidationRules: [{}]", "jwt[0].userValidationRules[0].expression: missing"),
    ("  issuer: {}", "line 10, column 3: key 'issuer' is given twice"),
    ("  1: {}", "line 10, column 3: a key must be a string"),
]
# A key of `extra`, and the error.
EXTRA_KEYS = [
    ("a", "must be a domain-prefixed path"),
    ("a_b/c", "must be a domain-prefixed path"),
    ("a.b/", "must be a domain-prefixed path"),
    ("a.b/C", "must be lowercase"),
    ("x.k8s.io/c", "k8s.io, kubernetes.io and"),
    ("kubernetes.io/c", "k8s.io, kubernetes.io"),
    ("arcbridge.io/original-user", "is set by the agent itself"),
    ("arcbridge.io/actor", "is set by the agent itself"),
]
# What is replaced in SMALL by what, and the error.
REPLACED = [
    ("/v1\n", "/v2\n", "apiVersion: must be"),
    ("kind: A", "kind: B", "kind: must be"),
    ("https://", "http://", "jwt[0].issuer.url: must be an https URL"),
    ("https://issuer", "https://u:p@issuer", "jwt[0].issuer.url: must have no user information"),
    ("issuer.example", "issuer.example?a=b", "jwt[0].issuer.url: must have no user"),
    ("issuer.example", "issuer.example#a", "jwt[0].issuer.url"),
    ("    url: https://issuer.example\n", "", "jwt[0].issuer.url: missing"),
    ("[one]", "[]", "jwt[0].issuer.audiences: at least one"),
    ("[one]", "[one, two]", "jwt[0].issuer.audienceMatchPolicy"),
    ("[one]", "[one, one]\n    audienceMatchPolicy: MatchAny", "jwt[0].issuer.audiences[1]: is given twice"),
    ("[one]", '[""]', "jwt[0].issuer.audiences[0]: must be"),
    ("[one]", "[one]\n    discoveryURL: https://issuer.example/", "jwt[0].issuer.discoveryURL: must differ"),
    ("[one]", "[one]\n    egressSelectorType: cluster", "jwt[0].issuer.egressSelectorType"),
    ("[one]", "[one]\n    certificateAuthority: x", "jwt[0].issuer.certificateAuthority"),
    ("[one]", "[one]\n    extra: x", "jwt[0].issuer.extra: unknown field"),
    (', prefix: ""', "", "jwt[0].claimMappings.username.prefix: must be given"),
    ('claim: sub, prefix: ""', "claim: a, expression: 'true'", "jwt[0].claimMappings.username: claim and"),
    ('claim: sub, prefix: ""', "prefix: a, expression: 'true'", "username.prefix: belongs to claim"),
    ('claim: sub, prefix: ""', 'prefix: ""', "jwt[0].claimMappings.username: needs claim or expression"),
    ('    username: {claim: sub, prefix: ""}\n', "    groups: {claim: g, prefix: ''}\n", "username: missing"),
]
BAD = [
    *((f"{SMALL}{text}\n", message) for text, message in ADDED),
    *(
        (f"{SMALL}    extra: [{{key: {key}, valueExpression: claims.a}}]\n", f"extra[0].key: {message}")
        for key, message in EXTRA_KEYS
    ),
    *((SMALL.replace(old, new), message) for old, new, message in REPLACED),
    (HEAD, "jwt: at least one"),
    (HEAD + "jwt: {}\n", "jwt: must be a list"),
    *(
        (SMALL.replace("https://issuer.example", url), f"jwt[0].issuer.url: {why}")
        for url, why in (
            *((f"https://a/{bad}", "% must be followed") for bad in ("%zz", "%", "%4")),
            *((f"https://a{bad}b", "the host has a character") for bad in ("%20", "%61", "\\", "^", "|", "`")),
            *((f'"https://{bad}"', "in brackets stands an IPv6 address") for bad in ("[v1.a]/", "[::1]a", "[::1].a")),
            ('"https://a{b}"', "the host has a character"),
            ('"https://[fe80::1%25eth0]/"', "the host has a character"),
        )
    ),
    (SMALL + SMALL[len(HEAD) + 1 :].replace("jwt:\n", ""), "jwt[1].issuer.url: is given twice"),
    ("a: [", "line 1, column 5: not valid YAML"),
    ("a: b\nc: \x05", "line 2, column 4: not valid YAML"),
    ("[" * 5000, "nested too deeply"),
    ("[]", "document: must be a mapping"),
    ("!!python/object/apply:os.system ['true']", "not valid YAML"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[row[1] for row in BAD])
def test_refused_by_path(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, source="auth.yaml")
    assert caught.value.message.startswith("auth.yaml: ")
    assert message in caught.value.message


USERNAME = '{claim: sub, prefix: ""}'

# A file, and the beginning of its error: the place in the file, the field, and what is wrong.
PLACES = [
    (
        SMALL.replace(USERNAME, "{expression: claims.sub + 1 + 'a'}"),
        "line 9, column 43: jwt[0].claimMappings.username.expression: found no matching overload for '_+_'",
    ),
    (
        SMALL.replace(USERNAME, '{expression: "claims.sub +"}'),
        "line 9, column 41: jwt[0].claimMappings.username.expression: Syntax error",
    ),
    (
        SMALL.replace(USERNAME, "\n      expression: |\n        'a' +\n        nothing\n"),
        "line 12, column 9: jwt[0].claimMappings.username.expression: undeclared reference to 'nothing'",
    ),
    (
        SMALL.replace(USERNAME, "\n      expression: >\n        'a' +\n        nothing\n"),
        "line 10, column 19: jwt[0].claimMappings.username.expression: undeclared reference to 'nothing'",
    ),
    (
        SMALL.replace(USERNAME, "{expression: claims.email}"),
        "line 9, column 28: jwt[0].claimMappings.username.expression: claims.email_verified must be used",
    ),
    (
        SMALL + "  claimValidationRules: [{expression: claims.admin}]\n",
        "line 10, column 39: jwt[0].claimValidationRules[0].expression: must evaluate to bool",
    ),
    (
        SMALL + "  userValidationRules: [{expression: user.name != ''}]\n",
        "line 10, column 42: jwt[0].userValidationRules[0].expression: undefined field 'name'",
    ),
    (
        SMALL + "    extra: [{key: a.b/c, valueExpression: 'claims.a.map(x, x)'}]\n",
        "line 10, column 50: jwt[0].claimMappings.extra[0].valueExpression: expression of type 'any' cannot be",
    ),
    (
        SMALL + "    uid: {expression: \"int('x')\"}\n",
        "line 10, column 23: jwt[0].claimMappings.uid.expression: not an int",
    ),
    (SMALL + "    other: 1\n", "line 10, column 12: jwt[0].claimMappings.other: unknown field"),
    ("# no field\nother: 1\n", "line 2, column 1: apiVersion: missing"),
    (HEAD, "line 1, column 1: jwt: at least one issuer is needed"),
    ("[]", "line 1, column 1: document: must be a mapping"),
    ("", "document: must be a mapping"),
]


@pytest.mark.parametrize(("text", "message"), PLACES, ids=[row[1] for row in PLACES])
def test_an_error_names_path_line_and_column(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, source="auth.yaml")
    assert caught.value.message.startswith(f"auth.yaml: {message}")


def test_expressions_in_every_place() -> None:
    text = (
        SMALL.replace(USERNAME, "{expression: claims.sub}")
        + """
    groups: {expression: "dyn(claims.groups).map(g, 'x:' + g)"}
    uid: {expression: string(claims.number)}
    extra:
    - {key: example.com/a, valueExpression: claims.a}
    - {key: example.com/b, valueExpression: 'claims.?b.orValue(null)'}
  claimValidationRules:
  - {claim: hd, requiredValue: example.com}
  - {expression: "claims.number > 4", message: too small}
  userValidationRules:
  - expression: "!user.username.startsWith('system:')"
  - {expression: "user.groups.size() < 10"}
"""
    )
    (issuer,) = parse(text).issuers
    assert (issuer.username, issuer.groups, issuer.uid_claim) == (None, None, None)
    assert issuer.rules == (ClaimRule("hd", "example.com"),)
    found = issuer.expressions
    assert found is not None
    assert found.mappings["username"].evaluate(Claims.from_json({"sub": "anna"}))[0] == "anna"
    assert [key for key, _ in found.extra] == ["example.com/a", "example.com/b"]
    assert [(rule.path, rule.message) for rule in found.claim_rules] == [
        ("jwt[0].claimValidationRules[1].expression", "too small")
    ]
    assert [rule.path for rule in found.user_rules] == ["jwt[0].userValidationRules[1].expression"]


@pytest.mark.parametrize(
    ("username", "rest"),
    [
        ("claims.email_verified ? claims.email : ''", ""),
        ("claims.email", "    extra: [{key: a.b/c, valueExpression: string(claims.email_verified)}]\n"),
        ("claims.email", "  claimValidationRules: [{expression: 'claims.?email_verified.orValue(true) == true'}]\n"),
        ("claims['email']", ""),
    ],
)
def test_an_email_address_needs_a_look_at_email_verified(username: str, rest: str) -> None:
    """Kubernetes' own rule, which only sees `claims.email` and `claims.?email`."""
    text = SMALL.replace(USERNAME, f'{{expression: "{username}"}}') + rest
    assert parse(text).issuers[0].expressions is not None


def test_no_library_for_a_file_without_expressions() -> None:
    code = f"import sys; from arcbridge.identity.authentication import parse; parse({FULL!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not any(name.startswith(("cel_expr_python", "arcbridge.identity.cel")) for name in done.stdout.split())


def test_without_the_library_an_expression_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("arcbridge.identity.cel")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cel_expr_python", None)
    with pytest.raises(ConfigError, match=r"uid\.expression: .*pip install 'arcbridge\[cel\]'"):
        parse(SMALL + "    uid: {expression: claims.a}\n")


def test_aliases_cannot_make_the_search_for_a_place_long() -> None:
    laughs = "a: &a0 [x]\n" + "".join(f"b{n}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(30))
    with pytest.raises(ConfigError, match="apiVersion: missing"):
        parse(laughs)


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


def test_a_character_that_json_writes_as_two_escapes() -> None:
    text = json.dumps(yaml.safe_load(SMALL.replace('prefix: ""', 'prefix: "😀"')))
    assert "\\ud83d\\ude00" in text
    assert parse(text).issuers[0].username == PrefixedClaim("sub", "😀")


def test_json_is_yaml(tmp_path: Path) -> None:
    path = tmp_path / "auth.json"
    path.write_text(
        '{"apiVersion":"apiserver.config.k8s.io/v1","kind":"AuthenticationConfiguration","jwt":[{"issuer":'
        '{"url":"https://i.example","audiences":["a"]},"claimMappings":{"username":{"claim":"sub","prefix":""}}}]}'
    )
    assert load(path).issuers[0].url == "https://i.example"


SCALARS = [
    ("2024-13-45", "timestamp"),
    ("0b_", "int"),
    ("!!int x", "int"),
    ("!!float x", "float"),
    ("!!bool x", "bool"),
    ("!!timestamp x", "timestamp"),
    ("1" * 5000, "int"),
    ("0x_", "int"),
    ("2024-01-01T00:00:00+99:00", "timestamp"),
]


@pytest.mark.parametrize(("scalar", "kind"), SCALARS, ids=[row[0][:20] for row in SCALARS])
@pytest.mark.parametrize("place", ["{0}", "[{0}]", "{{a: [b, {0}]}}"])
def test_a_scalar_that_its_type_does_not_fit(scalar: str, kind: str, place: str) -> None:
    value = place.format(scalar)
    with pytest.raises(ConfigError) as caught:
        parse(SMALL + f"other: {value}\n", source="auth.yaml")
    said = f"auth.yaml: line 10, column {8 + value.index(scalar)}: not a value of the YAML type {kind}"
    assert caught.value.message == said


def test_every_mistake_is_found_at_once_and_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "auth.yaml"
    file.write_text(
        """\
apiVersion: apiserver.config.k8s.io/v2
kind: AuthenticationConfiguration
jwt:
- issuer:
    url: http://issuer.example
    audiences: []
    audience: one
    certificateAuthority: "-----BEGIN CERTIFICATE-----\\nnone\\n-----END CERTIFICATE-----"
  claimValidationRules:
  - claim: hd
    message: no
  - expression: "claims.x ="
  claimMappings:
    username: {claim: sub}
    group: {claim: groups, prefix: ""}
- issuer:
    url: https://other.example
    audiences: [two]
"""
    )
    config, problems = inspect(file)
    assert [issuer.url for issuer in config.issuers] == ["", "https://other.example"]
    found = [(problem.place.line, problem.message.partition(": ")[0]) for problem in problems if problem.place]
    assert found == [
        (1, "apiVersion"),
        (5, "jwt[0].issuer.url"),
        (8, "jwt[0].issuer.certificateAuthority"),
        (6, "jwt[0].issuer.audiences"),
        (7, "jwt[0].issuer.audience"),
        (11, "jwt[0].claimValidationRules[0].message"),
        (12, "jwt[0].claimValidationRules[1].expression"),
        (14, "jwt[0].claimMappings.username.prefix"),
        (15, "jwt[0].claimMappings.group"),
        (16, "jwt[1].claimMappings"),
    ]
    assert all(problem.place and problem.place.source == str(file) for problem in problems)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(problems[0]) in caught.value.message.replace(f"{file}: line", f"{file}, line")


def test_h30_the_places_of_all_mistakes_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[str] = []
    collect = authentication._collect

    def counted(node: Any, path: str, *rest: Any) -> None:
        collected.append(path)
        collect(node, path, *rest)

    monkeypatch.setattr(authentication, "_collect", counted)
    with pytest.raises(ConfigError):
        parse(HEAD + "".join(f"k{number}: v\n" for number in range(100)), source="auth.yaml")
    assert len(collected) < 110
