"""What each command of the client is made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from arcbridge.client.service import ClientContext, Terminal
from arcbridge.errors import ConfigError
from arcbridge.settings.config import ClientConfig


def test_clusters_are_canonical_and_named_once(tmp_path: Path) -> None:
    config = ClientConfig(cluster="prod", clusters=("test", "prod", ""))
    context = ClientContext(config, Terminal(), environment={"HOME": str(tmp_path)})
    assert context.clusters() == ["prod", "test"]
    for wrong, words in (
        (replace(config, cluster="UPPER"), "flag --cluster: 'UPPER'"),
        (ClientConfig(), "--cluster NAME"),
    ):
        with pytest.raises(ConfigError, match=words):
            ClientContext(wrong, Terminal(), environment={"HOME": str(tmp_path)}).clusters()
