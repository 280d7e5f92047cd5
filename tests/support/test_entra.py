"""The tenant of the tests: what it refuses, so that a test that passes there would not fail at Entra ID for that."""

from __future__ import annotations

import json
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import jwt
import pytest

from tests.support.entra import ASSERTION, CLUSTER, PIPELINE, PROGRAM, RELAY, Certificate, Entra


@pytest.fixture(scope="module")
def entra(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Entra]:
    with Entra(tmp_path_factory.mktemp("entra")) as entra:
        yield entra


def ask(entra: Entra, url: str, form: Mapping[str, str] | None = None) -> tuple[int, Any]:
    context = ssl.create_default_context(cafile=entra.ca_file)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    data = None if form is None else urllib.parse.urlencode(form).encode()
    try:
        with opener.open(url, data, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def grant(entra: Entra, **form: str) -> dict[str, Any]:
    secret = entra.applications[PIPELINE].secret
    given = {"grant_type": "client_credentials", "client_id": PIPELINE, "client_secret": secret, **form}
    found: dict[str, Any] = ask(entra, entra.token_url, {name: value for name, value in given.items() if value})[1]
    return found


@pytest.mark.parametrize(
    ("form", "number"),
    [
        ({"client_id": "none"}, "AADSTS700016"),
        ({"client_secret": "wrong"}, "AADSTS7000215"),
        ({"client_secret": ""}, "AADSTS7000218"),
        ({"scope": f"api://{RELAY}/.default api://{CLUSTER}/.default"}, "AADSTS28000"),
        ({"scope": f"api://{RELAY}/access"}, "AADSTS1002012"),
        ({"scope": "api://none/.default"}, "AADSTS500011"),
        ({"client_secret": "", "client_assertion_type": ASSERTION, "client_assertion": "a.b.c"}, "AADSTS700027"),
        ({"grant_type": "password"}, "AADSTS70003"),
        ({"grant_type": "refresh_token", "refresh_token": "x"}, "AADSTS9002313"),
        ({"grant_type": "client_credentials", "client_id": PROGRAM, "client_secret": ""}, "AADSTS7000216"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_refuses(form: dict[str, str], number: str, entra: Entra) -> None:
    answer = grant(entra, **{"scope": f"api://{RELAY}/.default", **form})
    assert answer["error_description"].startswith(f"{number}: ")
    assert f"AADSTS{answer['error_codes'][0]}" == number


def test_an_assertion_is_ps256_names_the_certificate_and_counts_once(entra: Entra) -> None:
    certificate = Certificate.make("ci")
    entra.applications[PIPELINE].certificates.append(certificate)
    now = int(time.time())
    claims = {"iss": PIPELINE, "sub": PIPELINE, "aud": entra.token_url, "jti": "1", "iat": now, "exp": now + 60}

    def answer(algorithm: str, name: str, **changes: object) -> dict[str, Any]:
        headers = {name: certificate.x5t_s256}
        signed = jwt.encode({**claims, **changes}, certificate.key, algorithm, headers=headers)
        form = {"client_secret": "", "client_assertion_type": ASSERTION, "client_assertion": signed}
        return grant(entra, scope=f"api://{RELAY}/.default", **form)

    assert "access_token" in answer("PS256", "x5t#S256")
    for refused in (
        answer("PS256", "x5t#S256"),
        answer("RS256", "x5t#S256", jti="2"),
        answer("PS256", "kid", jti="3"),
        answer("PS256", "x5t#S256", jti="4", aud="https://elsewhere.example"),
        answer("PS256", "x5t#S256", jti="5", exp=now - 60),
    ):
        assert refused["error"] == "invalid_client"
