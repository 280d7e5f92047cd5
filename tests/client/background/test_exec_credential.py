"""The ExecCredential document."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from arcbridge.client.background.exec_credential import exec_credential
from arcbridge.client.service import ClientContext, Terminal
from arcbridge.pki.authority import certificate_validity
from arcbridge.settings.config import ClientConfig
from tests.client.session.test_session_manager import login


async def test_certificate_and_token(tmp_path: Path) -> None:
    config = ClientConfig(
        relay="https://127.0.0.1:1", cluster="prod", port=0, state_dir=tmp_path / "state", login=login(tmp_path)
    )
    cluster = ClientContext(config, Terminal(), environment={}).served("prod")
    cluster.bind()
    document = exec_credential(cluster)
    assert next(iter(document)) == "kind"  # what the plugin looks for
    assert document["spec"] == {"interactive": False}
    status = document["status"]
    ends = datetime.strptime(status["expirationTimestamp"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    assert ends < certificate_validity(status["clientCertificateData"])[1]
    assert "token" not in status
    (tmp_path / "token").write_text("a.b.c")
    cluster.config = replace(config, token_file=tmp_path / "token")
    assert exec_credential(cluster)["status"]["token"] == "a.b.c"
    await cluster.close()
