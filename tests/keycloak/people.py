"""The organisation at Keycloak, as its administrator sets it up from config/examples/keycloak, and its people."""

from __future__ import annotations

import http.cookiejar
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from arcbridge.identity.proof import ProofKey
from tests.support.keycloak import Keycloak, Realm
from tests.support.machine import Machine, make_home, write_settings
from tests.support.world import World

EXAMPLES = Path(__file__).resolve().parents[2] / "config" / "examples" / "keycloak"
PASSWORD = "a password of the tests"
BRIEF = 20
"""Seconds that a token of the client `arcbridge-brief` lives; it is renewed after half of them."""
NO_ISSUER = "https://login.example.org/realms/example"


def example(name: str) -> Any:
    """A document of config/examples/keycloak for the admin API."""
    return json.loads((EXAMPLES / name).read_text())


def settings_of(name: str, issuer: str) -> str:
    """The lines of an example's settings that are about tokens and logins; a world has addresses of its own."""
    head, _, login = (EXAMPLES / name).read_text().replace(NO_ISSUER, issuer).partition("[login]\n")
    lines = [line for line in head.splitlines() if line.startswith(("proof = ", "forbidden_audiences = "))]
    return "\n".join([*lines, *(f"login.{line}" for line in login.splitlines() if " = " in line)])


class Organisation:
    """One realm with the scopes, clients and groups of the examples."""

    def __init__(self, keycloak: Keycloak, name: str, **settings: object) -> None:
        self.realm: Realm = keycloak.create_realm(name, **settings)
        self.groups = {one: self.realm.create("groups", {"name": one}) for one in ("platform", "developers", "interns")}
        for scope in ("relay", "cluster"):
            self.realm.create("client-scopes", example(f"scope-arcbridge-{scope}.json"))
        self.client = self.realm.create("clients", example("client-arcbridge.json"))
        self.pipeline = self.realm.create("clients", example("client-arcbridge-ci.json"))
        self.vary("client-arcbridge.json", "arcbridge-brief", {"access.token.lifespan": str(BRIEF)})

    def vary(self, file: str, client: str, attributes: Mapping[str, str], **fields: object) -> str:
        """Make a client like that of an example, under a name of its own; return its id."""
        document = example(file)
        document["attributes"] |= attributes
        return self.realm.create("clients", {**document, "clientId": client, **fields})

    def hire(self, name: str, *groups: str) -> str:
        """Make a user with a password; return the user's id."""
        return self.realm.create(
            "users",
            {
                "username": name,
                "enabled": True,
                "email": f"{name}@example.com",
                "firstName": name.capitalize(),
                "lastName": "Example",
                "groups": list(groups),
                "credentials": [{"type": "password", "value": PASSWORD}],
            },
        )

    def join(self, user: str, group: str) -> None:
        """Put a user, or a client's service account, into a group."""
        self.realm.admin("PUT", f"users/{user}/groups/{self.groups[group]}")

    def leave(self, user: str, group: str) -> None:
        """Take a user out of a group."""
        self.realm.admin("DELETE", f"users/{user}/groups/{self.groups[group]}")

    def service_account(self, client: str) -> str:
        """The id of the user that a client is, by the client's id."""
        return str(self.realm.admin("GET", f"clients/{client}/service-account-user")["id"])

    def signing_key(self, priority: int) -> str:
        """Make a key with which tokens are signed where its priority is the highest; return its id."""
        return self.realm.create(
            "components",
            {
                "name": f"key-{priority}",
                "providerId": "rsa-generated",
                "providerType": "org.keycloak.keys.KeyProvider",
                "config": {"priority": [str(priority)], "algorithm": ["RS256"]},
            },
        )


class KeycloakWorld(World):
    """The three roles with the files of the examples; only addresses, paths and pins are put in."""

    realms: list[Realm]

    def start_issuer(self) -> None:
        """It runs already."""

    def authentication(self, audience: str) -> str:
        """The example of that end, once for each realm."""
        name = {"arcbridge-relay": "relay", "arcbridge-cluster": "agent"}[audience]
        text = (EXAMPLES / f"{name}-authentication.yaml").read_text()
        head, _, entry = text.partition("jwt:\n")
        entries = []
        for realm in self.realms:
            ca = "\n".join(8 * " " + line for line in realm.keycloak.ca_file.read_text().strip().splitlines())
            url = f"      url: {realm.url}\n      certificateAuthority: |\n{ca}"
            entries.append(entry.replace(f"      url: {NO_ISSUER}", url))
            assert entries[-1] != entry
        return f"{head}jwt:\n{''.join(entries)}"


@dataclass
class Person(Machine):
    """A person at a machine of their own."""

    realm: Realm = field(kw_only=True)

    @classmethod
    def at_work(
        cls,
        world: KeycloakWorld,
        realm: Realm,
        name: str,
        *,
        settings: str = "client.toml",
        change: Mapping[str, str] | None = None,
    ) -> Person:
        """`change`: texts of the example, each a part of it, and what takes their places."""
        directory = make_home(world, name)
        tail = f'ca_file = "{realm.keycloak.ca_file}"\n'
        changes = {NO_ISSUER: realm.url, **(change or {})}
        path = write_settings(world, directory, EXAMPLES / settings, changes, tail)
        return cls(world, name, directory, path, realm=realm)

    @classmethod
    def without_settings(cls, world: KeycloakWorld, realm: Realm, name: str) -> Person:
        """A person who knows the relay's address and has no settings file."""
        return cls(world, name, make_home(world, name), Path("/dev/null"), realm=realm)

    @cached_property
    def browser(self) -> Browser:
        """The person's browser, with its cookies."""
        return Browser(self.realm.keycloak)

    def log_in(self) -> str:
        """Log in by browser, with forms over HTTP; return what the command said at its end."""
        with self.logging_in() as (process, page):
            self.browser.log_in(page, self.name)
        return process.output()

    def log_in_by_device(self, *arguments: str) -> str:
        """Log in by a code on another device; return what the command said at its end."""
        process = self.begin("login", "--wait", "100s", "--grant-type", "device-code", *arguments)
        page = process.wait_for_line(r"^or open (https://\S+)", timeout=30)[1]
        url, text = self.browser.submit(*self.browser.get(page), username=self.name, password=PASSWORD)
        self.browser.submit(url, text, accept="Yes")
        assert process.wait(30) == 0, process.tail()
        return process.output()

    def refresh(self, **form: str) -> tuple[int, dict[str, Any]]:
        """Send the kept refresh token with the kept key, as a program does that has stolen both."""
        key = ProofKey.from_jwk(self.key_file.read_bytes())
        sent = {"grant_type": "refresh_token", "refresh_token": self.kept["refresh_token"], "client_id": "arcbridge"}
        headers = {"DPoP": key.dpop("POST", self.realm.token_url, time.time())}
        status, text, _ = self.realm.keycloak.open("POST", self.realm.token_url, form={**sent, **form}, headers=headers)
        answer: dict[str, Any] = json.loads(text)
        return status, answer


class Browser:
    """A browser without scripts: it follows redirects, keeps cookies, and fills in forms."""

    def __init__(self, keycloak: Keycloak) -> None:
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}),
            urllib.request.HTTPSHandler(context=keycloak.context),
            urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()),
        )

    def get(self, url: str, form: dict[str, str] | None = None) -> tuple[str, str]:
        """Ask for a page: the URL at which it ended, and its text."""
        data = None if form is None else urllib.parse.urlencode(form).encode()
        try:
            with self._opener.open(url, data, timeout=30) as answer:
                return answer.geturl(), answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.geturl() or url, error.read().decode(errors="replace")

    def log_in(self, page: str, name: str) -> str:
        """Fill in the login page at `page`, if there is one, and go where it leads; return the text there."""
        url, text = self.get(page)
        if 'name="password"' not in text:
            return text  # it is still logged in
        return self.submit(url, text, username=name, password=PASSWORD)[1]

    def submit(self, url: str, text: str, **fields: str) -> tuple[str, str]:
        """Send the only form of a page with these fields beside its hidden ones."""
        form = _Form(text)
        assert form.action, f"{url} has no form: {text[:2000]}"
        return self.get(urllib.parse.urljoin(url, form.action), {**form.fields, **fields})


class _Form(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.action = ""
        self.fields: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        if tag == "form" and not self.action:
            self.action = given.get("action", "")
        elif tag == "input" and given.get("type") == "hidden" and given.get("name"):
            self.fields[given["name"]] = given.get("value", "")
