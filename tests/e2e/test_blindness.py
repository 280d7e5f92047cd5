"""What docs/verify-blindness.md tells a reviewer to do, done: record at the relay, open all that it can open, search.

A test that searches ciphertext always passes, so the same search is also made where it must find everything: in the
same recording, opened with the client's keys.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.blindness.__main__ import main
from tests.blindness.reviewed_world import ReviewedWorld
from tests.blindness.sight import find, look
from tests.blindness.tls import Closed, read_key_log
from tests.support.cluster import KUBECTL_MINORS, Cluster
from tests.support.world import CLUSTER, CLUSTER_AUDIENCE, RELAY_AUDIENCE, ApiServer, User

SECRET = ("user", "group", "namespace", "object", "written", "answered", "typed", "printed")
"""What the markers stand for that no relay may see: names at the cluster, what is sent, what comes back."""


@dataclass
class Evidence:
    """One session's traffic, and what was at the relay at its end."""

    world: MarkedWorld
    marks: dict[str, str]
    access_token: str = ""
    cluster_token: str = ""
    relay_memory: dict[str, bytes] = field(default_factory=dict)
    relay_kept: dict[str, bytes] = field(default_factory=dict)
    """Its log, its pages and its data directory."""

    @property
    def hidden(self) -> list[str]:
        """Every text that no relay may see: each mark, and each part of the token for the cluster."""
        return [*(self.marks[name] for name in SECRET), *self.cluster_token.split(".")[1:]]


class MarkedWorld(ReviewedWorld):
    """Relay and cluster know each person by different claims."""

    def __init__(self, api: ApiServer, directory: Path, marks: dict[str, str]) -> None:
        super().__init__(api, directory=directory)
        self._marks = marks

    def authentication(self, audience: str) -> str:
        """The relay maps `sub`, the agent `email`."""
        configuration = json.loads(super().authentication(audience))
        if audience == RELAY_AUDIENCE:
            configuration["jwt"][0]["claimMappings"]["username"] = {"claim": "sub", "prefix": ""}
        return json.dumps(configuration)

    def token(self, user: User, audience: str, *, lifetime: int = 3600) -> str:
        """An access token says nothing of the names at the cluster."""
        claims: dict[str, object] = {"groups": list(user.groups)}
        if audience == CLUSTER_AUDIENCE:
            claims = {
                "groups": [*user.groups, self._marks["group"]],
                "email": self._marks["user"],
                "email_verified": True,
            }
        return self.issuer.mint(sub=user.name, aud=audience, lifetime=lifetime, **claims)


@pytest.fixture(scope="module")
def evidence(cluster: Cluster, api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evidence]:
    """A person's work through three roles, recorded at the relay's port."""
    directory = tmp_path_factory.mktemp("blindness")
    marks = {name: f"{name}{secrets.token_hex(8)}" for name in (*SECRET, "subject")}
    with MarkedWorld(api, directory, marks) as world:
        evidence = Evidence(world, marks)
        person = User(marks["subject"], ("platform",))
        client = world.start().start_client(person)
        kubectl = cluster.kubectl_for(KUBECTL_MINORS[0], client.kubeconfig)
        cluster.ensure_namespace(marks["namespace"])
        cluster.apply(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": "answer", "namespace": marks["namespace"]},
                "data": {"key": marks["answered"]},
            }
        )
        cluster.add_pod(marks["object"], marks["namespace"])
        read = kubectl.run("get", "configmap", "answer", "-n", marks["namespace"], "-o", "yaml")
        assert marks["answered"] in read.stdout
        kubectl.run(
            *("create", "configmap", "written", "-n", marks["namespace"], f"--from-literal=key={marks['written']}")
        )
        # Turned round by the pod, so that it is in the answer alone; in one piece, so that one frame has all of it.
        shell = f"read -r line; out=$(echo {marks['printed'][::-1]} | rev); echo $out; test $line = {marks['typed']}"
        done = kubectl.run(
            *("exec", "-i", "-n", marks["namespace"], marks["object"], "--", "sh", "-c", shell),
            input=marks["typed"] + "\n",
        )
        assert marks["printed"] in done.stdout
        assert marks["user"] in kubectl.run("auth", "whoami").stdout
        evidence.relay_memory, evidence.relay_kept = world.relay_memory(), world.relay_pages()
        evidence.access_token = (client.directory / "access-token").read_text()
        evidence.cluster_token = (client.directory / "id-token").read_text()
        client.process.stop()
        world.agent.stop()
        world.stop_relay()
        evidence.relay_kept |= world.relay_kept()
        world.stop_recording()
        yield evidence


def test_no_mark_is_in_what_the_relay_sees(evidence: Evidence) -> None:
    seen = evidence.world.look()
    assert sum(connection.inner is not None for connection in seen) >= 2, "both ends of a pair are recorded"
    assert all(connection.recorded.ended for connection in seen), "and all of it"
    for number, connection in enumerate(seen):
        assert find(evidence.hidden, connection.of_relay) == [], f"connection {number}"


def test_the_search_finds_each_mark_where_it_can_be_read(evidence: Evidence) -> None:
    """The client's keys open the same recording: all that was looked for in vain is there."""
    carried = [seen.carried for seen in evidence.world.look(end=True) if seen.carried is not None]
    assert carried
    opened = b"".join(each.from_client + each.from_server for each in carried)
    for text in evidence.hidden:
        assert find([text], {"opened": opened}), text


def test_what_the_page_lists_as_visible_is_what_the_relay_reads(evidence: Evidence) -> None:
    """Also shows that the relay's keys open what they are for: cluster, access token and subject are read."""
    seen = evidence.world.look()
    told = {"told": b"".join(each.outer.from_client for each in seen)}
    for text in (CLUSTER, evidence.access_token.strip(), evidence.marks["subject"]):
        assert find([text], told), text
    names = {each.inner.server_name for each in seen if each.inner is not None}
    assert names == {f"{CLUSTER}.cluster.arcbridge"}
    assert {name for each in seen if each.inner for name in each.inner.protocols} == {"arcbridge-session/1"}


def test_every_carried_byte_is_a_record_of_the_inner_tls(evidence: Evidence) -> None:
    """Behind the joins there is TLS from the first byte to the last, and the relay's keys open none of it."""
    pairs = [seen.outer for seen in evidence.world.look() if seen.inner is not None]
    for outer in pairs:
        for stream in (outer.rest_of_client, outer.rest_of_server):
            at = 0
            while at < len(stream):
                assert stream[at] in (20, 22, 23), at
                at += 5 + int.from_bytes(stream[at + 3 : at + 5])
            assert at == len(stream)
    keys = read_key_log(evidence.world.keys_of("relay"))
    ways = {outer.rest_of_client for outer in pairs} | {outer.rest_of_server for outer in pairs}
    assert len(ways) == len(pairs), "what comes from one end goes to the other, byte for byte"
    for outer in pairs:
        assert not any(random in stream for _, random in keys for stream in ways), outer.hello


def test_no_mark_is_in_the_relay_s_memory_or_in_what_it_keeps(evidence: Evidence) -> None:
    assert find(evidence.hidden, evidence.relay_memory) == []
    assert find(evidence.hidden, evidence.relay_kept) == []
    assert find([CLUSTER], evidence.relay_memory), "the memory was read"
    assert find([CLUSTER], evidence.relay_kept)
    assert {"registry.db", "/metrics"} < set(evidence.relay_kept)
    assert find([evidence.access_token.strip()], evidence.relay_kept) == []


def test_the_command_of_the_page(evidence: Evidence, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--recording", str(evidence.world.recording), "--port", str(evidence.world.relay_port)]
    arguments += ["--relay-keys", str(evidence.world.keys_of("relay"))]
    marks = [word for text in evidence.hidden for word in ("--marker", text)]
    assert main([*arguments, *marks, "--write", str(tmp_path / "seen")]) == 0
    output = capsys.readouterr().out
    assert f"{len(evidence.hidden)} markers" in output
    assert "0 found" in output
    assert f"a ClientHello for '{CLUSTER}.cluster.arcbridge'" in output
    assert any(evidence.access_token.encode() in file.read_bytes() for file in (tmp_path / "seen").iterdir())
    assert main([*arguments, *marks, "--client-keys", str(evidence.world.keys_of("client"))]) == 1
    output = capsys.readouterr().out
    assert all(text in output for text in evidence.hidden)
    assert "OPENED WITH THE CLIENT'S KEYS" in output


def test_a_relay_whose_keys_are_not_all_given_is_noticed(evidence: Evidence, tmp_path: Path) -> None:
    """Else a connection that a relay hid from its reviewer would count as one that it cannot read."""
    lines = evidence.world.keys_of("relay").read_text().splitlines()
    random = lines[-1].split()[1]
    some = tmp_path / "some.keys"
    some.write_text("\n".join(line for line in lines if random not in line))
    with pytest.raises(Closed, match="no keys"):
        look(evidence.world.recording, evidence.world.relay_port, read_key_log(some))
