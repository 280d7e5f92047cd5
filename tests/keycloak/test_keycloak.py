"""A real Keycloak from end to end: how people and pipelines come in, and what an administrator takes back.

The realm, relay, agent and clients have the files of config/examples/keycloak, so `proof = "required"` holds at both
ends and each end has an audience of its own. Beside each user stands kubectl at a real API server.
"""

from __future__ import annotations

import json
import shutil
import time
from functools import partial
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from arcbridge.identity.proof import ProofKey
from tests.keycloak.people import BRIEF, Browser, KeycloakWorld, Organisation, Person
from tests.support.cluster import Cluster
from tests.support.machine import Shell, claims
from tests.support.processes import ManagedProcess, Mark
from tests.support.reports import records, until, wait_for_record

# The first test also waits for Keycloak, the API server, the relay and the agent to start.
pytestmark = pytest.mark.timeout(300)

SIGNED_IN = {"system:authenticated"}
BRIEFLY = {'client_id = "arcbridge"': 'client_id = "arcbridge-brief"'}


class TestAPersonLogsIn:
    def test_by_browser_with_one_bound_token_for_each_end(
        self, cluster: Cluster, world: KeycloakWorld, organisation: Organisation
    ) -> None:
        user = organisation.hire("anna", "platform", "interns")
        anna = Person.at_work(world, organisation.realm, "anna")
        assert "Logged in as anna" in anna.log_in()
        anna.start()
        who = Shell(cluster, anna).whoami()
        assert (who["username"], who["uid"]) == ("oidc:anna", user)
        assert who["groups"] == ["oidc:interns", "oidc:platform", "system:authenticated"]
        # Each end got its own, and each is bound to the one key of the login.
        relay, agent = claims(anna.kept["access_token"]), claims(anna.cluster_token)
        assert (relay["aud"], agent["aud"]) == ("arcbridge-relay", "arcbridge-cluster")
        key = ProofKey.from_jwk(anna.key_file.read_bytes()).thumbprint
        assert relay["cnf"] == agent["cnf"] == {"jkt": key}
        begun = until(
            lambda: [line for line in world.audit_lines() if line.get("user") == "oidc:anna"],
            "anna is in the audit log",
        )
        assert {line["bound"] for line in begun} == {"cnf.jkt"}
        # The same login serves the other commands.
        assert world.cluster in anna.run("clusters")[1]
        assert "failed" not in anna.run("doctor")[1]

    def test_with_a_code_on_another_device(
        self, cluster: Cluster, world: KeycloakWorld, organisation: Organisation
    ) -> None:
        organisation.hire("carl", "developers")
        carl = Person.at_work(world, organisation.realm, "carl")
        assert "Logged in" in carl.log_in_by_device()
        carl.start()
        assert Shell(cluster, carl).groups() == {"oidc:developers", *SIGNED_IN}
        assert claims(carl.cluster_token)["aud"] == "arcbridge-cluster"

    def test_at_a_relay_that_says_where(
        self, cluster: Cluster, world: KeycloakWorld, organisation: Organisation
    ) -> None:
        """No settings file: the relay has the login's settings, and flags say what a person would compare, and which
        audience all clusters have."""
        organisation.hire("cleo", "developers")
        cleo = Person.without_settings(world, organisation.realm, "cleo")
        said = cleo.log_in_by_device(
            *(world.relay_url, "--relay-ca-pin", world.relay_pin, "--oidc-issuer-url", organisation.realm.url),
            *("--oidc-ca-file", str(organisation.realm.keycloak.ca_file), "--oidc-client-id", "arcbridge"),
            *(word for scope in ("openid", "arcbridge-relay", "arcbridge-cluster") for word in ("--oidc-scope", scope)),
            *("--relay-scope", "openid", "--relay-scope", "arcbridge-relay"),
            *("--cluster-audience", "arcbridge-cluster", "--cluster-audience-by", "scope"),
            *("--cluster-scope", "openid", "--cluster-scope", "arcbridge-cluster"),
        )
        assert "Logged in as cleo" in said
        cleo.start("--cluster", world.cluster, "--trust-first-use")
        assert Shell(cluster, cleo).groups() == {"oidc:developers", *SIGNED_IN}
        assert (claims(cleo.kept["access_token"])["aud"], claims(cleo.cluster_token)["aud"]) == (
            "arcbridge-relay",
            "arcbridge-cluster",
        )
        found = json.loads(cleo.run("whoami", "-o", "json")[1])
        key = ProofKey.from_jwk(cleo.key_file.read_bytes()).thumbprint
        assert (found["key"], found["issuer"], found["renews"]) == (key, organisation.realm.url, True)
        # Keycloak voids the refresh token, so a copy of it is worth nothing after the logout, even with the key.
        kept, key_bytes = cleo.kept, cleo.key_file.read_bytes()
        assert cleo.run("logout")[1].startswith("Logged out at https://")
        headers = {"DPoP": ProofKey.from_jwk(key_bytes).dpop("POST", cleo.realm.token_url, time.time())}
        form = {"grant_type": "refresh_token", "refresh_token": kept["refresh_token"], "client_id": "arcbridge"}
        status, text, _ = cleo.realm.keycloak.open("POST", cleo.realm.token_url, form=form, headers=headers)
        assert (status, json.loads(text)["error"]) == (400, "invalid_grant")

    def test_who_may_reach_no_cluster_is_told_so(self, world: KeycloakWorld, organisation: Organisation) -> None:
        organisation.hire("egon", "interns")
        egon = Person.at_work(world, organisation.realm, "egon")
        egon.log_in()
        assert "no clusters" in egon.run("clusters")[1]


class TestTheAdministratorsPage:
    """A login there by browser, with the client of the example."""

    def test_who_administers_sees_the_clusters_and_no_other_person(
        self, world: KeycloakWorld, organisation: Organisation
    ) -> None:
        keycloak = organisation.realm.keycloak
        keycloak.context.load_verify_locations(world.relay_config.parent / "data" / "ca.crt")
        for name, group, words in (("paula", "platform", world.cluster), ("pit", "interns", "no [[admin]]")):
            organisation.hire(name, group)
            browser = Browser(keycloak)
            assert "log in to see your clusters" in browser.get(f"{world.relay_url}/page")[1]
            text = browser.log_in(f"{world.relay_url}/page/login", name)
            assert words in text
            assert (f"oidc:{name}" in text, "cluster" in text) == (group == "platform",) * 2
            again = browser.get(f"{world.relay_url}/page?user=oidc:{name}")[1]
            assert ("No token of this user is known here" in again) == (group == "platform")


class TestAPipeline:
    """The walk of a service principal: bound by its name, and by a group, without a person."""

    def test_with_a_secret(self, cluster: Cluster, world: KeycloakWorld, organisation: Organisation) -> None:
        secret = organisation.realm.admin("GET", f"clients/{organisation.pipeline}/client-secret")["value"]
        cluster.grant("view", user="oidc:service-account-arcbridge-ci")
        job = Person.at_work(world, organisation.realm, "job", settings="ci.toml")
        (job.directory / "client-secret").write_text(secret + "\n")
        job.start()
        who = Shell(cluster, job).whoami()
        assert who["username"] == "oidc:service-account-arcbridge-ci"
        assert who["uid"] == organisation.service_account(organisation.pipeline)
        assert Shell(cluster, job).kubectl.run("get", "namespaces", "-o", "name").stdout
        assert Shell(cluster, job).kubectl.run("auth", "can-i", "delete", "namespaces", check=False).stdout == "no\n"
        assert secret not in "".join(process.output() for process in world.processes)
        assert not list((job.directory / "cache").rglob("*.json")), "tokens of a program stay in its memory"

    def test_with_a_key(self, cluster: Cluster, world: KeycloakWorld, organisation: Organisation) -> None:
        key, name = ec.generate_private_key(ec.SECP256R1()), "arcbridge-ci-key"
        public = jwt.get_algorithm_by_name("ES256").to_jwk(key.public_key(), as_dict=True)
        client = organisation.vary(
            "client-arcbridge-ci.json",
            name,
            {
                "use.jwks.string": "true",
                "jwks.string": json.dumps({"keys": [{**public, "kid": "2026", "use": "sig", "alg": "ES256"}]}),
                "token.endpoint.auth.signing.alg": "ES256",
            },
            clientAuthenticatorType="client-jwt",
        )
        organisation.join(organisation.service_account(client), "developers")
        setting = 'client_key_file = "key.pem"\nclient_key_id = "2026"'
        change = {'client_secret_file = "client-secret"': setting, '"arcbridge-ci"': f'"{name}"'}
        job = Person.at_work(world, organisation.realm, name, settings="ci.toml", change=change)
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (job.directory / "key.pem").write_bytes(pem)
        job.start()
        assert Shell(cluster, job).groups() == {"oidc:developers", *SIGNED_IN}


@pytest.fixture(scope="module")
def victim(world: KeycloakWorld, organisation: Organisation) -> Person:
    """A person from whose machine things were copied."""
    organisation.hire("frida", "platform")
    frida = Person.at_work(world, organisation.realm, "frida")
    frida.log_in()
    assert "failed" not in frida.run("doctor")[1]
    return frida


ONE_AUDIENCE = {
    'relay_scopes = ["openid", "arcbridge-relay"]\n': "",
    'cluster_scopes = ["openid", "arcbridge-cluster"]\n': "",
    'cluster_audience = "arcbridge-cluster"\n': "",
    'cluster_audience_by = "scope"\n': "",
}
"""The example without tokens of their own for clusters."""


def thief(victim: Person, name: str, *, relay: str, agent: str, key: Path | None) -> str:
    """What a client says that has these tokens and this key; what it cannot know says the log of the end."""
    thief = Person.at_work(victim.world, victim.realm, name, change=ONE_AUDIENCE)
    (thief.directory / "access-token").write_text(relay)
    (thief.directory / "id-token").write_text(agent)
    flags = ["--access-token-file", str(thief.directory / "access-token")]
    flags += ["--id-token-file", str(thief.directory / "id-token")]
    if key is not None:
        shutil.copy(key, thief.directory / "key")
        flags += ["--proof-key-file", str(thief.directory / "key")]
    return thief.run(*flags, "doctor", check=False)[1]


class TestATokenIsOfNoUse:
    """What a thief of tokens has, at the ends for which they were not given, and without their key."""

    def test_with_tokens_and_key_a_thief_is_the_user(self, victim: Person) -> None:
        """What the others lack is what makes the difference."""
        said = thief(victim, "twin", relay=victim.kept["access_token"], agent=victim.cluster_token, key=victim.key_file)
        assert "end to end as oidc:" in said

    def test_without_the_key(self, victim: Person) -> None:
        said = thief(victim, "thief", relay=victim.kept["access_token"], agent=victim.cluster_token, key=None)
        assert "the relay does not accept th" in said
        assert "a token that was copied from elsewhere is of no use without its key" in said

    def test_at_the_agent_where_the_relay_could_have_seen_it(self, victim: Person) -> None:
        """What the login itself was given is good at both ends; the client never shows it."""
        status, answer = victim.refresh()
        assert (status, set(claims(answer["access_token"])["aud"])) == (200, {"arcbridge-relay", "arcbridge-cluster"})
        before = victim.world.agent.mark()
        said = thief(
            victim, "both", relay=victim.kept["access_token"], agent=answer["access_token"], key=victim.key_file
        )
        assert "end to end as" not in said
        assert refusals(victim.world.agent, before) == {"token.aud.forbidden"}

    def test_at_the_token_endpoint(self, victim: Person) -> None:
        status, answer = victim.realm.token(
            grant_type="refresh_token", refresh_token=victim.kept["refresh_token"], client_id="arcbridge"
        )
        assert status == 400
        assert "DPoP" in answer["error_description"]


class TestWhatChanges:
    def test_new_groups_come_with_the_next_token(
        self, cluster: Cluster, world: KeycloakWorld, organisation: Organisation
    ) -> None:
        user = organisation.hire("gustav", "developers")
        gustav = Person.at_work(world, organisation.realm, "gustav", change=BRIEFLY)
        gustav.log_in()
        client = gustav.start()
        shell = Shell(cluster, gustav)
        assert shell.groups() == {"oidc:developers", *SIGNED_IN}
        end_of_the_first = claims(gustav.cluster_token)["exp"]
        # In this order: a token that is issued between the two would have no group that the relay lets in.
        organisation.join(user, "platform")
        organisation.leave(user, "developers")
        until(lambda: shell.groups() == {"oidc:platform", *SIGNED_IN}, "the new groups", timeout=4 * BRIEF)
        # It is the same session, which outlives the token that it began with.
        until(lambda: time.time() > end_of_the_first, "the end of the first token", timeout=4 * BRIEF)
        assert not shell.refusal()
        assert len(records(client.process, "session established")) == 1

    def test_a_user_who_is_taken_back_is_out_with_the_token(
        self, cluster: Cluster, world: KeycloakWorld, organisation: Organisation
    ) -> None:
        realm = organisation.realm
        users = {how: organisation.hire(how, "developers") for how in ("disabled", "deleted", "logged-out")}
        people = {how: Person.at_work(world, realm, how, change=BRIEFLY) for how in users}
        clients = {}
        for how, person in people.items():
            person.log_in()
            clients[how] = person.start()
            assert not Shell(cluster, person).refusal()
        realm.change(f"users/{users['disabled']}", enabled=False)
        realm.admin("DELETE", f"users/{users['deleted']}")
        realm.admin("POST", f"users/{users['logged-out']}/logout")
        # kubectl is told at once, by the client, which goes on trying until there is a login again.
        words = "You must be logged in to the server (arcbridge: the login has "
        for how, why in (
            ("disabled", "User disabled"),
            ("deleted", "Session not active"),
            ("logged-out", "Session not active"),
        ):
            shell = Shell(cluster, people[how])
            until(partial(shell.says, words), f"the end of {how}", timeout=4 * BRIEF)
            wait_for_record(clients[how].process, "the login cannot be renewed")
            said = {line["reason"] for line in records(clients[how].process, "the login cannot be renewed")}
            advice = "; run `arcbridge login https://"
            assert any(one.startswith(f"the login has ended (invalid_grant: {why}){advice}") for one in said), said
            # The issuer is asked once about a login that it has ended.
            assert all(one.startswith("the login has ended") for one in said), said
            status, shown = people[how].run("doctor", check=False)
            assert (status, f"the login has ended{advice}" in shown) == (3, True), shown
        back = people["logged-out"]
        assert "Logged in" in back.log_in()
        until(lambda: not Shell(cluster, back).refusal(), "the same client after a new login", timeout=4 * BRIEF)

    def test_a_login_with_offline_access_stands_among_no_sessions(
        self, world: KeycloakWorld, organisation: Organisation
    ) -> None:
        """It ends with the consent, or with a log-out of all sessions."""
        realm, people, users = organisation.realm, {}, {}
        scopes = 'scopes = ["openid", "arcbridge-relay", "arcbridge-cluster"'
        for name in ("hanna", "hedda"):
            users[name] = organisation.hire(name, "developers")
            people[name] = Person.at_work(world, realm, name, change={scopes: scopes + ', "offline_access"'})
            people[name].log_in()
        # Keycloak writes its sessions behind the answers.
        sessions = f"users/{users['hanna']}/sessions"
        until(lambda: realm.admin("GET", sessions) == [], "no session of it could be ended", timeout=BRIEF)
        assert people["hanna"].refresh()[0] == 200
        realm.admin("DELETE", f"users/{users['hanna']}/consents/arcbridge")
        status, answer = people["hanna"].refresh()
        assert (status, answer["error"]) == (400, "invalid_grant")
        # A log-out voids what was issued before the second in which it comes.
        issued = claims(people["hedda"].kept["refresh_token"])["iat"]
        until(lambda: time.time() >= issued + 1, "the next second")
        realm.admin("POST", f"users/{users['hedda']}/logout")
        status, answer = people["hedda"].refresh()
        assert (status, answer["error"], answer["error_description"]) == (400, "invalid_grant", "Stale token")

    def test_keys_come_and_go(self, cluster: Cluster, world: KeycloakWorld, rotating: Organisation) -> None:
        realm = rotating.realm
        realm_id = realm.admin("GET", "")["id"]
        path = f"components?parent={realm_id}&type=org.keycloak.keys.KeyProvider"
        (first,) = [one["id"] for one in realm.admin("GET", path) if one["providerId"] == "rsa-generated"]
        for name in ("ida", "jens", "kurt"):
            rotating.hire(name, "developers")
        ida, jens, kurt = (Person.at_work(world, realm, name) for name in ("ida", "jens", "kurt"))
        ida.log_in()
        # A new key signs from now on, and the old one stays for what it has signed.
        rotating.signing_key(200)
        jens.log_in()
        assert kid(ida.kept["access_token"]) != kid(jens.kept["access_token"])
        for person in (ida, jens):
            assert "failed" not in person.run("doctor")[1]
        # The old one goes: what it signed is refused once the ends have seen a still newer one, for which they look.
        old = ida.kept["access_token"], ida.cluster_token
        assert "failed" not in thief(ida, "ida-s-twin", relay=old[0], agent=old[1], key=ida.key_file)
        rotating.signing_key(300)
        realm.admin("DELETE", f"components/{first}")
        kurt.log_in()
        until(lambda: "failed" not in kurt.run("doctor", check=False)[1], "the newest key is fetched", timeout=60)
        said = thief(ida, "ida-s-other-twin", relay=old[0], agent=old[1], key=ida.key_file)
        assert "policy: log in at the issuer that the operator names" in said
        # Its owner does not notice: the client has the refused token replaced.
        ida.start()
        assert Shell(cluster, ida).groups() == {"oidc:developers", *SIGNED_IN}
        assert kid(ida.kept["access_token"]) != kid(old[0])


class TestWhatKeycloakDoesDifferently:
    """Why the examples are as they are (docs/how-to/keycloak.md)."""

    @pytest.mark.parametrize("mapper", [False, True], ids=["as it is", "with the mapper for it"])
    def test_an_id_token_is_bound_until_the_first_refresh_alone(
        self, world: KeycloakWorld, organisation: Organisation, mapper: bool
    ) -> None:
        client = "arcbridge-nonce" if mapper else "arcbridge"
        if mapper:
            kind = {"protocol": "openid-connect", "protocolMapper": "oidc-nonce-backwards-compatible-mapper"}
            organisation.vary(
                "client-arcbridge.json", client, {}, protocolMappers=[{"name": "nonce", "config": {}, **kind}]
            )
        name = "lena" if mapper else "lars"
        organisation.hire(name, "developers")
        person = Person.at_work(
            world,
            organisation.realm,
            name,
            change={'client_id = "arcbridge"': f'client_id = "{client}"', **ONE_AUDIENCE},
        )
        person.log_in()
        nonce = ProofKey.from_jwk(person.key_file.read_bytes()).nonce()
        assert claims(person.kept["id_token"])["nonce"] == nonce
        status, answer = person.refresh(client_id=client)
        assert status == 200
        assert claims(answer["id_token"]).get("nonce") == (nonce if mapper else None)

    def test_it_ignores_the_parameters_for_audiences(self, world: KeycloakWorld, organisation: Organisation) -> None:
        organisation.hire("mats", "developers")
        change = {
            'cluster_audience_by = "scope"': 'cluster_audience_by = "resource"',
            'cluster_scopes = ["openid", "arcbridge-cluster"]\n': "",
        }
        mats = Person.at_work(world, organisation.realm, "mats", change=change)
        mats.log_in()
        before = world.agent.mark()
        assert mats.run("run", "--", "true", check=False)[0] != 0
        assert refusals(world.agent, before) == {"token.aud.forbidden"}, "it gave what the login had"

    def test_a_confidential_client_may_exchange_the_relay_s_token(
        self, cluster: Cluster, world: KeycloakWorld, organisation: Organisation
    ) -> None:
        """Then the login has the relay's scope alone, and the cluster is a client of the realm as well."""
        organisation.realm.create("clients", {"clientId": "arcbridge-cluster", "bearerOnly": True})
        exchanging, secret = {"standard.token.exchange.enabled": "true"}, "of the desk"
        organisation.vary("client-arcbridge.json", "arcbridge-desk", exchanging, publicClient=False, secret=secret)
        organisation.hire("nora", "developers")
        nora = Person.at_work(
            world,
            organisation.realm,
            "nora",
            change={
                'client_id = "arcbridge"': 'client_id = "arcbridge-desk"\nclient_secret_file = "secret"',
                'scopes = ["openid", "arcbridge-relay", "arcbridge-cluster"]': 'scopes = ["openid", "arcbridge-relay"]',
                'relay_scopes = ["openid", "arcbridge-relay"]\n': "",
                'cluster_audience_by = "scope"': 'cluster_audience_by = "exchange"',
            },
        )
        (nora.directory / "secret").write_text(secret)
        nora.log_in()
        nora.start()
        assert Shell(cluster, nora).groups() == {"oidc:developers", *SIGNED_IN}
        assert claims(nora.kept["access_token"])["aud"] == "arcbridge-relay"
        assert claims(nora.cluster_token)["aud"] == "arcbridge-cluster"


def refusals(agent: ManagedProcess, after: Mark) -> set[object]:
    """Wait until the agent has refused a token, and return by which rules it did; who was refused may hear it first."""
    wait_for_record(agent, "session refused", after=after)
    return {record["rule"] for record in records(agent, "session refused", after=after)}


def kid(token: str) -> str:
    """Which key signed a token."""
    return str(jwt.get_unverified_header(token)["kid"])
