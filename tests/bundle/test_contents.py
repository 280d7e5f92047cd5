"""What a bundle lets in: known keys, known forms, and with `without_names` nothing of another author."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from arcbridge.bundle.contents import ABSENT, DOCUMENTS, NAMES, ROWS, SET, UNSET, Contents
from arcbridge.bundle.log_lines import read_lines
from arcbridge.settings.config import (
    AgentConfig,
    AuditSinkConfig,
    ClientConfig,
    GraphConfig,
    LoginConfig,
    RelayConfig,
    RelayLimitsConfig,
    RelayUserLimitsConfig,
)

CANARY = "Zq8 hunter2/canary?of=a%setting"
"""What no form of a setting takes: of the forms that a secret may have it is the one with the most characters."""


def filled(kind: Any, text: str) -> Any:
    """Settings in which each text is `text`, and each table has one entry by that name."""
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for field in fields(kind):
        hint = hints[field.name]
        if is_dataclass(hint):
            values[field.name] = filled(hint, text)
        elif get_origin(hint) is dict:
            values[field.name] = {text: filled(get_args(hint)[1], text)}
        elif hint is str:
            values[field.name] = text
        elif Path in (hint, *get_args(hint)):
            values[field.name] = Path("/etc/arcbridge", text)
        elif get_origin(hint) is tuple:
            values[field.name] = (text, text)
    return kind(**values)


@pytest.mark.parametrize("kind", [RelayConfig, AgentConfig, ClientConfig])
def test_no_text_of_a_setting_is_shown_that_has_not_the_form_of_it(kind: Any) -> None:
    """A setting that comes to be is `set` until someone says what may be seen of it."""
    shown = Contents(without_names=False).settings(filled(kind, CANARY))
    leaked = {path for path, value in shown.items() if "hunter2" in json.dumps(value)}
    assert {path.rpartition(".")[2] for path in leaked} <= set(NAMES)
    tables = {path for path in shown if "hunter2" in path}
    assert all(path.split(".")[0] in ("limits", "audit", "graph", "regions", "targets") for path in tables)
    assert SET in shown.values()
    assert ABSENT in shown.values()
    hidden = Contents(without_names=True).settings(filled(kind, CANARY))
    assert "hunter2" not in json.dumps(hidden)
    assert len(hidden) == len(shown)


@pytest.mark.parametrize(
    ("config", "path", "shown"),
    [
        (ClientConfig(relay="https://relay.test:8443"), "relay", "https://relay.test:8443"),
        (ClientConfig(relay="https://anna:hunter2@relay.test"), "relay", SET),
        (ClientConfig(relay="https://relay.test/?token=hunter2"), "relay", SET),
        (ClientConfig(relay_ca_pin="sha256:" + "ab" * 32), "relay_ca_pin", "sha256:" + "ab" * 32),
        (ClientConfig(relay_ca_pin="hunter2"), "relay_ca_pin", SET),
        (ClientConfig(token_file=Path(__file__)), "token_file", __file__),
        (ClientConfig(token_file=Path("/etc/hunter2")), "token_file", ABSENT),
        (ClientConfig(token_file=Path("/etc/" + "hunter2" * 100)), "token_file", ABSENT),
        (ClientConfig(token_file=Path("/etc/hunter2\0")), "token_file", ABSENT),
        (RelayConfig(), "data_dir", "/var/lib/arcbridge"),
        (ClientConfig(), "token_file", UNSET),
        (ClientConfig(port=0), "port", 0),
        (ClientConfig(login=LoginConfig(command=("get-token", "--password", "hunter2"))), "login.command", SET),
        (ClientConfig(login=LoginConfig(workload="env:hunter2")), "login.workload", SET),
        (ClientConfig(login=LoginConfig(client_id="hunter2")), "login.client_id", SET),
        (ClientConfig(login=LoginConfig(issuer="https://id.test/realms/x")), "login.issuer", "https://id.test/realms/x"),
        (ClientConfig(login=LoginConfig(issuer="https://a:b@id.test/")), "login.issuer", SET),
    ],
)  # fmt: skip
def test_what_a_setting_shows(config: ClientConfig, path: str, shown: object) -> None:
    assert Contents(without_names=False).settings(config)[path] == shown


def test_a_secret_that_stands_for_its_file_is_in_no_source(tmp_path: Path) -> None:
    """`client_secret_file = "hunter2/x"`: each message that the file is not there has the secret in it."""
    absent = tmp_path / "hunter2" / "x"
    config = ClientConfig(login=LoginConfig(client_secret_file=absent))
    for without_names in (False, True):
        contents = Contents(without_names=without_names)
        assert contents.settings(config)["login.client_secret_file"] == ABSENT
        problem = {"severity": "error", "message": f"{absent} does not exist", "source": f"{absent.parent}: line 3"}
        shown = contents.document("config check", {"ok": False, "problems": [problem]})
        assert "hunter2" not in json.dumps(shown)
        assert without_names or shown["problems"][0]["message"] == "[no such file] does not exist"
        line = {"timestamp": "x", "level": "info", "event": f"cannot read {absent}", "role": "client", "n": f"{absent}"}
        text, _ = read_lines(json.dumps(line).encode(), contents)
        assert json.loads(text)["event"] == "cannot read [no such file]"
        assert "hunter2" not in text


def test_a_collector_s_path_and_what_an_application_is_known_by_are_not_shown() -> None:
    """Some collectors have the token in the path of their URL."""
    config = replace(
        RelayConfig(),
        audit=replace(RelayConfig().audit, sinks={"s": AuditSinkConfig("http", "https://in.test/hunter2")}),
        graph={"g": GraphConfig(client_id="hunter2", tenant="hunter2")},
    )
    shown = Contents(without_names=False).settings(config)
    assert (shown["audit.sinks.s.address"], shown["audit.sinks.s.kind"]) == (SET, "http")
    assert "hunter2" not in json.dumps(shown)


def test_one_name_has_one_number_in_all_sources() -> None:
    contents = Contents(without_names=True)
    users = {"bob": RelayUserLimitsConfig(5), "alice": RelayUserLimitsConfig(6)}
    settings = contents.settings(RelayConfig(limits=RelayLimitsConfig(users=users)))
    assert (settings["limits.users.user-1.sessions"], settings["limits.users.user-2.sessions"]) == (5, 6)
    rows = [{"session": "01K5", "user": "alice", "cluster": "berlin", "agent": "pod-of-berlin", "source": "192.0.2.7"}]
    (row,) = contents.document("session list", rows)
    assert row == {"session": "01K5", "user": "user-2", "cluster": "cluster-1", "agent": None}
    page = 'arcbridge_relay_x{cluster="berlin",result="a",later="b"} 3\n'
    assert contents.metrics(page) == 'arcbridge_relay_x{cluster="cluster-1",result="a",later="later-1"} 3\n'


@pytest.mark.parametrize("command", DOCUMENTS)
def test_a_document_has_known_keys_alone(command: str) -> None:
    """Whatever another version prints: what is not on the list is not there, and a text is where a text may be."""
    document: Any = {"unknown": CANARY, "token": CANARY}
    for item in DOCUMENTS[command].split():
        *parents, leaf = item.partition("@")[0].rstrip("…^").split(".")
        table = document
        for one in parents:
            table = table.setdefault(one, [{"unknown": CANARY, "secret": {"deep": CANARY}}])[0]
        table[leaf] = CANARY
    shown = Contents(without_names=False).document(command, [document])
    assert "unknown" not in json.dumps(shown)
    assert "secret" not in json.dumps(shown)
    assert "hunter2" in json.dumps(shown), "a text may be a sentence"
    hidden = Contents(without_names=True).document(command, [document])
    assert "hunter2" not in json.dumps(hidden)
    for strange in (None, CANARY, 5, [CANARY], {"ok": {"deep": [CANARY]}}, {"hops": CANARY}):
        assert "hunter2" not in json.dumps(Contents(without_names=False).document(command, strange))


@pytest.mark.parametrize(
    ("hop", "shown"),
    [
        ("relay's CA", True),
        ("API server", True),
        ("keys of issuer jwt[12]", True),
        ("running relay: policy", True),
        ("audit sink berlin", False),
        ("running relay: audit sink berlin", False),
        ("groups by graph.berlin", False),
        ("relay berlin.example.org:443", False),
        ("TCP (berlin:443)", False),
    ],
)
def test_what_a_finding_is_about_has_no_name_in_it(hop: str, shown: bool) -> None:
    document = {"hops": [{"hop": hop, "state": "failed", "code": "x"}]}
    hidden = Contents(without_names=True).document("doctor", document)
    assert hidden == {"hops": [{"hop": hop if shown else "hop-1", "state": "failed", "code": "x"}]}
    assert Contents(without_names=False).document("doctor", document) == document


def test_a_text_that_is_let_in_is_redacted() -> None:
    hops = [{"hop": "proxy", "detail": "http://anna:hunter2@proxy:3128 with Authorization: Basic aHVudGVyMg==", "x": 1}]
    shown = json.dumps(Contents(without_names=False).document("doctor", {"ok": False, "hops": hops}))
    assert "hunter2" not in shown
    assert "aHVudGVyMg" not in shown
    assert "proxy:3128" in shown


def test_a_list_has_an_end_and_says_so() -> None:
    contents = Contents(without_names=False)
    shown = contents.document("cluster list", [{"name": str(n)} for n in range(ROWS + 5)])
    assert shown[ROWS - 1 :] == [{"name": str(ROWS - 1)}, "5 more"]
    assert contents.document("cluster list", [{"name": "a"}]) == [{"name": "a"}]


def test_only_samples_of_ours_are_metrics() -> None:
    page = f"""# HELP arcbridge_agent_x {CANARY}
arcbridge_agent_x 1
process_open_fds 12.0
other_program{{token="hunter2"}} 1
arcbridge_agent_y{{user="hunter2"}} {CANARY}
arcbridge_agent_z{{relay="a\\"b",le="+Inf"}} 2e+06
{CANARY}
"""
    shown = Contents(without_names=False).metrics(page).splitlines()
    assert shown[:2] == ["arcbridge_agent_x 1", "process_open_fds 12.0"]
    assert len(shown) == 3
    assert shown[2] == 'arcbridge_agent_z{relay="a\\"b",le="+Inf"} 2e+06'


def test_files_of_ours_keep_their_names() -> None:
    contents = Contents(without_names=True)
    assert contents.path(("local-ca", "ca.key")) == "local-ca/ca.key"
    assert contents.path(("registry.db-wal",)) == "registry.db-wal"
    assert contents.path(("clusters", "berlin@0123.json")) == "clusters/file-1"
    assert contents.path(("clusters", "munich@0123.json")) == "clusters/file-2"
    assert Contents(without_names=False).path(("clusters", "berlin@0123.json")) == "clusters/berlin@0123.json"
