"""`uninstall` on a home that was used: nothing of arcbridge is left but what it says."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from arcbridge.errors import ExitCode
from tests.e2e.test_background import a_person, alive
from tests.support.world import CLUSTER, World, fixed_port


def test_nothing_is_left_of_a_home_that_was_used(world: World, tmp_path: Path) -> None:
    with a_person(world, tmp_path / "home") as person:
        person.kubeconfig.write_text(json.dumps({"current-context": "mine", "contexts": [{"name": "mine"}]}))
        before = yaml.safe_load(person.kubeconfig.read_text())
        person.connect(CLUSTER, "--port", str(fixed_port()))
        pid = person.pid()
        unit = person.directory / "config" / "systemd" / "user" / "arcbridge-client.service"
        unit.parent.mkdir(parents=True)
        unit.write_text("[Service]\n")
        notes = person.directory / "state" / "arcbridge" / "notes.txt"
        notes.write_text("mine\n")

        refused = person.run("uninstall", check=False)
        assert (refused.returncode, "give --yes" in refused.stderr) == (ExitCode.USAGE, True)
        assert alive(pid)

        removed = person.run("uninstall", "--yes").stdout.splitlines()
        assert [line for line in removed if "context" in line] == [f'removed: context "{CLUSTER}"']
        assert f"removed: the unit {unit}" in removed
        assert "removed: the background process" in removed
        assert not alive(pid)
        kept = {path for path in person.directory.rglob("*") if path.is_file()}
        backup = person.kubeconfig.with_name("config.before-arcbridge")
        tokens = {person.directory / name for name in ("access-token", "id-token")}
        assert kept - tokens == {person.kubeconfig, backup, notes}
        assert f"left: the backup {backup}" in removed
        after = yaml.safe_load(person.kubeconfig.read_text())
        assert after["current-context"] == "mine"
        assert after["contexts"] == before["contexts"]
        assert not after.get("users")
        assert not after.get("clusters")

        again = person.run("uninstall")
        assert "removed:" not in again.stdout
