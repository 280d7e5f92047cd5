"""The Kubernetes study: what it takes from a kubeconfig, what it makes of answers, and what it does not believe."""

from __future__ import annotations

import base64
import json
import stat
from pathlib import Path

from bench.studies import kubernetes
from bench.studies.kubernetes import _way_of_kubeconfig


def test_a_way_is_what_the_kubeconfig_says(tmp_path: Path) -> None:
    def data(text: str) -> str:
        return base64.b64encode(text.encode()).decode()

    file = tmp_path / "config"
    cluster = {"server": "https://127.0.0.1:1", "certificate-authority-data": data("ca")}
    user = {"client-certificate-data": data("certificate"), "client-key-data": data("key")}
    file.write_text(json.dumps({"clusters": [{"cluster": cluster}], "users": [{"user": user}]}))
    directory = kubernetes._private(tmp_path / "through")
    way = _way_of_kubeconfig(file, directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert way.server == "https://127.0.0.1:1"
    assert [path.read_text() for path in (way.certificate, way.key, way.roots)] == ["certificate", "key", "ca"]
