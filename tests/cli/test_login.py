"""`login`, `logout` and `whoami` as people start them: processes, a relay's API and an issuer that are real."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import signal
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest

from arcbridge.client.credentials import proof_keys
from arcbridge.errors import ExitCode
from arcbridge.net.tls import ALPN_HTTP, outer_server_contexts
from arcbridge.pki.authority import Authority
from arcbridge.relay.http.login_settings import login_document
from arcbridge.settings.config import RelayLoginConfig
from tests.relay.api_station import Relay, serving
from tests.support.issuer import Issuer
from tests.support.world import fixed_port

ROOT = Path(__file__).parents[2]
DISCOVERY = "/.well-known/openid-configuration"
CODE = re.compile(r"enter the code (\S+)")


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    with Issuer(tmp_path_factory.mktemp("issuer")) as issuer:
        yield issuer


@pytest.fixture
def document(issuer: Issuer) -> dict[str, Any]:
    """What the relay says about logins; a test may change it."""
    found = login_document(RelayLoginConfig(issuer.url, "cli", grant_types=("device-code",)))
    assert found is not None
    return found


@pytest.fixture
async def relay(document: dict[str, Any], tmp_path: Path) -> AsyncIterator[Relay]:
    (tmp_path / "relay").mkdir()
    async with serving(tmp_path / "relay", document) as relay:
        yield relay


class Person:
    """A home, and its user's terminal."""

    def __init__(self, home: Path, issuer: Issuer) -> None:
        home.mkdir()
        self.home = home
        self.issuer = issuer
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT)}

    async def start(self, *arguments: str, **options: Any) -> asyncio.subprocess.Process:
        streams = {"stdin": asyncio.subprocess.DEVNULL, "stdout": asyncio.subprocess.PIPE}
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "arcbridge", *arguments),
            **(streams | {"stderr": asyncio.subprocess.PIPE} | options),
            env=self.environment,
        )

    async def run(self, *arguments: str) -> tuple[int | None, str, str]:
        """Run a command that asks nothing: status, stdout, stderr."""
        process = await self.start(*arguments)
        out, err = await asyncio.wait_for(process.communicate(), 30)
        return process.returncode, out.decode(), err.decode()

    async def log_in(self, *arguments: str, user: str = "alice") -> tuple[int | None, str, str]:
        """Run a login to its end, with the code entered on another device."""
        process = await self.start("login", "--force", "--wait", "100s", *arguments)
        assert process.stderr is not None
        assert process.stdout is not None
        said = b""
        async with asyncio.timeout(30):
            while not (found := CODE.search(said.decode())) and (line := await process.stderr.readline()):
                said += line
            if found:
                await asyncio.to_thread(self.issuer.approve, found[1], user)
            out, rest = await process.stdout.read(), await process.stderr.read()
            return await process.wait(), out.decode(), (said + rest).decode()

    @contextlib.asynccontextmanager
    async def at_terminal(self, *arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, Terminal]]:
        main, other = pty.openpty()
        process = await self.start(*arguments, stdin=other, stderr=other)
        os.close(other)
        try:
            yield process, Terminal(main)
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()
            os.close(main)

    @property
    def profiles(self) -> list[Path]:
        return sorted(self.home.glob(".local/state/arcbridge/relays/[!.]*"))


class Terminal:
    """The end of a terminal at which a person sits."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.shown = ""

    async def until(self, words: str) -> str:
        """Wait until the terminal shows these words; return all that it shows."""
        async with asyncio.timeout(30):
            while words not in self.shown:
                self.shown += (await asyncio.to_thread(os.read, self._descriptor, 4096)).decode()
        return self.shown.replace("\r", "")

    def type(self, line: str) -> None:
        os.write(self._descriptor, f"{line}\n".encode())


@pytest.fixture
def person(issuer: Issuer, tmp_path: Path) -> Person:
    return Person(tmp_path / "home", issuer)


def url(relay: Relay) -> str:
    return f"https://127.0.0.1:{relay.port}"


def known(relay: Relay, issuer: Issuer) -> list[str]:
    """The words of a script that knows its relay."""
    ca = ["--oidc-ca-file", str(issuer.ca_file)]
    login = ["--oidc-issuer-url", issuer.url, "--oidc-client-id", "cli", "--grant-type", "device-code"]
    return [url(relay), "--relay-ca-pin", relay.authority.pin, *login, *ca]


class TestFirstContact:
    async def test_b21_both_are_shown_and_asked_for_once(self, person: Person, relay: Relay, issuer: Issuer) -> None:
        async with person.at_terminal("login", url(relay), "--oidc-ca-file", str(issuer.ca_file)) as (process, screen):
            shown = await screen.until("[y/N] ")
            assert shown == (
                f"{url(relay)} is not known here.\n"
                "Compare with what its operator gave you:\n"
                "  relay's CA\n"
                f"    {relay.authority.pin}\n"
                f'  log in at           "{issuer.url}"\n'
                '  as client           "cli"\n'
                '  scopes              "openid" "profile" "email" "offline_access"\n'
                "  relay's audience    none; the issuer decides\n"
                '  relay\'s scopes      "openid" "profile" "email" "offline_access"\n'
                "  clusters' audience  none: every cluster gets the one id token\n"
                "  clusters' scopes    none\n"
                "  you log in          by a code for another device, without the browser: the\n"
                "                      issuer's id token is then bound to no key\n"
                "  bound to a key      yes, where the issuer can\n"
                "Trust all of it? [y/N] "
            )
            assert not person.profiles, "nothing is kept before the answer"
            screen.type("y")
            code = CODE.search(await screen.until("or open"))
            assert code is not None
            await asyncio.to_thread(issuer.approve, code[1])
            assert process.stdout is not None
            out = (await asyncio.wait_for(process.stdout.read(), 30)).decode()
            assert out.startswith("Logged in as alice@example.com, until ")
            assert await process.wait() == ExitCode.DONE
        (profile,) = person.profiles
        assert stat.S_IMODE(profile.stat().st_mode) == 0o700
        assert {stat.S_IMODE(file.stat().st_mode) for file in profile.iterdir()} == {0o600}
        # Now it is known, and neither the relay nor the CA of the issuer has to be named.
        status, out, err = await person.log_in(user="bob")
        assert (status, "Trust" in err) == (ExitCode.DONE, False)
        assert out.startswith("Logged in as bob@example.com")

    async def test_b23_without_a_terminal_it_says_what_to_compare(
        self, person: Person, relay: Relay, issuer: Issuer
    ) -> None:
        status, out, err = await person.run("login", url(relay))
        assert (status, out) == (ExitCode.FAILURE, "")
        assert err == (
            f"error: {url(relay)} names what nothing here vouches for; compare each value with what its operator says "
            f"and add\n  --relay-ca-pin {relay.authority.pin} --oidc-issuer-url {issuer.url} --oidc-client-id cli "
            "--grant-type device-code\nor accept all of it unseen with --trust-first-use\n"
        )

    async def test_a_script_names_both(self, person: Person, relay: Relay, issuer: Issuer) -> None:
        status, out, err = await person.log_in(*known(relay, issuer))
        assert status == ExitCode.DONE, err
        assert "Logged in as alice@example.com" in out
        kept = json.loads((person.profiles[0] / "profile.json").read_text())
        assert kept["from_relay"]
        assert kept["ca_pin"] == relay.authority.pin

    async def test_b23_another_pin(self, person: Person, relay: Relay) -> None:
        other = Authority.create("another").pin
        status, _, err = await person.run("login", url(relay), "--relay-ca-pin", other, "--trust-first-use")
        assert status == ExitCode.FAILURE
        assert f"expected {other}, found {relay.authority.pin}" in err
        assert not person.profiles


class TestLater:
    async def test_b22_another_issuer_is_refused(
        self, person: Person, relay: Relay, issuer: Issuer, document: dict[str, Any]
    ) -> None:
        assert (await person.log_in(*known(relay, issuer)))[0] == ExitCode.DONE
        document["issuer"] = "https://login.example.net"
        status, _, err = await person.run("login", "--trust-first-use")
        assert status == ExitCode.FAILURE
        assert f'than the one that you trusted (issuer: "{issuer.url}" → "https://login.example.net")' in err
        assert f"`arcbridge login --renew-trust {url(relay)}`" in err
        # And the login that is there goes on to count.
        assert (await person.run("whoami"))[0] == ExitCode.DONE

    async def test_a_relay_that_is_down_or_mute_stops_no_login(
        self, person: Person, issuer: Issuer, document: dict[str, Any], tmp_path: Path
    ) -> None:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
        authority, port = Authority.create("relay CA"), fixed_port()
        async with serving(tmp_path / "one", document, authority=authority, port=port) as relay:
            assert (await person.log_in(*known(relay, issuer)))[0] == ExitCode.DONE
        status, out, err = await person.log_in()
        assert (status, "Logged in" in out) == (ExitCode.DONE, True)
        assert "cannot be asked now (" in err
        async with serving(tmp_path / "two", None, authority=authority, port=port):
            assert (await person.log_in())[0] == ExitCode.DONE


class TestTwoRelays:
    async def test_the_last_login_counts_unless_one_is_named(
        self, person: Person, relay: Relay, issuer: Issuer, document: dict[str, Any], tmp_path: Path
    ) -> None:
        (tmp_path / "second").mkdir()
        async with serving(tmp_path / "second", {**document, "client_id": "other"}) as second:
            await person.log_in(*known(relay, issuer))
            assert (await person.run("whoami"))[2] == "", "with one relay there is nothing to say"
            await person.log_in(*known(second, issuer), user="bob")
            assert len(person.profiles) == 2
            status, out, err = await person.run("whoami", "-o", "name")
            assert (status, out) == (ExitCode.DONE, "bob@example.com\n")
            assert err == f"at {url(second)}, the last login; for another one give --relay ({url(relay)})\n"
            status, out, err = await person.run("whoami", "-o", "name", "--relay", url(relay))
            assert (status, out, err) == (ExitCode.DONE, "alice@example.com\n", "")
            # Each command names the one that it is about, and the others.
            here, there = f"{url(second)} as bob@example.com", f"{url(relay)} as alice@example.com"
            assert f"also logged in   {there} (--relay URL)\n" in (await person.run("whoami"))[1]
            said = json.loads((await person.run("whoami", "-o", "json"))[1])
            assert said["others"] == [{"relay": url(relay), "user": "alice@example.com"}]
            assert (await person.run("status"))[1].splitlines()[1] == f"Logged in at {here}; also at {there}"
            logins = json.loads((await person.run("status", "-o", "json"))[1])["logins"]
            assert [one["relay"] for one in logins] == [url(second), url(relay)]
            # One is left, and the other one stays.
            out = (await person.run("logout", "--relay", url(second)))[1]
            assert (
                out == f"Logged out at {here}. Still logged in at {there}; `arcbridge logout --relay URL` ends one.\n"
            )
            status, _, err = await person.run("whoami", "--relay", url(second))
            assert status == ExitCode.LOGIN
            assert err.endswith(f"\nlogged in at {there}\n")
            assert (await person.run("status"))[1].splitlines()[1] == f"Not logged in, but at {there}"
            assert (await person.run("whoami", "--relay", url(relay)))[0] == ExitCode.DONE
            status, _, err = await person.run("clusters", "--relay", "https://127.0.0.1:1")
            assert status == ExitCode.LOGIN
            assert err.startswith(
                f"error: no login at https://127.0.0.1:1, and there is one at {there}; run `arcbridge login"
            )
            assert err.endswith("\nthe relay is that of flag --relay\n")

    async def test_b42_a_relay_is_shown_nothing_of_another_ones_login(
        self, person: Person, relay: Relay, issuer: Issuer, document: dict[str, Any]
    ) -> None:
        """It names the same issuer, client, audience and scopes, and the user has said yes, and not logged in."""
        await person.log_in(*known(relay, issuer))
        asked: list[bytes] = []
        authority = Authority.create("hostile relay")
        issued = authority.issue_server(["127.0.0.1"])
        contexts = outer_server_contexts(issued.certificate_pem, issued.key_pem, authority.certificate_pem)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                asked.append(head := await reader.readuntil(b"\r\n\r\n"))
                body = json.dumps(document) if b"/v1/login" in head else authority.certificate_pem
                writer.write(f"HTTP/1.0 200 OK\r\n\r\n{body}".encode())
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=contexts[ALPN_HTTP]) as server:
            other = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            ca = ["--oidc-ca-file", str(issuer.ca_file)]
            async with person.at_terminal("login", other, *ca) as (process, screen):
                shown = " ".join((await screen.until("[y/N] ")).split())
                assert f"{other} will get tokens that are good at {url(relay)}, too" in shown
                screen.type("y")
                await screen.until("or open")
                process.kill()
            for words in (["clusters"], ["whoami", "--check"]):
                status, _, err = await person.run(*words, "--relay", other)
                assert status == ExitCode.LOGIN, err
        assert {head.split()[1] for head in asked} == {b"/v1/ca", b"/v1/login"}
        assert not [head for head in asked if b"uthorization" in head]
        assert (await person.run("whoami", "--relay", url(relay)))[0] == ExitCode.DONE


class TestWhoami:
    async def test_a_login_where_there_is_one(self, person: Person, relay: Relay, issuer: Issuer) -> None:
        """It says so and ends; `--force` logs in anew."""
        assert (await person.log_in(url(relay), *known(relay, issuer)))[0] == ExitCode.DONE
        status, out, err = await person.run("login", url(relay))
        assert (status, err) == (ExitCode.DONE, "")
        assert out.startswith(f"You are logged in at {url(relay)} as alice@example.com, until ")
        assert out.endswith("`arcbridge login --force` logs in anew.\n")
        assert (await person.log_in(url(relay), user="bob"))[1].startswith("Logged in as bob@example.com")

    async def test_no_login_waits_for_a_user_who_is_not_there(
        self, person: Person, relay: Relay, issuer: Issuer
    ) -> None:
        """As in a job with a stray `login`, which waited for the code's whole life."""
        status, _, err = await person.run("login", url(relay), *known(relay, issuer))
        assert status == ExitCode.LOGIN
        assert "there is no terminal, so no user is there to log in: a job uses `arcbridge run --workload …`" in err
        assert "enter the code" not in err
        status, _, err = await person.run("login", "--wait", "1s", url(relay), *known(relay, issuer))
        assert status == ExitCode.LOGIN
        assert "the login was not done within 1 s (--wait); start again" in err
        status, _, err = await person.run("login", "--wait", "soon", url(relay))
        assert (status, err) == (ExitCode.USAGE, "error: flag --wait: 'soon' is no duration; write 60s or 10m\n")

    async def test_logged_out(self, person: Person, relay: Relay, issuer: Issuer) -> None:
        status, out, err = await person.run("whoami")
        assert (status, out) == (ExitCode.LOGIN, "")
        assert err == "error: you are not logged in; run `arcbridge login https://RELAY`\n"
        await person.log_in(*known(relay, issuer))
        await person.run("logout")
        status, _, err = await person.run("whoami")
        assert status == ExitCode.LOGIN
        assert err == f"error: you are not logged in at {issuer.url}; run `arcbridge login {url(relay)}`\n"

    async def test_logged_in(self, person: Person, relay: Relay, issuer: Issuer) -> None:
        issuer.settings(dpop="on")
        try:
            await person.log_in(*known(relay, issuer))
        finally:
            issuer.settings(dpop="off")
        before = issuer.requests(DISCOVERY)
        status, out, _ = await person.run("whoami", "-o", "json")
        assert status == ExitCode.DONE
        found = json.loads(out)
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", found.pop("expires"))
        assert len(found.pop("key")) == 43
        assert found == {
            "user": "alice@example.com",
            "subject": "alice",
            "issuer": issuer.url,
            "relay": url(relay),
            "renews": True,
            "source": "login",
            "groups": ["platform"],
            "others": [],
        }
        _, table, _ = await person.run("whoami")
        assert "until" in table
        assert "renewed by itself" in table
        assert issuer.requests(DISCOVERY) == before, "nothing is asked"

    async def test_check_asks_the_relay(self, person: Person, relay: Relay, issuer: Issuer) -> None:
        await person.log_in(*known(relay, issuer))
        # This relay takes none of the issuer's tokens.
        status, _, err = await person.run("whoami", "--check")
        assert status == ExitCode.LOGIN
        assert "error: the relay does not accept the access token (its audience is arcbridge-relay)" in err


class TestLogout:
    async def test_the_issuer_forgets_too(self, person: Person, relay: Relay, issuer: Issuer) -> None:
        await person.log_in(*known(relay, issuer))
        asked = issuer.requests("/revoke")
        status, out, err = await person.run("logout")
        assert (status, out, err) == (ExitCode.DONE, f"Logged out at {url(relay)} as alice@example.com.\n", "")
        assert issuer.requests("/revoke") == asked + 1
        assert not list(person.home.rglob("tokens/*.json"))
        assert (await person.run("logout"))[1] == f"There was no login at {url(relay)} to forget.\n"
        assert issuer.requests("/revoke") == asked + 1

    async def test_a_login_that_is_damaged_is_not_the_lack_of_one_and_is_forgotten(
        self, person: Person, relay: Relay, issuer: Issuer
    ) -> None:
        await person.log_in(*known(relay, issuer))
        (file,) = person.home.rglob("tokens/*.json")
        key = file.with_suffix(".key")
        claims = {"nonce": proof_keys.load_or_make(key).nonce(), "exp": 2_000_000_000}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"access_token": jwt.encode(claims, "k" * 32)}))
        key.chmod(0o644)
        _, out, err = await person.run("status")
        assert "ogged in" not in out
        assert err.startswith("warning: other users may read the key")
        status, out, _ = await person.run("logout")
        assert (status, out) == (ExitCode.DONE, f"Logged out at {url(relay)}.\n")
        assert not list(person.home.rglob("tokens/*.json"))

    async def test_a_login_with_other_settings_ends_the_former_one(
        self, person: Person, relay: Relay, issuer: Issuer
    ) -> None:
        """Its file has another name, by which no `logout` would find it."""
        await person.log_in(*known(relay, issuer))
        (former,) = person.home.rglob("tokens/*.json")
        asked = issuer.requests("/revoke")
        status, _, err = await person.log_in(*known(relay, issuer), "--oidc-audience", "other-relay")
        assert status == ExitCode.DONE, err
        (now,) = person.home.rglob("tokens/*.json")
        assert now != former
        assert issuer.requests("/revoke") == asked + 1
        await person.log_in(url(relay))
        assert list(person.home.rglob("tokens/*.json")) == [now]
        assert issuer.requests("/revoke") == asked + 1, "the same login once more ends nothing"

    async def test_an_issuer_that_is_down_is_told_of_and_stops_nothing(
        self, person: Person, relay: Relay, issuer: Issuer
    ) -> None:
        await person.log_in(*known(relay, issuer))
        issuer.down()
        try:
            status, out, err = await person.run("logout")
        finally:
            issuer.down(False)
        assert (status, out) == (ExitCode.DONE, f"Logged out at {url(relay)} as alice@example.com.\n")
        assert err.startswith(f"warning: the refresh token was not revoked at {issuer.url}: ")
        assert not list(person.home.rglob("tokens/*.json"))


class TestStumbles:
    """What people stumbled over before they were logged in."""

    async def test_a_proxy_without_a_login_says_so_before_it_takes_a_port(self, person: Person) -> None:
        relay = ["--role", "client", "--relay", "https://127.0.0.1:28443", "-n", "berlin-factory"]
        status, out, err = await person.run(*relay)
        assert (status, out) == (ExitCode.LOGIN, "")
        assert "error: no login is configured; run `arcbridge login https://127.0.0.1:28443`" in err
        assert not list(person.home.rglob("ports.json"))
        status, out, err = await person.run(*relay, "--token-file", "sa")
        assert (status, out) == (ExitCode.LOGIN, "")
        assert "--token-file are for the cluster, and the relay needs a login of its own; run `arcbridge login" in err

    async def test_ctrl_c_during_a_login_is_no_success(self, person: Person, issuer: Issuer) -> None:
        flags = ["--oidc-issuer-url", issuer.url, "--oidc-client-id", "cli", "--oidc-ca-file", str(issuer.ca_file)]
        words = ["proxy", "--relay", "https://127.0.0.1:1", "-n", "berlin", *flags, "--port", "0"]
        words += ["--grant-type", "device-code"]
        main, other = pty.openpty()
        process = await person.start(*words, stdin=other, stderr=other)
        os.close(other)
        assert process.stdout is not None
        shown = b""
        async with asyncio.timeout(30):
            while not CODE.search(shown.decode()):
                line = await process.stdout.readline()
                assert line, shown
                shown += line
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 30) == ExitCode.INTERRUPTED
        os.close(main)
