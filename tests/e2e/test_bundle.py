"""docs/threats.md#O9: a bundle of each role, with a secret in each of its sources and none in the file.

The commands are real processes; no role runs beside them, so that each source which asks one says why it has nothing.
`test_canaries` makes bundles of roles that run.
"""

from __future__ import annotations

import io
import json
import secrets
import stat
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from arcbridge.bundle.archive import DIRECTORY
from tests.support.canaries import Canaries
from tests.support.processes import run
from tests.support.world import arcbridge, fixed_port

NAMES = ("alice", "berlin-factory", "platform-team", "secret-project")
RECORD = {"timestamp": "2026-11-29T12:00:00.000000Z", "level": "warning", "event": "join refused", "role": "relay"}


class Place:
    """A home with files and variables, each with a secret that the test knows."""

    def __init__(self, home: Path) -> None:
        self.home = home / "secret-project"
        self.home.mkdir()
        self.canaries = Canaries()
        self.environment = {
            "HOME": str(self.home),
            **{f"XDG_{kind}_HOME": str(self.home / kind.lower()) for kind in ("STATE", "CACHE", "CONFIG")},
            "HTTPS_PROXY": f"http://anna:{self.secret('proxy')}@127.0.0.1:1",
            "NO_PROXY": "127.0.0.1,localhost",
            "AWS_SECRET_ACCESS_KEY": self.secret("variable"),
            "ARCBRIDGE_JOIN_TOKEN": self.secret("our-variable"),
            "KUBECONFIG": str(self.file("kubeconfig", KUBECONFIG.format(self.secret("kubeconfig")))),
        }

    def secret(self, name: str) -> str:
        value = secrets.token_hex(16)
        self.canaries.add(name, value)
        return value

    def file(self, name: str, text: str) -> Path:
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_text(text)
        path.chmod(0o600)
        return path

    def log(self) -> Path:
        """A log in which other programs have written, and a library that redacts nothing."""
        fields = [
            {"reason": f"Authorization: Bearer {self.secret('log/bearer')}"},
            {"reason": f"Cookie: __Host-session={self.secret('log/cookie')}"},
            {"reason": f"http://anna:{self.secret('log/proxy')}@127.0.0.1:3128 refuses alice"},
            {"reason": f"client_secret={self.secret('log/form')}&grant_type=refresh_token"},
            {"access_token": self.secret("log/field")},
            {"reason": f"-----BEGIN PRIVATE KEY-----\n{self.secret('log/key')}"},
            {"connection": "relay.secret-project.example.org:443"},
            {"user": "alice", "cluster": "berlin-factory", "groups": ["platform-team"], "ms": 4.5},
        ]
        lines = [json.dumps({**RECORD, **one}) for one in fields]
        lines += [f"nginx: {self.secret('log/stranger')}", json.dumps({"request": self.secret("log/audit")})]
        lines.append(
            f"2026-11-29 12:00:00.000Z warning relay: x password={self.secret('log/console')} cluster=berlin-factory"
        )
        return self.file("role.log", "\n".join(lines) + "\n")

    def bundle(self, words: Sequence[str], *flags: str) -> tuple[dict[str, bytes], str]:
        """Make one; return its files, and what the command has said."""
        path = self.home / f"{secrets.token_hex(4)}.tar.gz"
        done = self.run(*words, "bundle", *flags, "--log", str(self.log()), str(path))
        assert done.returncode == 0, done.stderr
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        return unpacked(path.read_bytes()), done.stdout.decode()

    def run(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        return run(arcbridge(*words), env=self.environment, check=False, timeout=110)


def unpacked(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        found = {one.name: archive.extractfile(one) for one in archive}
        assert all(name.startswith(f"{DIRECTORY}/") for name in found)
        return {name.partition("/")[2]: file.read() for name, file in found.items() if file is not None}


KUBECONFIG = """\
apiVersion: v1
kind: Config
users: [{{name: alice, user: {{token: {}}}}}]
"""


def relay(place: Place) -> Sequence[str]:
    place.file("authentication.yaml", AUTHENTICATION)
    place.file("policy.toml", '[[allow]]\nusers = ["alice"]\nclusters = ["berlin-factory"]\n')
    place.file("secret", place.secret("client-secret"))
    config = place.file(
        "relay.toml",
        f"""
listen = "127.0.0.1:{fixed_port()}"
public_address = "127.0.0.1:1"
data_dir = "data"
authentication = "authentication.yaml"
policy = "policy.toml"
[observe]
listen = "127.0.0.1:{fixed_port()}"
[limits.users.alice]
sessions = 5
[audit.sinks.berlin-factory]
kind = "http"
address = "https://127.0.0.1:1/services/{place.secret("sink")}"
token_file = "secret"
""",
    )
    words = ("--role", "relay", "--config", str(config))
    made = place.run(*words, "token", "create", "--cluster", "berlin-factory", "-o", "name")
    place.canaries.add("join-token", made.stdout.decode().strip().partition(".")[2])
    assert place.canaries.add_keys("ca", (place.home / "data/ca.key").read_bytes()) == 1
    return words


def agent(place: Place) -> Sequence[str]:
    place.file("authentication.yaml", AUTHENTICATION)
    config = place.file(
        "agent.toml",
        f"""
relays = ["https://127.0.0.1:1"]
relay_ca_pin = "sha256:{"1" * 64}"
join_token_file = "join-token"
authentication = "authentication.yaml"
[kubernetes]
server = "https://127.0.0.1:1"
token_file = "kube-token"
impersonate_groups = ["platform-team"]
[state]
directory = "data"
[audit]
file = "audit.jsonl"
""",
    )
    place.file("join-token", f"abcdefgh.{place.secret('join-token')}")
    place.file("kube-token", place.secret("kube-token"))
    place.file("data/credential.json", json.dumps({"key": place.secret("credential")}))
    place.file("data/berlin-factory.json", place.secret("state"))
    place.file("audit.jsonl", json.dumps({"user": "alice", "path": place.secret("audit")}))
    return "--role", "agent", "--config", str(config)


def client(place: Place) -> Sequence[str]:
    place.environment["ARCBRIDGE_TOKEN"] = place.secret("token")
    program = place.file("program", f"#!/bin/sh\necho {place.secret('program')}; exit 3\n")
    program.chmod(0o700)
    config = place.file(
        "client.toml",
        f"""
relay = "https://127.0.0.1:1"
cluster = "berlin-factory"
[login]
issuer = "https://127.0.0.1:1"
client_id = "{place.secret("client-id")}"
command = ["{program}", "--password", "{place.secret("argument")}"]
""",
    )
    place.file("cache/arcbridge/tokens/0123456789abcdef.json", json.dumps({"refresh_token": place.secret("cache")}))
    place.file("state/arcbridge/clusters/berlin-factory@0123.json", place.secret("client-key"))
    return "--role", "client", "--config", str(config)


AUTHENTICATION = """\
apiVersion: apiserver.config.k8s.io/v1
kind: AuthenticationConfiguration
jwt:
- issuer: {url: "https://127.0.0.1:1", audiences: [arcbridge]}
  claimMappings: {username: {claim: sub, prefix: ""}}
"""
EXPECTED = {
    "relay": {"config-check", "doctor", "cluster-list", "policy-list", "session-list", "ca-status"},
    "agent": {"config-check", "doctor", "ca-status"},
    "client": {"config-check", "doctor", "status"},
}


@pytest.mark.parametrize(("make", "flags"), [(relay, ("--without-names",)), (agent, ()), (client, ())])
def test_no_secret_of_any_source_is_in_a_bundle(
    tmp_path: Path, make: Callable[[Place], Sequence[str]], flags: tuple[str, ...]
) -> None:
    place = Place(tmp_path)
    files, said = place.bundle(make(place), *flags)
    assert place.canaries.find(b"\n".join((*files.values(), said.encode()))) == set()
    assert place.canaries.find(json.dumps(place.environment).encode()), "the control: what is there is found"
    manifest = json.loads(files["manifest.json"])
    sources = {one.partition(".")[0] for one in (*manifest["bytes"], *manifest["missing"])}
    assert sources == {"versions", "settings", "state", "metrics", "log", *EXPECTED[make.__name__]}
    assert manifest["bytes"] == {name: len(data) for name, data in files.items() if name != "manifest.json"}
    assert {"settings.json", "state.json", "config-check.json", "doctor.json", "log.jsonl"} <= set(files)
    assert manifest["log_lines_left_out"] == 2
    assert "HTTPS_PROXY" in json.loads(files["settings.json"])["variables_set"]
    # Where the file is, and why a source is missing, is told to its own user.
    within = {name for name in NAMES if name.encode() in b"\n".join(files.values())}
    assert within == (set() if flags else set(NAMES))


def test_with_settings_that_are_wrong_the_rest_is_there(tmp_path: Path) -> None:
    """By standard output, as out of a container; and nothing that is there is replaced."""
    place = Place(tmp_path)
    config = place.file("agent.toml", f'token = "{place.secret("unknown")}"\n[state]\ndirectory = "data"\n')
    words = ("--role", "agent", "--config", str(config), "bundle")
    line = json.dumps({**RECORD, "n": 5}).encode()
    done = run(arcbridge(*words, "--log", "-", "-"), env=place.environment, input=line, timeout=110)
    files = unpacked(done.stdout)
    assert place.canaries.find(b"\n".join((*files.values(), done.stderr))) == set()
    problems = json.loads(files["config-check.json"])["problems"]
    assert ("token", 1) in {(one["setting"], one["line"]) for one in problems}
    assert json.loads(files["settings.json"])["mistakes"] == 1
    assert json.loads(files["log.jsonl"])["n"] == 5
    assert "state.json" in files
    assert b"Standard output has the bundle" in done.stderr
    there = place.file("there.tar.gz", "mine")
    refused = place.run(*words, str(there))
    assert refused.returncode == 1
    assert b"is there already" in refused.stderr
    assert there.read_text() == "mine"
