import asyncio
import contextlib
import io
import json
import stat
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from arcbridge.cli import relay
from arcbridge.cli.parser import Invocation
from arcbridge.errors import ConfigError, EnrolmentRefused, StateError
from arcbridge.pki.authority import Authority
from arcbridge.pki.enrolment import JoinToken
from arcbridge.relay.admin import (
    DEFAULT_TTL,
    at,
    create_token,
    delete_cluster,
    end_session,
    list_clusters,
    list_sessions,
    list_tokens,
    parse_before,
    parse_ttl,
    parse_uses,
    revoke_cluster,
)
from arcbridge.relay.admin_socket import AdminSocket
from arcbridge.relay.audit.log import RelayAudit
from arcbridge.relay.data_dir import open_authority, open_registry
from arcbridge.relay.registry.base import Registry
from arcbridge.settings.config import RelayConfig, RelayTlsConfig
from tests.relay.conftest import relay_config

KEY = "a" * 64


@pytest.fixture
def config(tmp_path: Path) -> RelayConfig:
    return relay_config(tmp_path, "", public_address="relay.test:8443")


@pytest.fixture
async def registry(config: RelayConfig) -> AsyncIterator[Registry]:
    """The registry, open as the relay that runs has it."""
    opened = await open_registry(config.data_dir)
    yield opened
    await opened.close()


def run(config: RelayConfig, *command: str, **given: object) -> str:
    """What the command line prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), mock.patch("arcbridge.cli.settings.load_settings", return_value=config):
        assert getattr(relay, "_".join(command))(Invocation("relay", command, given)) == 0
    return out.getvalue()


def rfc3339(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def enrol(config: RelayConfig, token: str, ca: Authority) -> None:
    async def main() -> None:
        registry = await open_registry(config.data_dir)
        try:
            await registry.redeem_join_token(token, KEY, ca.certificate_pem)
        finally:
            await registry.close()

    asyncio.run(main())


class TestTokens:
    def test_the_printed_lines_are_all_that_an_agent_needs(self, config: RelayConfig, tmp_path: Path) -> None:
        """Before the relay's first start the command makes the CA; a real shell runs the lines that it prints."""
        text = run(
            config, "token", "create", cluster="prod", kube_server="https://api.test:6443", kube_token_file="token"
        )
        pin = open_authority(config.data_dir).pin
        lines = [line.strip() for line in text.splitlines()]
        token = next(line for line in lines if "." in line and " " not in line)
        file_line = next(line for line in lines if line.startswith("(umask"))
        agent_line = next(line for line in lines if line.startswith("arcbridge "))
        assert agent_line == (
            f"arcbridge --role agent --relay https://relay.test:8443 --relay-ca-pin {pin} "
            "--join-token-file arcbridge-prod.token --state-dir ./arcbridge-prod "
            "--kube-server https://api.test:6443 --kube-token-file token"
        )
        subprocess.run(["sh", "-c", file_line], cwd=tmp_path, check=True)
        file = tmp_path / "arcbridge-prod.token"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert JoinToken.parse(file.read_text()).text == token
        # docs/threats.md#W4: not in an argument list.
        assert token not in agent_line
        enrol(config, file.read_text(), Authority.create("cluster CA"))

    def test_without_an_api_server_it_is_for_the_chart(self, config: RelayConfig, tmp_path: Path) -> None:
        text = run(config, "token", "create", cluster="prod")
        lines = [line.strip() for line in text.splitlines()]
        pin = open_authority(config.data_dir).pin
        assert lines[9] == (
            "helm install arcbridge-agent config/helm/arcbridge-agent --namespace arcbridge --create-namespace "
            f"--set 'relays={{https://relay.test:8443}}' --set relayCAPin={pin} -f values.yaml"
        )
        assert "For an agent on a machine that is no pod give this command `--kube-server https://HOST:PORT`" in text
        subprocess.run(["sh", "-n", "-c", "\n".join(lines[6:10])], cwd=tmp_path, check=True)

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"kube_token_file": "x"}, "--kube-server is missing"),
            ({"kube_server": "https://x"}, "give --kube-token-file"),
            ({"kube_server": "https://x", "kube_client_key_file": "x"}, "give --kube-token-file"),
        ],
    )
    def test_what_an_agent_lacks_is_said(self, config: RelayConfig, given: dict[str, str], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            run(config, "token", "create", cluster="prod", **given)

    def test_as_json_yaml_and_name(self, config: RelayConfig) -> None:
        made = json.loads(run(config, "token", "create", cluster="prod", uses="3", ttl="2h", output="json"))
        assert set(made) == {"id", "token", "cluster", "uses", "expires_at", "relay", "relay_ca_pin", "command",
                             "in_cluster"}  # fmt: skip
        assert (made["cluster"], made["uses"], made["relay"]) == ("prod", 3, "https://relay.test:8443")
        expires = datetime.fromisoformat(made["expires_at"]).timestamp()
        assert expires == pytest.approx(time.time() + 7200, abs=30)
        assert made["token"].startswith(made["id"] + ".")
        assert yaml.safe_load(run(config, "token", "create", cluster="prod", output="yaml"))["uses"] == 1
        assert JoinToken.parse(run(config, "token", "create", cluster="prod", output="name"))

    def test_list_and_delete(self, config: RelayConfig) -> None:
        tokens = [run(config, "token", "create", cluster=name, output="name").strip() for name in ("prod", "test")]
        enrol(config, tokens[0], Authority.create("cluster CA"))
        rows = json.loads(run(config, "token", "list", output="json"))
        assert [(row["cluster"], row["used"], row["uses"], row["state"]) for row in rows] == [
            ("prod", 1, 1, "used up"),
            ("test", 0, 1, "open"),
        ]
        table = run(config, "token", "list")
        assert table.splitlines()[0].split() == ["ID", "CLUSTER", "STATE", "USED", "USES", "CREATED", "EXPIRES", "AT"]
        for token in tokens:
            assert token.partition(".")[0] in table
            assert token.partition(".")[2] not in table + json.dumps(rows)
        assert run(config, "token", "list", output="name").split() == [token.partition(".")[0] for token in tokens]
        # A whole token pasted is taken for its id, and its secret is not shown again.
        text = run(config, "token", "delete", id=tokens[1])
        assert tokens[1].partition(".")[2] not in text
        with pytest.raises(StateError, match="token list") as caught:
            run(config, "token", "delete", id=tokens[1])
        assert tokens[1].partition(".")[2] not in caught.value.message
        with pytest.raises(EnrolmentRefused):
            enrol(config, tokens[1], Authority.create("cluster CA"))

    async def test_expired_ones_are_told(self, config: RelayConfig) -> None:
        made = await create_token(at(config), cluster="prod", ttl=60)
        (row,) = await list_tokens(at(config, clock=lambda: made.expires_at + 1))
        assert row["state"] == "expired"
        assert made.token not in repr(made)

    def test_a_relay_with_a_certificate_from_elsewhere_has_no_pin_to_give(
        self, config: RelayConfig, tmp_path: Path
    ) -> None:
        issued = Authority.create("elsewhere").issue_server(["relay.test"])
        (tmp_path / "relay.crt").write_text(issued.certificate_pem)
        (tmp_path / "relay.key").write_text(issued.key_pem)
        tls = RelayTlsConfig(tmp_path / "relay.crt", tmp_path / "relay.key")
        config = replace(config, public_address="relay.test", tls=tls)
        text = run(config, "token", "create", cluster="prod")
        assert "--relay-ca-pin" not in text
        assert "--relay-ca-file" in text
        assert "https://relay.test:443" in text

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({}, "--cluster"),
            ({"cluster": "Prod"}, "cluster name"),
            ({"cluster": "prod", "uses": "many"}, "whole number"),
            ({"cluster": "prod", "uses": "0"}, "uses"),
            ({"cluster": "prod", "ttl": "soon"}, "15m"),
            ({"cluster": "prod", "ttl": "400d"}, "year"),
            ({"cluster": "prod", "output": "xml"}, "json"),
            ({"cluster": "prod", "uses": "2", "rebind": True}, "one use"),
        ],
    )
    def test_mistakes(self, config: RelayConfig, given: dict[str, object], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            run(config, "token", "create", **given)

    def test_without_a_public_address(self, config: RelayConfig) -> None:
        with pytest.raises(ConfigError, match="public_address"):
            run(RelayConfig(data_dir=config.data_dir), "token", "create", cluster="prod")


class TestClusters:
    async def test_while_the_relay_runs(self, config: RelayConfig, registry: Registry) -> None:
        """The commands use another connection to the registry's file than the relay that runs."""
        made = await create_token(at(config), cluster="prod")
        record = await registry.redeem_join_token(made.token, KEY, Authority.create("cluster CA").certificate_pem)
        await registry.certificate_issued("prod", time.time() + 3600)
        assert (await list_clusters(at(config))).rows[0]["state"] == "Connecting"
        await registry.seen("prod", time.time(), version="0.1.0")
        text = await asyncio.to_thread(run, config, "cluster", "list", output="json")
        (row,) = json.loads(text)
        assert (row["name"], row["state"], row["version"]) == ("prod", "Connected", "0.1.0")
        assert row["cluster_ca_pin"] == record.ca_pin
        assert "ca_pem" not in row
        text = await asyncio.to_thread(run, config, "cluster", "revoke", cluster="prod")
        assert "prod is revoked" in text
        assert await registry.revocations() == {"prod"}
        table = await asyncio.to_thread(run, config, "cluster", "list")
        assert [line.split()[:2] for line in table.splitlines()] == [["NAME", "STATE"], ["prod", "Revoked"]]
        with pytest.raises(ConfigError, match="cluster restore prod"):
            await create_token(at(config), cluster="prod")
        await asyncio.to_thread(run, config, "cluster", "restore", cluster="prod")
        assert await registry.revocations() == frozenset()
        later = time.time() + 400
        assert (await list_clusters(at(config, clock=lambda: later))).rows[0]["state"] == "Offline"
        assert (await list_clusters(at(config, clock=lambda: later + 3600))).rows[0]["state"] == "Expired"

    @pytest.mark.parametrize("verb", ["revoke", "restore"])
    async def test_unknown_and_malformed_names(self, config: RelayConfig, verb: str) -> None:
        with pytest.raises(StateError, match="data_dir"):
            await revoke_cluster(at(config), "prod")
        await (await open_registry(config.data_dir)).close()
        if verb == "restore":
            with pytest.raises(StateError, match="no cluster prod"):
                await asyncio.to_thread(run, config, "cluster", verb, cluster="prod")
        with pytest.raises(ConfigError):
            await asyncio.to_thread(run, config, "cluster", verb, cluster="../x")
        with pytest.raises(ConfigError):
            await asyncio.to_thread(run, config, "cluster", verb)

    async def test_a_cluster_that_never_came(self, config: RelayConfig, registry: Registry) -> None:
        """docs/threats.md#E12: the command says so, and the name stays refused until it is restored."""
        text = await asyncio.to_thread(run, config, "cluster", "revoke", cluster="prod")
        assert "was not known here" in text
        (row,) = json.loads(await asyncio.to_thread(run, config, "cluster", "list", output="json"))
        assert (row["name"], row["state"], row["cluster_ca_pin"]) == ("prod", "Revoked", "")
        assert not await registry.adopt("prod", Authority.create("cluster CA").certificate_pem, time.time())
        with pytest.raises(ConfigError, match="cluster restore prod"):
            await create_token(at(config), cluster="prod")
        assert "is restored" in await asyncio.to_thread(run, config, "cluster", "restore", cluster="prod")
        assert (await list_clusters(at(config))).rows == []

    async def test_who_is_connected_is_asked_of_the_relay_that_runs(
        self, config: RelayConfig, registry: Registry
    ) -> None:
        agents = [{"cluster": "prod", "agent": "a-1", "relay": relay} for relay in ("one", "two")]

        async def answer(question: Mapping[str, Any]) -> list[dict[str, Any]]:
            return [dict(row) for row in agents] if question["ask"] == "agents" else []

        socket = AdminSocket(config.data_dir, answer, RelayAudit(""))
        await socket.start()
        try:
            for name in ("prod", "test"):
                await registry.adopt(name, Authority.create(name).certificate_pem, time.time())
                await registry.seen(name, time.time())
            text = await asyncio.to_thread(run, config, "cluster", "list", output="json")
            seen = {row["name"]: (row["state"], row["agents"], row["revoked"]) for row in json.loads(text)}
            assert seen == {"prod": ("Connected", 1, False), "test": ("Offline", 0, False)}
            with pytest.raises(StateError, match="has a connected agent"):
                await delete_cluster(at(config), "prod")
            assert "is forgotten" in await asyncio.to_thread(run, config, "cluster", "delete", cluster="test")
            with pytest.raises(StateError, match="no session"):
                await end_session(at(config), "a" * 16)
            assert await asyncio.to_thread(run, config, "session", "list", output="json") == "[]\n"
        finally:
            await socket.close()

    async def test_a_cluster_shows_how_many_agents_know_the_newest_cas(
        self, config: RelayConfig, registry: Registry
    ) -> None:
        own = Authority.create("prod")
        rows = [("a", own.pin, True), ("a", own.pin, False), ("b", "", False), ("c", own.pin, None)]
        agents = [
            {"cluster": "prod", "agent": agent, "cluster_ca": pin} | ({} if newest is None else {"newest": newest})
            for agent, pin, newest in rows
        ]

        async def ask(question: Mapping[str, Any]) -> list[dict[str, Any]]:
            return agents

        await registry.adopt("prod", own.certificate_pem, time.time())
        (row,) = (await list_clusters(replace(at(config), ask=ask))).rows
        assert (row["agents"], row["newest_relay_ca"], row["newest_cluster_ca"]) == (3, 1, 2)
        (row,) = (await list_clusters(at(config))).rows
        assert (row["newest_relay_ca"], row["newest_cluster_ca"]) == (None, None), "no relay runs"

    async def test_without_a_relay_that_runs(
        self, config: RelayConfig, registry: Registry, capsys: pytest.CaptureFixture[str]
    ) -> None:
        await registry.adopt("prod", Authority.create("prod").certificate_pem, time.time())
        await registry.seen("prod", time.time())
        (row,) = (await list_clusters(at(config))).rows
        assert (row["state"], row["agents"]) == ("Connected", None)
        await asyncio.to_thread(run, config, "cluster", "list")
        assert "no relay runs on" in capsys.readouterr().err
        for asking in (list_sessions(at(config)), end_session(at(config), "a" * 16)):
            with pytest.raises(StateError, match="no relay runs on"):
                await asking
        with pytest.raises(ConfigError, match="which session"):
            await end_session(at(config), "a session")

    async def test_a_revoked_cluster_is_forgotten_when_its_certificates_have_lapsed(
        self, config: RelayConfig, registry: Registry
    ) -> None:
        await registry.adopt("prod", Authority.create("prod").certificate_pem, time.time())
        await registry.certificate_issued("prod", time.time() + 3600)
        await registry.revoke_cluster("prod")
        with pytest.raises(StateError, match="would be let in again"):
            await delete_cluster(at(config), "prod")
        assert await delete_cluster(at(config, clock=lambda: time.time() + 3601), "prod") == "prod"
        with pytest.raises(StateError, match="no cluster prod"):
            await delete_cluster(at(config), "prod")

    def test_an_empty_list_has_its_heads(self, config: RelayConfig) -> None:
        run(config, "token", "create", cluster="prod")
        assert run(config, "cluster", "list").split()[0] == "NAME"
        assert json.loads(run(config, "cluster", "list", output="json")) == []


class TestUsers:
    async def test_revoke_list_and_restore_while_a_relay_has_the_registry(
        self, config: RelayConfig, registry: Registry
    ) -> None:
        before = time.time()
        text = await asyncio.to_thread(run, config, "user", "revoke", user="oidc:alice", reason=" left ")
        assert "user oidc:alice is revoked: tokens issued before 20" in text
        (entry,) = (await registry.user_revocations()).values()
        assert (entry.user, entry.reason) == ("oidc:alice", "left")
        assert before <= entry.before <= time.time() + 1
        text = await asyncio.to_thread(run, config, "user", "revoke", user="https://i.example#7", before="2026-01-01")
        assert "before 2026-01-01T00:00:00Z are refused" in text
        rows = json.loads(await asyncio.to_thread(run, config, "user", "list", output="json"))
        assert [(row["user"], row["before"]) for row in rows] == [
            ("https://i.example#7", "2026-01-01T00:00:00Z"), ("oidc:alice", rfc3339(entry.before))
        ]  # fmt: skip
        table = (await asyncio.to_thread(run, config, "user", "list")).splitlines()
        assert table[0].split() == ["USER", "BEFORE", "REVOKED", "AT", "REASON"]
        assert table[1].split()[:2] == ["https://i.example#7", "2026-01-01T00:00:00Z"]
        assert table[2].split()[-1] == "left"
        names = await asyncio.to_thread(run, config, "user", "list", output="name")
        assert names == "https://i.example#7\noidc:alice\n"
        assert "is restored" in await asyncio.to_thread(run, config, "user", "restore", user="oidc:alice")
        assert set(await registry.user_revocations()) == {"https://i.example#7"}
        with pytest.raises(StateError, match="not revoked: 'user list'"):
            await asyncio.to_thread(run, config, "user", "restore", user="oidc:alice")

    def test_without_a_registry_or_a_user(self, config: RelayConfig) -> None:
        for command, given in ((("user", "revoke"), {"user": "a"}), (("user", "list"), {})):
            with pytest.raises(StateError, match="is data_dir right"):
                run(config, *command, **given)
        with pytest.raises(ConfigError, match="which user"):
            run(config, "user", "revoke")
        run(config, "token", "create", cluster="prod")
        with pytest.raises(ConfigError, match="200 printable characters"):
            run(config, "user", "revoke", user="a", reason="x" * 201)
        with pytest.raises(ConfigError, match="ISSUER#SUBJECT"):
            run(config, "user", "restore", user="a\nb")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, 1_800_000_001),
        ("", 1_800_000_001),
        ("2026-11-25", 1_795_564_800),
        (" 2026-11-25T12:00:00Z ", 1_795_608_000),
        ("2026-11-25T13:00:00+01:00", 1_795_608_000),
        ("2026-11-25 12:00:00.5+00:00", 1_795_608_001),
        ("1795608000", 1_795_608_000),
    ],
)
def test_times_of_a_revocation(text: object, seconds: int) -> None:
    """A time within a second means to the end of that second: tokens name whole ones."""
    assert parse_before(text, 1_800_000_000.5) == seconds


@pytest.mark.parametrize(
    "text", ["now", "1h", "2026-11-25T12:00:00", "20261125", "2026-13-01", "9" * 5000, "-1", "١" * 10]
)
def test_no_times_of_a_revocation(text: str) -> None:
    with pytest.raises(ConfigError, match="--before is a time with its zone"):
        parse_before(text, 1_800_000_000.0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, DEFAULT_TTL),
        ("", DEFAULT_TTL),
        (90, 90),
        (1.5, 1.5),
        ("90", 90),
        ("90s", 90),
        ("15m", 900),
        ("1h", 3600),
        ("7d", 604800),
        ("1h30m", 5400),
        (" 1h ", 3600),
    ],
)
def test_lives(text: object, seconds: float) -> None:
    assert parse_ttl(text) == seconds


@pytest.mark.parametrize("text", ["0", "-1h", "1y", "h", "9" * 5000, "9" * 5000 + "d", "inf", "nan", True])
def test_no_lives(text: object) -> None:
    with pytest.raises(ConfigError):
        parse_ttl(text)


def test_uses() -> None:
    assert [parse_uses(value) for value in (None, "", 5, " 7 ")] == [1, 1, 5, 7]
    for value in ("x", "-1", "1.5", "9" * 5000, True):
        with pytest.raises(ConfigError):
            parse_uses(value)
