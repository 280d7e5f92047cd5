"""The issuer of the tests listens for its own machine alone; the client's tests of logins show what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.issuer import main


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_it_signs_for_no_stranger(host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--state", str(tmp_path / "issuer"), "--host", host])
    assert ended.value.code == 2
    assert "ssh -N -L" in capsys.readouterr().err
