"""Whatever starts, ends and crashes, and whatever others write meanwhile: no context of ours is left at a dead port.

A model of this machine: processes of ours that serve, which of them live, and a user with kubectl and an editor. After
each command of ours each context of ours is served, or its user is the credential plugin, which starts what is missing
or says what to do; and what is not ours is as the others left it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from arcbridge.client.kubeconfig.entries import MARK, Entry, Kubeconfig
from arcbridge.client.kubeconfig.running import BACKGROUND

CLUSTERS = ("berlin", "munich", "prod")
FOREIGN = ("home", "office", "prod-of-others")


def body_of(document: Any, section: str, name: str) -> Any:
    return next((item[section[:-1]] for item in document.get(section) or [] if item["name"] == name), None)


def mark_of(body: Any) -> Any:
    return next((item["extension"] for item in body.get("extensions") or [] if item["name"] == MARK), None)


class Machine(RuleBasedStateMachine):
    """`proxies` are processes in the foreground that were started and have not ended or been killed."""

    proxies = Bundle("proxies")

    def __init__(self) -> None:
        super().__init__()
        self._temporary = tempfile.TemporaryDirectory()
        self.path = Path(self._temporary.name) / "config"
        self.alive: set[str] = set()
        self.number = 0
        self.port = 47010
        self.ports: dict[str, str] = {}
        """The process that listens at each address."""
        self.foreign: dict[str, Any] = {}
        """What others wrote last: all entries and settings that are not ours."""
        self.last_foreign_current: str | None = None
        self.repaired = True
        self.edited: set[str] = set()
        """Our clusters that the user has pointed elsewhere since they were written."""

    def teardown(self) -> None:
        self._temporary.cleanup()

    # -- the file -------------------------------------------------------------------------------------------------

    def document(self) -> Any:
        return (yaml.safe_load(self.path.read_text()) if self.path.exists() else None) or {}

    def write(self, document: Any) -> None:
        self.path.write_text(yaml.safe_dump(document))
        self.note()

    def note(self) -> None:
        """Remember what is not ours after a change that others made."""
        self.foreign = self.not_ours()
        current = self.document().get("current-context")
        if current is None or not self.is_ours(current):
            self.last_foreign_current = current

    def is_ours(self, name: str) -> bool:
        body = body_of(self.document(), "contexts", name)
        return body is not None and mark_of(body) is not None

    def not_ours(self) -> dict[str, Any]:
        document = self.document()
        kept = {key: value for key, value in document.items() if key not in
                ("clusters", "users", "contexts", "current-context", "apiVersion", "kind")}  # fmt: skip
        for section in ("clusters", "users", "contexts"):
            kept[section] = [item for item in document.get(section) or [] if mark_of(item[section[:-1]]) is None]
        return kept

    # -- our commands ---------------------------------------------------------------------------------------------

    def command(self) -> Kubeconfig:
        """What each command of ours does first."""
        kubeconfig = Kubeconfig([self.path])
        kubeconfig.repair(self.alive.__contains__)
        self.repaired = True
        return kubeconfig

    def entry(self, cluster: str, process: str, **more: Any) -> Entry:
        self.port += 1
        server = f"https://127.0.0.1:{self.port}"
        self.ports[server] = process
        self.edited.discard(cluster)
        return Entry(cluster, cluster, server, "CA", "CERT", "KEY", relays=("relay:443",), process=process, **more)

    def blocked(self, kubeconfig: Kubeconfig, cluster: str) -> bool:
        """Whether the command would not write: an entry of others is in the way, or another process serves it."""
        try:
            kubeconfig.check(cluster, cluster, ("relay:443",))
        except Exception:
            return True
        process, server = kubeconfig.served(cluster)
        return bool(server) and (process == BACKGROUND or process in self.alive)

    @rule(target=proxies, cluster=st.sampled_from(CLUSTERS), switch=st.booleans(), remove=st.booleans())
    def a_proxy_starts(self, cluster: str, switch: bool, remove: bool) -> tuple[Entry | None, bool]:
        kubeconfig = self.command()
        if self.blocked(kubeconfig, cluster):
            return None, remove
        self.number += 1
        entry = self.entry(cluster, f"proxy-{self.number}")
        self.alive.add(entry.process)
        kubeconfig.merge(entry, switch=switch)
        return entry, remove

    @rule(proxy=consumes(proxies))
    def a_proxy_ends(self, proxy: tuple[Entry | None, bool]) -> None:
        entry, remove = proxy
        if entry is None or entry.process not in self.alive:
            return
        Kubeconfig([self.path]).undo(entry, remove=remove)
        self.alive.discard(entry.process)

    @rule(proxy=consumes(proxies))
    def a_proxy_is_killed(self, proxy: tuple[Entry | None, bool]) -> None:
        if proxy[0] is not None:
            self.alive.discard(proxy[0].process)
        self.repaired = False

    @rule(cluster=st.sampled_from(CLUSTERS), switch=st.booleans(), static=st.booleans())
    def connect(self, cluster: str, switch: bool, static: bool) -> None:
        kubeconfig = self.command()
        process, _ = kubeconfig.served(cluster)
        if process != BACKGROUND and self.blocked(kubeconfig, cluster):
            return
        try:
            kubeconfig.check(cluster, cluster, ("relay:443",))
        except Exception:
            return
        self.alive.add(BACKGROUND)
        entry = self.entry(cluster, BACKGROUND, arguments=("--cluster", cluster), plugin=not static)
        kubeconfig.merge(entry, switch=switch)

    @rule(cluster=st.sampled_from(CLUSTERS))
    def disconnect(self, cluster: str) -> None:
        kubeconfig = self.command()
        if kubeconfig.served(cluster)[0] == BACKGROUND:
            kubeconfig.remove(cluster, cluster, ("relay:443",))
            assert body_of(self.document(), "contexts", cluster) is None or not self.is_ours(cluster)

    @rule()
    def the_background_process_is_killed(self) -> None:
        self.alive.discard(BACKGROUND)
        self.repaired = False

    @rule()
    def status(self) -> None:
        self.command()

    # -- others ---------------------------------------------------------------------------------------------------

    @initialize(name=st.sampled_from([None, *FOREIGN]))
    def a_kubeconfig_of_the_user(self, name: str | None) -> None:
        if name is not None:
            self.others_add(name)
            self.write({**self.document(), "current-context": name})

    @rule(name=st.sampled_from([*FOREIGN, *CLUSTERS]))
    def others_add(self, name: str) -> None:
        document = self.document()
        for section, body in (
            ("clusters", {"server": "https://10.0.0.1:6443"}),
            ("users", {"token": "x"}),
            ("contexts", {"cluster": name, "user": name}),
        ):
            if body_of(document, section, name) is None:
                document.setdefault(section, [])
                document[section] = [*(document[section] or []), {"name": name, section[:-1]: body}]
        self.write(document)

    @rule(name=st.sampled_from([*FOREIGN, *CLUSTERS]))
    def the_user_switches(self, name: str) -> None:
        document = self.document()
        if body_of(document, "contexts", name) is not None:
            document["current-context"] = name
            self.write(document)

    @rule(name=st.sampled_from(FOREIGN))
    def others_remove(self, name: str) -> None:
        document = self.document()
        for section in ("clusters", "users", "contexts"):
            document[section] = [item for item in document.get(section) or [] if item["name"] != name]
        self.write(document)

    @rule(name=st.sampled_from(CLUSTERS))
    def the_user_points_our_entry_elsewhere(self, name: str) -> None:
        document = self.document()
        body = body_of(document, "clusters", name)
        if body is not None and mark_of(body) is not None:
            body["server"] = "https://10.9.9.9:6443"
            self.write(document)
            self.edited.add(name)

    @rule(name=st.sampled_from(CLUSTERS))
    def the_user_sets_a_namespace(self, name: str) -> None:
        document = self.document()
        body = body_of(document, "contexts", name)
        if body is not None:
            body["namespace"] = "team-a"
            self.write(document)

    # -- what must be true ----------------------------------------------------------------------------------------

    @invariant()
    def what_is_not_ours_stays(self) -> None:
        assert self.not_ours() == (self.foreign or {"clusters": [], "users": [], "contexts": []})

    @invariant()
    def an_entry_is_touched_only_while_it_is_ours(self) -> None:
        for name in self.edited:
            body = body_of(self.document(), "clusters", name)
            assert body is not None
            assert body["server"] == "https://10.9.9.9:6443"

    @invariant()
    def no_context_of_ours_is_at_a_dead_port(self) -> None:
        if not self.repaired:
            return
        document = self.document()
        for item in document.get("contexts") or []:
            if mark_of(item["context"]) is None:
                continue
            cluster = body_of(document, "clusters", item["context"]["cluster"])
            user = body_of(document, "users", item["context"]["user"])
            if cluster is None or user is None or "exec" in user:
                continue
            if cluster["server"] in self.ports:  # else the user has pointed it elsewhere
                assert self.ports[cluster["server"]] in self.alive, item["name"]

    @invariant()
    def the_current_context_is_the_last_that_was_not_ours_unless_ours_is_connected(self) -> None:
        if not self.repaired:
            return
        document = self.document()
        current = document.get("current-context")
        body = body_of(document, "contexts", current) if current is not None else None
        if body is None or mark_of(body) is None:
            assert current == self.last_foreign_current


Machine.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestMachine = Machine.TestCase
