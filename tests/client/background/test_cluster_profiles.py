"""Profiles of clusters: what stands in them, and how the clusters are reached."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from arcbridge.client.background.cluster_profiles import cluster_profiles, gateway_accesses, local_accesses
from arcbridge.client.background.connection_settings import ConnectionSettings
from arcbridge.client.background.connections import Connection, Connections
from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.client.service import ClientContext, Terminal
from arcbridge.errors import ConfigError
from arcbridge.settings.config import ClientConfig
from tests.client.far_side import RELAY_CA

ROWS = [
    {"name": "berlin", "agents": 2, "last_seen": 1_700_000_000.5, "state": "Connected"},
    {"name": "munich", "agents": 0, "last_seen": None},
]


def test_a_profile() -> None:
    found = cluster_profiles(ROWS, gateway_accesses("https://gateway.example.org/", "", ["berlin"]))
    assert (found["apiVersion"], found["kind"]) == ("multicluster.x-k8s.io/v1alpha1", "ClusterProfileList")
    berlin, munich = found["items"]
    assert berlin["metadata"] == {"name": "berlin", "labels": {"x-k8s.io/cluster-manager": "arcbridge"}}
    assert berlin["spec"]["clusterManager"] == {"name": "arcbridge"}
    assert berlin["status"]["accessProviders"] == [
        {"name": "arcbridge-gateway", "cluster": {"server": "https://gateway.example.org/clusters/berlin"}}
    ]
    (condition,) = berlin["status"]["conditions"]
    assert (condition["status"], condition["lastTransitionTime"]) == ("True", "2023-11-14T22:13:20Z")
    (condition,) = munich["status"]["conditions"]
    assert (condition["status"], condition["lastTransitionTime"]) == ("False", "1970-01-01T00:00:00Z")
    assert munich["status"]["accessProviders"] == []


def test_a_gateway_with_a_ca(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text(RELAY_CA.certificate_pem)
    (access,) = gateway_accesses("https://gateway.example.org:8443", str(ca), ["berlin"]).values()
    assert access["cluster"]["server"] == "https://gateway.example.org:8443/clusters/berlin"
    assert base64.b64decode(access["cluster"]["certificate-authority-data"]) == RELAY_CA.certificate_pem.encode()
    key = RELAY_CA.issue_server(["localhost"]).key_pem
    ca.write_text(key + RELAY_CA.certificate_pem)
    (access,) = gateway_accesses("https://gateway.example.org", str(ca), ["berlin"]).values()
    assert base64.b64decode(access["cluster"]["certificate-authority-data"]) == RELAY_CA.certificate_pem.encode()
    ca.write_text(key)
    with pytest.raises(ConfigError, match=r"flag --gateway-ca-file: .*no readable certificate"):
        gateway_accesses("https://gateway.example.org", str(ca), ["berlin"])
    for url in ("http://gateway.example.org", "gateway.example.org"):
        with pytest.raises(ConfigError, match="flag --gateway"):
            gateway_accesses(url, "", ["berlin"])
    with pytest.raises(ConfigError, match="flag --gateway-ca-file"):
        gateway_accesses("https://gateway.example.org", str(tmp_path / "none"), ["berlin"])


def test_a_cluster_that_is_connected_is_reached_at_its_port(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state"), "XDG_RUNTIME_DIR": str(tmp_path)}
    relay = "https://relay.example.org"
    config = ClientConfig(relay=relay, state_dir=tmp_path / "own")
    context = ClientContext(config, Terminal(), environment=environment)
    kept = Connections(Path(BackgroundPaths.find(environment).connections))
    assert local_accesses(context) == {}
    flags = {"state_dir": str(tmp_path / "own"), "login.id_token_file": str(tmp_path / "token")}
    for cluster, at in (("berlin", relay), ("munich", "https://other.example.org"), ("hamburg", relay)):
        settings = ConnectionSettings.of({"cluster": (cluster,), "relays": (at,), **flags})
        kept.add(Connection(settings, cluster, cluster, (str(tmp_path / "kubeconfig"),)))
    context.state.remember_port(context.relays.names, "berlin", 47011)
    found = local_accesses(context)
    assert set(found) == {"berlin"}, "munich is at another relay, hamburg was never reached"
    cluster = found["berlin"]["cluster"]
    assert (found["berlin"]["name"], cluster["server"]) == ("arcbridge", "https://127.0.0.1:47011")
    assert b"BEGIN CERTIFICATE" in base64.b64decode(cluster["certificate-authority-data"])
    (extension,) = cluster["extensions"]
    assert extension["name"] == "clusterprofiles.multicluster.x-k8s.io/exec/additional-args"
    assert extension["extension"][:2] == ["--cluster", "berlin"]
