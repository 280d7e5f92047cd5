"""OpenSSH in the same topology: sshd is the relay, `ssh -R` the agent, `ssh -L` the client.

The port that `-R` opens is on the relay's loopback, and the client's `-L` leads to it: one SSH session each way.
"""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
from pathlib import Path

from bench.address import Address, free_ports, listens
from bench.peers.base import Unavailable
from bench.peers.roles import OfRoles
from bench.process import Role

CIPHER = "aes128-gcm@openssh.com"


class OpenSsh(OfRoles):
    """OpenSSH `-R` and `-L` with AES-128-GCM."""

    name = "openssh"
    encrypts = "client to relay, and relay to agent; the relay reads everything"
    tuned = (
        f"{CIPHER} (its fastest here; the default, ChaCha20, reaches half), no compression, sessions with a terminal "
        "so that both ends set TCP_NODELAY (with -N a new connection waits for a delayed ACK); "
        "nothing is done to hide when keys are pressed"
    )

    def check(self) -> str:
        self._sshd = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
        ssh, keygen = shutil.which("ssh"), shutil.which("ssh-keygen")
        if self._sshd is None or ssh is None or keygen is None:
            raise Unavailable("needs sshd, ssh and ssh-keygen (Debian, Ubuntu: apt-get install openssh-server)")
        self._ssh, self._keygen = ssh, keygen
        return subprocess.run([ssh, "-V"], capture_output=True, text=True, check=True).stderr.strip()

    def start(self, target: Address, directory: Path) -> None:
        self._directory = directory
        for name in ("host_key", "user_key"):
            subprocess.run(
                [self._keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)], check=True, timeout=20
            )
        relay, self._middle, self.endpoint = free_ports(3)
        self._relay = relay
        (directory / "authorized_keys").write_text((directory / "user_key.pub").read_text())
        host_key = (directory / "host_key.pub").read_text()
        (directory / "sshd_config").write_text(
            f"""Port {relay.port}
ListenAddress {relay.host}
HostKey {directory}/host_key
PidFile {directory}/sshd.pid
AuthorizedKeysFile {directory}/authorized_keys
AuthenticationMethods publickey
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PrintMotd no
PrintLastLog no
AllowTcpForwarding yes
Ciphers {CIPHER}
Compression no
"""
        )
        if os.geteuid() == 0:
            # sshd's own empty directory for separation of privileges; a packaged init script would make it.
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        sshd = Role("relay", [self._sshd or "sshd", "-D", "-e", "-f", directory / "sshd_config"], directory)
        self._roles.append(sshd)
        sshd.wait_until(lambda: listens(relay), "listening")
        way = self.through(relay)
        (directory / "known_hosts").write_text(
            f"[{relay.host}]:{relay.port} {host_key}[{way.host}]:{way.port} {host_key}"
        )
        agent = self._role("agent", relay, "-R", f"{self._middle}:{target}")
        agent.wait_until(lambda: listens(self._middle), "forwarding")
        client = self._role("client", way, "-L", f"{self.endpoint}:{self._middle}")
        client.wait_until(lambda: listens(self.endpoint), "listening")

    def _role(self, name: str, relay: Address, *forward: str) -> Role:
        role = Role(
            name,
            [
                *(self._ssh, "-F", "none", "-tt", "-i", self._directory / "user_key", "-p", str(relay.port)),
                *("-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes"),
                *("-o", f"UserKnownHostsFile={self._directory}/known_hosts", "-o", "StrictHostKeyChecking=yes"),
                *("-o", "ControlMaster=no", "-o", "Compression=no", "-o", f"Ciphers={CIPHER}"),
                # From 9.5 on a session with a terminal hides when keys were pressed: echoes would wait for it. Those
                # before it do not know the option.
                *("-o", "IgnoreUnknown=ObscureKeystrokeTiming", "-o", "ObscureKeystrokeTiming=no"),
                *(*forward, f"{getpass.getuser()}@{relay.host}", "exec sleep 86400"),
            ],
            self._directory,
        )
        self._roles.append(role)
        return role

    def prove_encryption(self, target: Address) -> str:
        """Send the known text with another client, through a recording relay before sshd."""

        def client(relay: Address, listen: Address) -> Role:
            known = self._directory / "known_hosts"
            key = (self._directory / "host_key.pub").read_text()
            known.write_text(known.read_text() + f"[{relay.host}]:{relay.port} {key}")
            return self._role("probe", relay, "-L", f"{listen}:{self._middle}")

        return self._prove(self._relay, client)
