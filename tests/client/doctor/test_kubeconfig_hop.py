"""Our contexts, what listens at their ports, and what is made of that."""

from __future__ import annotations

import json
import ssl
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from arcbridge.client.doctor.kubeconfig_hop import ContextFacts, contexts, judge_kubeconfig, kept_port
from arcbridge.client.kubeconfig.entries import Entry, Kubeconfig, render
from arcbridge.client.state import StateDirectory
from tests.client.doctor.test_relay_hops import listening, verdict
from tests.support.world import fixed_port

ALIVE = ContextFacts("prod", "prod", 47011, listening=True, ours=True)
DEAD = ContextFacts("prod", "prod", 47011)


@pytest.mark.parametrize(
    ("contexts", "cluster", "expected"),
    [
        ([], "", ("skipped", "")),
        ([ALIVE], "", ("ok", "")),
        ([ALIVE], "other", ("skipped", "")),
        ([DEAD], "prod", ("failed", "kubeconfig_dead")),
        ([DEAD], "other", ("skipped", "")),
        ([replace(DEAD, starts_itself=True)], "prod", ("ok", "")),
        ([replace(ALIVE, ours=False)], "prod", ("failed", "port_taken")),
    ],
)
def test_kubeconfig(contexts: list[ContextFacts], cluster: str, expected: tuple[str, str]) -> None:
    assert verdict(judge_kubeconfig(contexts, cluster)) == expected


def test_the_kept_port() -> None:
    taken = ContextFacts("", "prod", 47011, listening=True, holder="user mallory")
    found = judge_kubeconfig([], "prod", taken)
    assert verdict(found) == ("failed", "port_taken")
    assert "user mallory" in found.detail
    assert verdict(judge_kubeconfig([], "prod", replace(taken, ours=True))) == ("skipped", "")


def test_the_current_context_is_named_first() -> None:
    other = replace(DEAD, name="now", cluster="now", current=True)
    assert '"now", "prod" (the current one)' in judge_kubeconfig([DEAD, other], "").detail


async def test_contexts_and_ports(tmp_path: Path) -> None:
    state = StateDirectory.find(tmp_path / "state", {})
    certificates = state.certificates("prod", "https://relay.example.org:443", time.time())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pem = tmp_path / "server.pem"
    pem.write_text(certificates.server_certificate_pem + certificates.server_key_pem)
    context.load_cert_chain(pem)
    dead = fixed_port()
    async with listening(lambda writer: None, context) as ours, listening(lambda writer: None) as foreign:
        entries = {"prod": ours, "taken": foreign, "dead": dead}
        document: dict[str, list[object]] = {"clusters": [], "users": [], "contexts": []}
        for name, port in entries.items():
            text = render(Entry(name, name, f"https://127.0.0.1:{port}", "CA", "CERT", "KEY"))
            for section, items in document.items():
                items += yaml.safe_load(text)[section]
        document["contexts"].append({"name": "foreign", "context": {"cluster": "prod", "user": "me"}})
        file = tmp_path / "config"
        file.write_text(yaml.safe_dump({**document, "current-context": "dead"}))
        before = file.read_bytes()
        found = {one.name: one for one in await contexts(Kubeconfig([file]), state)}
        assert found == {
            "prod": ContextFacts("prod", "prod", ours, listening=True, ours=True),
            "taken": found["taken"],
            "dead": ContextFacts("dead", "dead", dead, current=True),
        }
        assert (found["taken"].listening, found["taken"].ours) == (True, False)
        assert file.read_bytes() == before
        (state.path / "ports.json").write_text(json.dumps({"prod at r:443": foreign}))
        kept = await kept_port(state, ("r:443",), "prod")
        assert kept is not None
        assert (kept.port, kept.listening, kept.ours) == (foreign, True, False)
        assert await kept_port(state, ("r:443",), "other") is None
        (state.path / "ports.json").write_text("damaged")
        assert await kept_port(state, ("r:443",), "prod") is None


@pytest.mark.parametrize("server", ["https://127.0.0.1:9", "https://10.0.0.1:6443"])
async def test_a_server_that_was_changed(tmp_path: Path, server: str) -> None:
    """The credential plugin serves kubectl at the endpoint alone; a client certificate is good at any address."""
    state, file = StateDirectory.find(tmp_path / "state", {}), tmp_path / "config"
    address = f"https://127.0.0.1:{fixed_port()}"
    found = []
    for plugin in (True, False):
        entry = Entry("prod", "prod", address, "CA", "CERT", "KEY", process="background", plugin=plugin)
        for text in (render(entry), render(entry).replace(address, server, 1)):
            file.write_text(text)
            found.append(judge_kubeconfig(await contexts(Kubeconfig([file]), state), "prod"))
    assert [one.code == "kubeconfig_edited" for one in found] == [False, True, False, False]
    assert server in found[1].detail
