"""Shows the clusters of a relay as ClusterProfile objects (KEP-4322), for programs that read an inventory.

A profile says where its cluster's API server is reached from here: at the local endpoint of the background process,
with `arcbridge credential` as the access provider, or at a gateway, with whichever program gives the caller's token. It
holds no secret. Source: sigs.k8s.io/cluster-inventory-api and KEP-5339 (how a profile names arguments of a plugin).
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from arcbridge.client.background.connections import connected
from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.client.relay.relay_profile import organisation
from arcbridge.client.service import ClientContext
from arcbridge.client.session.restrictions import endpoint_name, restrictions_of
from arcbridge.errors import ArcbridgeError, ConfigError, StateError
from arcbridge.net.address import parse_address
from arcbridge.pki.authority import certificates_alone
from arcbridge.units import rfc3339

API_VERSION: Final = "multicluster.x-k8s.io/v1alpha1"
MANAGER: Final = "arcbridge"
"""The cluster manager, and the access provider whose plugin is `arcbridge credential`."""
GATEWAY: Final = "arcbridge-gateway"
"""The access provider of clusters that are reached through a gateway."""
ARGUMENTS: Final = "clusterprofiles.multicluster.x-k8s.io/exec/additional-args"

Access = dict[str, Any]
"""One access provider of a profile."""


def cluster_profiles(clusters: Iterable[Mapping[str, Any]], accesses: Mapping[str, Access]) -> dict[str, Any]:
    """Return a ClusterProfileList of the rows of a relay's list; `accesses`: by the name of the cluster."""
    return {
        "apiVersion": API_VERSION,
        "kind": "ClusterProfileList",
        "metadata": {},
        "items": [_profile(one, accesses.get(str(one["name"]))) for one in clusters],
    }


def _profile(cluster: Mapping[str, Any], access: Access | None) -> dict[str, Any]:
    agents, seen = cluster.get("agents"), cluster.get("last_seen")
    connected_now = isinstance(agents, int) and agents > 0
    return {
        "apiVersion": API_VERSION,
        "kind": "ClusterProfile",
        "metadata": {"name": cluster["name"], "labels": {"x-k8s.io/cluster-manager": MANAGER}},
        "spec": {"displayName": cluster["name"], "clusterManager": {"name": MANAGER}},
        "status": {
            "conditions": [
                {
                    "type": "AgentConnected",
                    "status": "True" if connected_now else "False",
                    "reason": "AgentConnected" if connected_now else "NoAgent",
                    "message": "",
                    "lastTransitionTime": rfc3339(seen if isinstance(seen, int | float) and 0 < seen < 1e11 else 0.0),
                }
            ],
            "accessProviders": [access] if access is not None else [],
        },
    }


def local_accesses(context: ClientContext) -> dict[str, Access]:
    """Return how programs of this user reach the clusters that are connected here, at the relays of the settings.

    A connection whose settings cannot be read is left out: the background process says why it does not serve it.
    """
    environment, state = context.environment, context.state
    relays = {parse_address(url) for url in context.config.relay_urls()}
    found: dict[str, Access] = {}
    for one in connected(BackgroundPaths.find(environment)):
        try:
            config = one.settings.load(environment)
            if {parse_address(url) for url in config.relay_urls()} != relays:
                continue
            kept_as = endpoint_name(one.cluster, restrictions_of(config.restrict))
            port = state.kept_port(context.relays.names, kept_as)
            certificates = state.certificates(one.cluster, organisation(config, state), time.time())
        except ArcbridgeError:
            continue
        if port is not None:
            url = f"https://127.0.0.1:{port}"
            found.setdefault(one.cluster, _access(MANAGER, url, certificates.ca_pem, one.settings.words()))
    return found


def gateway_accesses(url: str, ca_file: str, names: Iterable[str]) -> dict[str, Access]:
    """Return how clusters are reached at the gateway `url`; `ca_file`: its CA, empty: one that the callers know.

    Raises ConfigError.
    """
    if not url.startswith("https://"):
        raise ConfigError("flag --gateway: expected https://HOST:PORT")
    origin = parse_address(url.rstrip("/")).url.removesuffix(":443")
    try:
        ca_pem = certificates_alone(Path(ca_file).read_text("ascii")) if ca_file else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"flag --gateway-ca-file: cannot read {ca_file}") from error
    except StateError as error:
        raise ConfigError(f"flag --gateway-ca-file: {ca_file}: {error.message}") from error
    return {name: _access(GATEWAY, f"{origin}/clusters/{name}", ca_pem) for name in names}


def _access(provider: str, server: str, ca_pem: str, arguments: Sequence[str] = ()) -> Access:
    cluster: dict[str, Any] = {"server": server}
    if ca_pem:
        cluster["certificate-authority-data"] = base64.b64encode(ca_pem.encode()).decode()
    if arguments:
        cluster["extensions"] = [{"name": ARGUMENTS, "extension": list(arguments)}]
    return {"name": provider, "cluster": cluster}
