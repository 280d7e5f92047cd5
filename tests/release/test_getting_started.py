"""docs/getting-started.md as a newcomer types it: packages on a VM and a workstation, the agent's chart on two clusters
whose nodes run pods, and the page in a browser. Then ten faults are put in, one after the other, and the page says of
each what is wrong and what to do. Six are mended by what the page says, and then both clusters serve again.

`PAGE_SHOTS=DIR` has the screenshots written there that docs/images has.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e.test_daemonset import IMAGE
from tests.readme.blocks import Block, blocks
from tests.readme.machines import ROOT, Machines
from tests.support.browser import Browser, Tab
from tests.support.cluster import Cluster, Unavailable, helm
from tests.support.issuer import Issuer
from tests.support.layered_machine import LayeredMachine
from tests.support.processes import require_or_skip
from tests.support.world import fixed_port

from .test_linux_packages import PROCESSOR, made

PAGE = ROOT / "docs" / "getting-started.md"
NAMES = ("berlin", "oslo")
ISSUER_CA, PODS, CONFIG = "/root/issuer-ca.pem", "pods.json", "/etc/arcbridge/relay.toml"
SCP = """\
#!/bin/sh
set -eu
for to; do :; done
while [ $# -gt 1 ]; do
    case "${1#*:}" in /*) from="VM${1#*:}" ;; *) from="VM/root/${1#*:}" ;; esac
    cp "$from" "$to"
    shift
done
"""
"""Stands in for SSH between the two machines."""


@dataclass
class Place:
    """The machines of the page's reader, and what stands behind them."""

    machines: Machines
    clusters: dict[str, Cluster]
    issuer: Issuer
    relay: str
    """Its address, `host:port`."""

    def vm(self, text: str) -> None:
        """Type commands on the VM, and have the relay read its settings again."""
        self._types("vm", text)
        self.machines.running("vm").signal(signal.SIGHUP)

    def workstation(self, text: str) -> None:
        """Type commands on the workstation."""
        self._types("workstation", text)

    def _types(self, machine: str, text: str) -> None:
        process = self.machines.run_command(Block(PAGE.name, 0, "run", text, machine=machine), text)
        assert process.returncode == 0, process.tail()


@contextmanager
def place(dist: Path, directory: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        image = (sys.executable, "-m", "arcbridge")
        try:
            program = helm()
            clusters = {
                name: stack.enter_context(Cluster(directory=directory / name, images={IMAGE: image})) for name in NAMES
            }
        except Unavailable as error:
            require_or_skip("apiserver", str(error))
        issuer = stack.enter_context(Issuer(directory / "issuer", auto_login="alice"))
        relay = f"127.0.0.1:{fixed_port()}"
        vm, workstation = (
            stack.enter_context(made("dpkg", "dpkg", dist, directory / f"layer-{name}")) for name in "ab"
        )
        for machine in (vm, workstation):
            machine.run("sh", "-c", "ln -s /mnt/*.deb /mnt/arcbridge-agent-*.tgz /root")
            shutil.copy(issuer.ca_file, machine.at(ISSUER_CA))
        equip(workstation, vm, clusters, program)
        ports = f"{relay.rpartition(':')[2]},{issuer.port}"
        workstation.write(f"/root/{PODS}", json.dumps({"podAnnotations": {"node.test/host-ports": ports}}))
        replaced = {
            "_amd64.deb": f"_{PROCESSOR}.deb",
            # A public issuer's certificate comes from a public CA.
            'url: "https://login.example.org"': f"url: {json.dumps(issuer.url)}, "
            f"certificateAuthority: {json.dumps(issuer.ca_file.read_text())}",
            "https://login.example.org": issuer.url,
            "relay.example.org:443": relay,
            "https://relay.example.org": f"https://{relay}",
            "anna@example.org": "alice@example.com",
            "-f $name.yaml": f"-f $name.yaml -f {PODS}",
            # No service manager runs here.
            "systemctl enable --now arcbridge-relay": f"arcbridge --role relay --config {CONFIG}",
        }
        machines = Machines(
            directory,
            clusters["berlin"].binaries.kubectl,
            dialled="vm",
            replaced=replaced,
            names=("vm", "workstation"),
            issuer_ca=issuer.ca_file,
            environment={"SSL_CERT_FILE": ISSUER_CA, "ARCBRIDGE_GRANT_TYPE": "device-code"},
            layered={"vm": vm, "workstation": workstation},
        )
        yield Place(stack.enter_context(machines), clusters, issuer, relay)


def equip(workstation: LayeredMachine, vm: LayeredMachine, clusters: dict[str, Cluster], program: Path) -> None:
    """Give the workstation kubectl with both clusters, Helm and a way to the VM."""
    programs = Path("/usr/local/sbin")
    shutil.copy(program, workstation.at(f"{programs}/helm"))
    shutil.copy(clusters["berlin"].binaries.kubectl, workstation.at(f"{programs}/kubectl"))
    workstation.write(f"{programs}/scp", SCP.replace("VM", str(vm.at(""))))
    workstation.run("chmod", "+x", f"{programs}/scp")
    made: dict[str, list[object]] = {"clusters": [], "users": [], "contexts": []}
    for name, cluster in clusters.items():
        admin = f"admin@{name}"
        config = json.loads(cluster.kubeconfig.read_text())
        made["clusters"].append({**config["clusters"][0], "name": admin})
        made["users"].append({**config["users"][0], "name": admin})
        made["contexts"].append({"name": admin, "context": {"cluster": admin, "user": admin}})
    workstation.run("mkdir", "-p", "/root/.kube")
    workstation.write("/root/.kube/config", json.dumps({"apiVersion": "v1", "kind": "Config", **made}))


# -- faults ------------------------------------------------------------------------------------------------------------

AGENT = "arcbridge.node-restriction.kubernetes.io/agent"
UPGRADE = (
    "helm --kube-context admin@$name upgrade arcbridge-agent ./arcbridge-agent-*.tgz -n arcbridge "
    "-f $name.yaml --set-file relayCA=ca.crt --wait"
)


class Fault(NamedTuple):
    """What is broken, and how the page says it."""

    name: str
    put_in: Callable[[Place], None]
    words: tuple[str, ...]
    """All are in one line of the page."""
    mend: Callable[[Place], None] | None = None
    """What these words say; None: this one stays."""


def enrol(here: Place, state: str) -> str:
    """Return the command of an agent that enrols on the VM with the token of munich, and does not connect."""
    return (
        f"arcbridge --role agent enroll --config /dev/null --relay {here.relay} --relay-ca-file "
        f"/var/lib/arcbridge/ca.crt --state-dir {state} --join-token-file munich.token"
    )


def fill_disk(here: Place) -> None:
    """Have the relay's audit log go on on a disk that is full."""
    here.vm(
        "cd /var/lib/arcbridge && mkdir disk && mount -t tmpfs -o size=64k none disk && ! cp /dev/zero disk/rest\n"
        "mv audit.jsonl former && ln -s disk/audit.jsonl audit.jsonl"
    )


def delete_pods(here: Place) -> None:
    """Have a new pod begin while the issuer is down."""
    here.issuer.down()
    here.workstation("kubectl --context admin@oslo -n arcbridge delete pods --all --wait=false")


def end_api_server(here: Place) -> None:
    (program,) = (one for one in here.clusters["berlin"].processes if one.name == "kube-apiserver")
    program.kill()
    here.workstation("! kubectl --context berlin get namespaces")


FAULTS = (
    Fault(
        "never-seen",
        lambda here: here.vm(
            "(umask 077 && arcbridge --role relay token create --cluster munich -o name > munich.token)\n"
            + enrol(here, "munich")
        ),
        ("munich", "never seen", "no agent of it has ever connected"),
    ),
    Fault(
        "join-token",
        lambda here: here.vm(f"! {enrol(here, 'again')}"),
        ("agent enrol", "refused", "the join token is used up"),
    ),
    Fault(
        "policy",
        lambda here: here.vm("echo '[[alow]]' >> /etc/arcbridge/policy.toml"),
        ("policy.toml, line", "alow: unknown key", "the last good version counts", "Correct the policy file"),
        lambda here: here.vm("sed -i '$d' /etc/arcbridge/policy.toml"),
    ),
    Fault(
        "disk",
        fill_disk,
        ("audit log: ", "cannot be written", "No space left on device", "Make room"),
        lambda here: here.vm("rm /var/lib/arcbridge/disk/rest"),
    ),
    Fault(
        "revoked",
        lambda here: here.vm("arcbridge --role relay cluster revoke oslo"),
        ("oslo", "down since", "An operator has revoked it", "cluster restore oslo"),
        lambda here: here.vm("arcbridge --role relay cluster restore oslo"),
    ),
    Fault(
        "rights",
        lambda here: here.workstation(
            "kubectl --context admin@berlin delete clusterrolebindings -l app.kubernetes.io/name=arcbridge-agent\n"
            "while kubectl --context berlin get namespaces; do sleep 0.2; done"
        ),
        ("berlin", "degraded", "The agent may not act as users", "agent's chart"),
        lambda here: here.workstation(f"name=berlin; {UPGRADE}"),
    ),
    Fault(
        "no-agent",
        lambda here: here.workstation(f"kubectl --context admin@oslo label nodes --all {AGENT}-"),
        ("oslo", "down since", "No agent of it is connected", "get pods"),
        lambda here: here.workstation(f"kubectl --context admin@oslo label nodes --all {AGENT}=true"),
    ),
    Fault(
        "issuer", delete_pods, ("oslo", "degraded", "does not reach the issuer"), lambda here: here.issuer.down(False)
    ),
    Fault(
        "credential",
        lambda here: here.workstation(
            "kubectl --context admin@oslo -n arcbridge delete serviceaccount arcbridge-agent\n"
            "while kubectl --context oslo get namespaces; do sleep 0.2; done"
        ),
        ("oslo", "degraded", "does not accept the agent's own credential", "ServiceAccount"),
    ),
    Fault("api-server", end_api_server, ("berlin", "degraded", "The agent does not reach its API server")),
)


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(900)  # the release is built first
def test_from_nothing_to_two_green_clusters_and_ten_faults(dist: Path, tmp_path: Path) -> None:
    with place(dist, tmp_path) as here, Browser(tmp_path / "browser", lenient=True) as browser:
        try:
            for block in blocks(PAGE):
                here.machines.run(block)
            asyncio.run(look(here, browser))
        finally:
            here.workstation("! command -v arcbridge || arcbridge uninstall --yes")


async def look(here: Place, browser: Browser) -> None:
    """See both clusters serve, and then each fault."""
    async with browser.tab() as tab:
        assert await tab.open(f"https://{here.relay}/page") == ""
        await tab.shape(1280, 1400)
        await tab.evaluate("document.querySelector('a.go').click()")
        await tab.until(SERVING, "both serve")
        await shoot(tab, here, "getting-started", "document.body")
        refuse_a_user(here)
        assert await tab.evaluate("document.querySelector('#summary').innerText") == "2 clusters: 2 serving."
        here.workstation(f"name=oslo; {UPGRADE}\n{KUBECTL.format('until')}")
        for fault in FAULTS:
            fault.put_in(here)
            await tab.until(f"{line(fault.words)} !== undefined", fault.name, timeout=90)
            await shoot(tab, here, f"fault-{fault.name}", line(fault.words))
            if fault.mend is not None:
                fault.mend(here)
                await tab.until(
                    f"{line(fault.words)} === undefined && {SERVING}", f"{fault.name} is mended", timeout=90
                )


def refuse_a_user(here: Place) -> None:
    """Take the user's name out of `impersonation.users`, and read what kubectl and doctor say."""
    here.workstation(
        f"name=oslo; {UPGRADE} --set 'impersonation.users={{oidc:bob@example.org}}'\n{KUBECTL.format('while')}\n"
        "grep 'the agent of this cluster may not act as you' refused\n"
        "arcbridge doctor oslo > doctor || true\n"
        "grep 'may not impersonate you' doctor"
    )


def line(words: tuple[str, ...]) -> str:
    """Return the expression of the one line of the page that has all of these words."""
    lines = "[...document.querySelectorAll('#relays li, tbody tr, #changes li')]"
    return f"{lines}.find((one) => {json.dumps(words)}.every((word) => one.innerText.includes(word)))"


SERVING = " && ".join(f"{line((name, 'serving'))} !== undefined" for name in NAMES)
KUBECTL = "{} kubectl --context oslo get namespaces 2> refused; do sleep 0.2; done"


async def shoot(tab: Tab, here: Place, name: str, part: str) -> None:
    """Write a screenshot of a part of the page, where it is asked for, without what is this machine's."""
    if not (directory := os.environ.get("PAGE_SHOTS")):
        return
    for ours, theirs in ((here.relay, "relay.example.org:443"), ("alice@example.com", "anna@example.org")):
        text = f"document.body.innerHTML.replaceAll({json.dumps(ours)}, {json.dumps(theirs)})"
        await tab.evaluate(f"document.body.innerHTML = {text}")
    # The limit of descriptors is this machine's. Of a table the other rows are left out.
    await tab.evaluate(
        "[...document.querySelectorAll('#relays li')].filter((one) => /descriptors/.test(one.innerText))"
        f".forEach((one) => one.remove()); part = {part}; if (part.tagName === 'TR') "
        "for (const row of part.parentElement.children) row.style.display = row === part ? '' : 'none'; "
        "part = part.closest('table, section') || part"
    )
    await tab.screenshot(Path(directory) / f"{name}.png", of="part")
    await tab.evaluate("document.querySelectorAll('tbody tr').forEach((row) => { row.style.display = ''; })")
