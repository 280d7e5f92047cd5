"""Our entries in a user's kubeconfig, judged by PyYAML, by bytes, and by the real kubectl."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from arcbridge.client.kubeconfig.entries import MARK, Entry, Kubeconfig, render
from arcbridge.errors import ConfigError, StateError
from arcbridge.installation import own_path
from tests.support.processes import require_or_skip

KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")

FOREIGN = """apiVersion: v1
kind: Config
current-context: home
preferences: {colors: true}
x-unknown: 2024-01-01
clusters:
- name: home
  cluster:
    server: https://10.0.0.1:6443
    certificate-authority: ca.crt
    extensions:
    - name: some.io/ext
      extension: {last-update: 2024-05-06, mode: 0123, flag: yes, text: "yes", ratio: 1:30}
users:
- name: home
  user:
    token: "0123"
    tokenFile: ~
contexts:
- name: home
  context: {cluster: home, user: home, namespace: on}
"""


def entry(name: str = "prod", cluster: str = "prod", **more: Any) -> Entry:
    return Entry(name, cluster, "https://127.0.0.1:47011", "CA", "CERT", "KEY", **more)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def named(document: Any, section: str, name: str) -> Any:
    return next((item[section[:-1]] for item in document[section] if item["name"] == name), None)


def at(path: Path) -> Kubeconfig:
    return Kubeconfig.find(str(path), {})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A kubeconfig that does not exist yet."""
    return tmp_path / "config"


@pytest.fixture
def foreign(path: Path) -> Path:
    """A kubeconfig of the user."""
    path.write_text(FOREIGN)
    return path


class TestSearch:
    def test_the_flag_wins_over_the_list_of_the_environment(self) -> None:
        assert [f.path for f in Kubeconfig.find("/x", {"KUBECONFIG": "/y"}).files] == [Path("/x")]
        found = Kubeconfig.find("", {"KUBECONFIG": "/a::/b:/a"})
        assert [f.path for f in found.files] == [Path("/a"), Path("/b")]

    def test_the_home(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        assert Kubeconfig.find("", {}).files[0].path == tmp_path / ".kube/config"

    def test_new_entries_go_to_the_first_that_exists_else_to_the_last_name(self, tmp_path: Path) -> None:
        a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "sub" / "c"
        assert Kubeconfig([a, c]).merge(entry(), switch=True) == c
        b.write_text("")
        assert Kubeconfig([a, b, c]).merge(entry("other", "other"), switch=True) == b
        assert not a.exists()
        assert not list(tmp_path.glob("**/*.lock"))

    def test_an_entry_is_changed_where_it_is(self, tmp_path: Path) -> None:
        first, second = tmp_path / "a", tmp_path / "b"
        at(second).merge(entry(), switch=False)
        first.write_text(FOREIGN)
        assert Kubeconfig([first, second]).merge(entry(), switch=True) == second
        assert named(load(first), "clusters", "prod") is None
        # The current context is written where one is set.
        assert load(first)["current-context"] == "prod"
        assert "current-context" not in load(second)


class TestMerge:
    def test_a_fresh_file(self, tmp_path: Path) -> None:
        path = tmp_path / "kube" / "config"
        assert at(path).merge(entry(), switch=True) == path
        document = load(path)
        assert document["current-context"] == "prod"
        assert named(document, "clusters", "prod")["server"] == "https://127.0.0.1:47011"
        assert base64.b64decode(named(document, "users", "arcbridge-prod")["client-key-data"]) == b"KEY"
        assert named(document, "contexts", "prod")["user"] == "arcbridge-prod"
        assert path.stat().st_mode & 0o777 == 0o600

    def test_foreign_text_stays_as_it_was(self, foreign: Path) -> None:
        at(foreign).merge(entry(), switch=True)
        before, after, text = yaml.safe_load(FOREIGN), load(foreign), foreign.read_text()
        for section in ("clusters", "users", "contexts"):
            assert after[section][0] == before[section][0]
        assert (after["preferences"], after["x-unknown"]) == (before["preferences"], before["x-unknown"])
        for spelling in ("2024-05-06", "mode: 0123", "flag: yes", "1:30", "namespace: on", "x-unknown: 2024-01-01"):
            assert spelling in text
        assert list(after)[: len(before)] == list(before)
        at(foreign).undo(entry(), remove=True)
        assert load(foreign) == before

    def test_the_former_namespace_and_other_fields_stay(self, path: Path) -> None:
        at(path).merge(entry(), switch=True)
        document = load(path)
        named(document, "contexts", "prod")["namespace"] = "team-a"
        named(document, "clusters", "prod")["proxy-url"] = "http://p"
        path.write_text(yaml.safe_dump(document))
        at(path).merge(entry(token="tok"), switch=True)
        document = load(path)
        assert named(document, "contexts", "prod")["namespace"] == "team-a"
        assert named(document, "clusters", "prod")["proxy-url"] == "http://p"
        assert named(document, "users", "arcbridge-prod")["token"] == "tok"
        at(path).merge(entry(token="tok", token_file="/t"), switch=True)
        user = named(load(path), "users", "arcbridge-prod")
        assert (user.get("token"), user["tokenFile"]) == (None, "/t")

    def test_twice_is_once(self, path: Path) -> None:
        at(path).merge(entry(), switch=True)
        first = path.read_text()
        at(path).merge(entry(), switch=True)
        assert path.read_text() == first

    @pytest.mark.parametrize("section", ["clusters", "users", "contexts"])
    def test_a_foreign_entry_is_not_overwritten(self, path: Path, section: str) -> None:
        name = "arcbridge-prod" if section == "users" else "prod"
        text = f"{section}:\n- name: {name}\n  {section[:-1]}: {{server: x}}\n"
        path.write_text(text)
        for attempt in (lambda: at(path).check("prod", "prod"), lambda: at(path).merge(entry(), switch=True)):
            with pytest.raises(ConfigError, match="--kube-context"):
                attempt()
        assert path.read_text() == text

    @pytest.mark.parametrize("text", ["a: [", "- 1", "clusters: 3", "just text"])
    def test_malformed_files_are_left_alone(self, path: Path, text: str) -> None:
        path.write_text(text)
        with pytest.raises(StateError, match=r"config"):
            at(path).merge(entry(), switch=True)
        assert path.read_text() == text


class TestFiles:
    @pytest.mark.parametrize(("before", "after"), [(0o600, 0o600), (0o400, 0o400), (0o644, 0o600), (0o660, 0o600)])
    def test_modes(self, foreign: Path, before: int, after: int) -> None:
        foreign.chmod(before)
        at(foreign).merge(entry(), switch=True)
        assert foreign.stat().st_mode & 0o777 == after

    def test_a_link_stays_a_link(self, tmp_path: Path) -> None:
        real = tmp_path / "real" / "config"
        real.parent.mkdir()
        real.write_text(FOREIGN)
        (tmp_path / "config").symlink_to(real)
        at(tmp_path / "config").merge(entry(), switch=True)
        assert (tmp_path / "config").is_symlink()
        assert load(real)["current-context"] == "prod"

    def test_one_backup_once(self, foreign: Path) -> None:
        at(foreign).merge(entry(), switch=True)
        at(foreign).merge(entry(token="x"), switch=True)
        backups = [found for found in foreign.parent.iterdir() if found != foreign]
        assert [found.read_text() for found in backups] == [FOREIGN]
        assert backups[0].stat().st_mode & 0o077 == 0

    def test_o1_no_backup_keeps_what_is_ours(self, tmp_path: Path) -> None:
        """Else a token would outlive the entry that it was given for."""
        path = tmp_path / "config"
        for remove in (False, True):  # the second change: the file has the token then
            at(path).merge(entry(token="SECRET"), switch=True)
            at(path).undo(entry(), remove=remove)
        assert [file.name for file in tmp_path.iterdir()] == ["config"]
        assert "SECRET" not in path.read_text()

    def test_a_lock_of_ours_whose_process_was_killed_is_broken(self, tmp_path: Path) -> None:
        code = (
            "import os, sys\nfrom pathlib import Path\n"
            "from arcbridge.client.kubeconfig.file import KubeconfigFile\n"
            "with KubeconfigFile(Path(sys.argv[1])).locked():\n    os._exit(9)\n"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "config")], check=False, timeout=60)
        assert (tmp_path / "config.lock").exists()
        at(tmp_path / "config").merge(entry(), switch=True)
        assert load(tmp_path / "config")["current-context"] == "prod"
        assert not (tmp_path / "config.lock").exists()

    def test_parallel_writers_lose_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "config"
        code = (
            "import sys\nfrom pathlib import Path\n"
            "from arcbridge.client.kubeconfig import file as kubeconfig_file\n"
            "from arcbridge.client.kubeconfig.entries import Entry, Kubeconfig\n"
            "kubeconfig_file.LOCK_WAIT = 60.0  # the lock has no order: on a busy machine one writer may wait for all\n"
            "name = sys.argv[1]\n"
            "for _ in range(5):\n"
            "    Kubeconfig([Path(sys.argv[2])]).merge(Entry(name, name, 's', 'a', 'b', 'c'), switch=True)\n"
        )
        running = [subprocess.Popen([sys.executable, "-c", code, f"c{n}", str(path)]) for n in range(4)]
        assert [process.wait(60) for process in running] == [0] * 4
        assert {item["name"] for item in load(path)["contexts"]} == {"c0", "c1", "c2", "c3"}
        assert not (tmp_path / "config.lock").exists()


class TestUndo:
    def test_without_a_switch_nothing_is_restored(self, foreign: Path) -> None:
        kubeconfig = at(foreign)
        kubeconfig.merge(entry(), switch=False)
        assert load(foreign)["current-context"] == "home"
        before = foreign.stat()  # a file that is written is another file, whatever the clock's steps
        kubeconfig.undo(entry(), remove=False)
        assert (foreign.stat().st_ino, foreign.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


RELAYS = ("relay:443",)


class TestRepair:
    """The user had `home`, and what served `prod` is gone without a word."""

    def crashed(self, path: Path, **more: Any) -> Kubeconfig:
        path.write_text(FOREIGN)
        at(path).merge(entry(process="gone", relays=RELAYS, **more), switch=True)
        return at(path)

    def test_the_current_context_comes_back_and_ours_says_what_to_do(self, tmp_path: Path) -> None:
        kubeconfig = self.crashed(tmp_path / "config")
        assert kubeconfig.repair(lambda process: process != "gone") == ["prod"]
        document = load(tmp_path / "config")
        assert document["current-context"] == "home"
        user = named(document, "users", "arcbridge-prod")
        assert user["exec"]["command"] == own_path()
        assert user["exec"]["args"] == ["credential", "--cluster", "prod", "--ended"]
        assert "client-key-data" not in user
        assert kubeconfig.repair(lambda process: False) == []

    def test_what_the_background_process_serves_is_started_again_by_the_plugin(self, tmp_path: Path) -> None:
        kubeconfig = self.crashed(tmp_path / "config", arguments=("--cluster", "prod", "--relay", "https://r"))
        kubeconfig.repair(lambda process: False)
        document = load(tmp_path / "config")
        assert document["current-context"] == "prod"
        assert named(document, "users", "arcbridge-prod")["exec"]["args"][1:] == [
            "--cluster", "prod", "--relay", "https://r",
        ]  # fmt: skip

    def test_the_plugin_needs_no_repair(self, tmp_path: Path) -> None:
        kubeconfig = self.crashed(tmp_path / "config", arguments=("--cluster", "prod"), plugin=True)
        assert kubeconfig.repair(lambda process: False) == []
        assert kubeconfig.served("prod") == ("gone", "https://127.0.0.1:47011")

    def test_a_plugin_that_is_gone_is_this_installation_again(self, tmp_path: Path) -> None:
        """After an upgrade that moved it, or from a version that wrote the bare name; a hand's change stays."""
        kubeconfig = self.crashed(tmp_path / "config", arguments=("--cluster", "prod"), plugin=True)
        assert kubeconfig.heal() == []
        written = (tmp_path / "config").read_text()
        for command, mark, healed in (
            ("/opt/gone/arcbridge", "/opt/gone/arcbridge", True),
            ("arcbridge", "arcbridge", True),
            ("/bin/sh", "/bin/sh", False),
            ("/home/me/gone-wrapper", own_path(), False),
        ):
            text = written.replace(f"command: {own_path()}", f"command: {command}", 1)
            (tmp_path / "config").write_text(text.replace(f"command: {own_path()}", f"command: {mark}", 1))
            assert [one["command"] for one in self.commands(tmp_path)] == [command, mark]
            assert at(tmp_path / "config").heal() == (["prod"] if healed else [])
            after = [own_path()] * 2 if healed else [command, mark]
            assert [one["command"] for one in self.commands(tmp_path)] == after

    def commands(self, directory: Path) -> list[dict[str, Any]]:
        """What kubectl runs, and what we have noted of it."""
        user = named(load(directory / "config"), "users", "arcbridge-prod")
        return [user["exec"], user["extensions"][0]["extension"]]

    def test_what_another_process_serves_by_now_is_not_undone(self, path: Path) -> None:
        for process in ("one", "two"):
            at(path).merge(entry(process=process, relays=RELAYS), switch=True)
        at(path).undo(entry(process="one", relays=RELAYS), remove=True)
        assert load(path)["current-context"] == "prod"
        assert "client-key-data" in named(load(path), "users", "arcbridge-prod")

    def test_removal_is_for_the_cluster_of_this_relay(self, path: Path) -> None:
        at(path).merge(entry(process="one", relays=RELAYS), switch=True)
        at(path).remove("prod", "prod", ("other:443",))
        assert at(path).has_ours()
        with pytest.raises(ConfigError, match="at relay relay:443"):
            at(path).check("prod", "prod", ("other:443",))
        at(path).remove("prod", "prod", RELAYS)
        assert not at(path).has_ours()

    def test_a_port_that_moved_is_written_anew(self, foreign: Path) -> None:
        at(foreign).merge(entry(process="background", plugin=True, arguments=("--cluster", "prod")), switch=True)
        moved = Entry("prod", "prod", "https://127.0.0.1:47019", "CA", "CERT", "KEY", process="background", plugin=True)
        at(foreign).refresh(moved)
        assert named(load(foreign), "clusters", "prod")["server"] == "https://127.0.0.1:47019"
        at(foreign).remove("prod", "prod", ())
        assert load(foreign)["current-context"] == "home"
        before = foreign.read_bytes()
        at(foreign).refresh(moved)  # taken out meanwhile
        assert foreign.read_bytes() == before


class TestKubectl:
    def test_it_reads_what_we_write(self, tmp_path: Path) -> None:
        if KUBECTL is None:
            require_or_skip("kubectl", "no kubectl")
        path = tmp_path / "config"
        path.write_text(FOREIGN.replace("mode: 0123, flag: yes, ", "").replace("namespace: on", "namespace: 'on'"))
        at(path).merge(entry(), switch=True)

        def kubectl(*arguments: str) -> str:
            command = [KUBECTL, f"--kubeconfig={path}", "config", *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout

        assert kubectl("current-context") == "prod\n"
        seen = json.loads(kubectl("view", "--raw", "-o", "json"))
        extensions = named(seen, "clusters", "prod")["extensions"]
        assert extensions == [{"name": MARK, "extension": {"cluster": "prod"}}]
        # What kubectl writes again is still ours.
        kubectl("set-context", "prod", "--namespace=x")
        at(path).merge(entry(), switch=True)
        assert named(load(path), "contexts", "prod")["namespace"] == "x"
        assert load(path)["users"][-1]["name"] == "home" or named(load(path), "users", "home") is not None

    def test_the_rendered_one(self, tmp_path: Path) -> None:
        document = yaml.safe_load(render(entry(token="tok")))
        assert document["current-context"] == "prod"
        assert named(document, "users", "arcbridge-prod")["token"] == "tok"
