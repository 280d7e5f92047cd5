"""deb and rpm as an operator has them: installed, configured, upgraded and removed by dpkg and rpm themselves."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from arcbridge import __version__
from release import linux_packages
from tests.support.kube_programs import Unavailable
from tests.support.layered_machine import ENVIRONMENT, LayeredMachine
from tests.support.processes import ManagedProcess, require_or_skip
from tests.support.world import fixed_port

PROCESSOR = linux_packages.PROCESSORS.get(platform.machine(), "")
DEBS = tuple(
    f"arcbridge{name}_{__version__}_{kind}.deb"
    for name, kind in (("", PROCESSOR), ("-relay", "all"), ("-agent", "all"))
)
RPMS = tuple(
    f"arcbridge{name}-{__version__}-1.{kind}.rpm"
    for name, kind in (("", platform.machine()), ("-relay", "noarch"), ("-agent", "noarch"))
)
UNITS = ("system/arcbridge-relay.service", "system/arcbridge-agent.service", "user/arcbridge-client.service")
SETTINGS = {
    "relay": ("relay.toml", "relay-authentication.yaml", "policy.toml"),
    "agent": ("agent.toml", "agent-authentication.yaml"),
}

# The release is built first.
pytestmark = pytest.mark.timeout(600)


def made(program: str, package: str, files: Path, directory: Path) -> LayeredMachine:
    if shutil.which(program, path=ENVIRONMENT["PATH"]) is None:
        require_or_skip("packages", f"{program} is not on this machine (Debian: package {package})")
    try:
        return LayeredMachine(directory, files)
    except Unavailable as error:
        require_or_skip("packages", str(error))


@pytest.fixture(scope="module")
def debian(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LayeredMachine]:
    """A machine with the three packages; what is left of it is gone with the last test of this file."""
    with made("dpkg", "dpkg", dist, tmp_path_factory.mktemp("debian") / "machine") as machine:
        done = machine.run("dpkg", "--install", *(f"/mnt/{name}" for name in DEBS))
        for role in SETTINGS:
            assert f"arcbridge-{role} is installed, and nothing runs yet" in done.stdout
        yield machine


def test_the_program_brings_all_that_it_runs_on(debian: LayeredMachine) -> None:
    """No Python of the system: of what lies outside of the package it needs glibc alone."""
    said = debian.run("arcbridge", "version").stdout
    assert re.fullmatch(rf"arcbridge {re.escape(__version__)} \(commit [0-9a-f]{{12}}, \d{{4}}-\d\d-\d\d\)\n", said)
    assert debian.run("kubectl-arcbridge", "--version").stdout == f"arcbridge {__version__}\n"
    depends = debian.run("dpkg-deb", "--field", f"/mnt/{DEBS[0]}", "Depends").stdout
    assert re.fullmatch(r"libc6 \(>= 2\.\d+\)\n", depends)
    extras = "nats, nkeys, cel_expr_python, sqlite3, uvloop, aiofastnet, truststore"
    where = debian.run("arcbridge", "-c", f"import sys, {extras}; print(*sys.path, sys.executable, sep=chr(10))").stdout
    assert {line for line in where.splitlines() if not line.startswith("/usr/lib/arcbridge/")} == set()
    libraries = debian.run("arcbridge", "-c", "import aiofastnet; print(aiofastnet.OPENSSL_DYN_LIBS.libssl)").stdout
    assert libraries.startswith("/usr/lib/arcbridge/"), "sessions use its TLS, and not the slower one of the event loop"
    path = "import sys; sys.argv = ['arcbridge']; from arcbridge.installation import own_path as p; print(p())"
    assert debian.run("arcbridge", "-c", path).stdout == "/usr/bin/arcbridge\n", "the path in kubeconfigs"
    done = debian.run("arcbridge", "-P", "-m", "arcbridge", "--version")
    assert done.stdout == f"arcbridge {__version__}\n", "how the background process is started"


def test_it_has_what_a_package_has(debian: LayeredMachine) -> None:
    files = set(debian.run("dpkg", "--listfiles", "arcbridge").stdout.splitlines())
    assert {
        "/usr/share/man/man1/arcbridge.1.gz",
        "/usr/share/man/man8/arcbridge-relay.8.gz",
        "/usr/share/bash-completion/completions/arcbridge",
        "/usr/share/fish/vendor_completions.d/arcbridge.fish",
        "/usr/share/zsh/vendor-completions/_arcbridge",
        "/usr/share/doc/arcbridge/run.md",
        "/usr/share/doc/arcbridge/how-to/everyday.md",
        "/usr/share/doc/arcbridge/examples/helm/arcbridge-agent/Chart.yaml",
        "/usr/share/doc/arcbridge/examples/kubernetes/overlays/impersonation-constrained/kustomization.yaml",
        "/usr/share/doc/arcbridge/licences/python/LICENSE.txt",
    } <= files
    for unit in UNITS:
        for page in re.findall(r"^Documentation=file://(\S+)$", debian.read(f"/usr/lib/systemd/{unit}"), re.MULTILINE):
            assert page in files
    bill = json.loads(debian.read("/usr/share/doc/arcbridge/arcbridge.cdx.json"))
    licences = {Path(name).parent.name for name in files if name.startswith("/usr/share/doc/arcbridge/licences/")}
    without = {component["name"].lower().replace("_", "-") for component in bill["components"]} - licences
    assert without <= {"aiofastnet", "nkeys", "cel-expr-python", "nats-py"}, "those have no file of it"
    assert {name for name in files if name.startswith("/etc/")} == set()


def test_nothing_runs_before_it_is_configured(debian: LayeredMachine) -> None:
    """No unit is enabled; and the settings that are there start nothing and let no user in."""
    for role, names in SETTINGS.items():
        enabled = debian.run("systemctl", "is-enabled", f"arcbridge-{role}.service", check=False)
        assert enabled.stdout == "disabled\n", enabled.stderr
        files = debian.run("dpkg-query", "--show", "--showformat=${Conffiles}", f"arcbridge-{role}").stdout
        listed = [line.split()[0] for line in files.splitlines() if line]
        assert sorted(listed) == sorted(
            [*(f"/etc/arcbridge/{name}" for name in names), f"/etc/logrotate.d/arcbridge-{role}"]
        )
        check = ("--role", role, "config", "check", "--config", f"/etc/arcbridge/{role}.toml")
        done = debian.run("arcbridge", *check, check=False)
        assert done.returncode == 2
        assert "is the example's name" in done.stdout + done.stderr
    assert not re.search(r"^\[\[allow\]\]", debian.read("/etc/arcbridge/policy.toml"), re.MULTILINE)
    (user,) = [line for line in debian.read("/etc/passwd").splitlines() if line.startswith("arcbridge:")]
    assert user.endswith(":/var/lib/arcbridge-agent:/usr/sbin/nologin")


def test_systemd_finds_nothing_wrong_with_the_units(debian: LayeredMachine) -> None:
    if shutil.which("systemd-analyze") is None:
        require_or_skip("systemd", "systemd-analyze is not on this machine (Debian: package systemd)")
    for unit in UNITS:
        path = f"/usr/lib/systemd/{unit}"
        assert re.findall(r"^ExecStart=(\S+) ", debian.read(path), re.MULTILINE) == ["/usr/bin/arcbridge"]
        done = debian.run("systemd-analyze", "verify", path, check=False)
        assert [line for line in done.stderr.splitlines() if "arcbridge" in line] == []


def test_a_relay_of_two_workers_serves_and_an_agent_enrols(debian: LayeredMachine, tmp_path: Path) -> None:
    """`config init` fills the files that the packages have; each worker is this program, started again."""
    port = fixed_port()
    relay = ("arcbridge", "--role", "relay")
    address = f"127.0.0.1:{port}"
    flags = ("--public-address", address, "--listen", address, "--workers", "2", "--issuer", "https://login.test")
    debian.run(*relay, "config", "init", *flags, "--group", "platform")
    config = ("--config", "/etc/arcbridge/relay.toml")
    with ManagedProcess(
        debian.command(*relay, *config), log_dir=tmp_path, name="relay", env=dict(ENVIRONMENT)
    ) as process:
        process.wait_for_line("relay serving", timeout=60)
        token = json.loads(debian.run(*relay, "token", "create", "--cluster", "shop-1", "-o", "json", *config).stdout)
        debian.write("/root/token", token["token"])
        pin = token["relay_ca_pin"]
        debian.run(
            *("arcbridge", "--role", "agent", "enroll", "--config", "/dev/null", "--relay", address),
            *("--relay-ca-pin", pin, "--state-dir", "/root/agent", "--join-token-file", "/root/token"),
        )
        assert "shop-1" in debian.run(*relay, "cluster", "list", *config).stdout
        assert process.stop(60) == 0


def test_edited_settings_survive_an_upgrade_and_a_removal(debian: LayeredMachine, dist: Path) -> None:
    """The last one of a machine: a later version of the relay's package, then dpkg's `remove` and `purge`."""
    mine = debian.read("/etc/arcbridge/relay.toml") + "# mine\n"
    debian.write("/etc/arcbridge/relay.toml", mine)
    debian.run("dpkg-deb", "--raw-extract", f"/mnt/{DEBS[1]}", "/root/later")
    debian.run("sh", "-c", "cd /root/later && sed -i 's/^Version: .*/&+later/' DEBIAN/control && rm DEBIAN/md5sums")
    for name in ("relay.toml", "relay-authentication.yaml"):
        debian.run("sh", "-c", f"echo '# later' >> /root/later/etc/arcbridge/{name}")
    debian.run("dpkg-deb", "--build", "--root-owner-group", "/root/later", "/root/later.deb")
    before = debian.read("/etc/arcbridge/relay-authentication.yaml")
    done = debian.run("dpkg", "--install", "--force-confold", "/root/later.deb")
    assert "nothing runs yet" not in done.stdout
    assert debian.run("dpkg-query", "--show", "--showformat=${Version}", "arcbridge-relay").stdout.endswith("+later")
    assert debian.read("/etc/arcbridge/relay.toml") == mine
    assert debian.read("/etc/arcbridge/relay.toml.dpkg-dist").endswith("# later\n")
    assert debian.read("/etc/arcbridge/relay-authentication.yaml") in (before, f"{before}# later\n")

    debian.run("mkdir", "-p", "/var/lib/arcbridge", "/var/lib/arcbridge-agent")
    debian.run("systemctl", "enable", "arcbridge-relay.service")
    debian.run("dpkg", "--remove", "arcbridge-relay", "arcbridge-agent", "arcbridge")
    for gone in ("/usr/lib/arcbridge", "/usr/bin/arcbridge", *(f"/usr/lib/systemd/{unit}" for unit in UNITS)):
        assert not debian.has(gone)
    enabled = ("find", "/etc/systemd/system", "-name", "arcbridge*")
    assert debian.run(*enabled).stdout.endswith(".wants/arcbridge-relay.service\n"), "kept as the settings are"
    assert debian.read("/etc/arcbridge/relay.toml") == mine

    done = debian.run("dpkg", "--purge", "arcbridge-relay", "arcbridge-agent", "arcbridge")
    assert not debian.has("/etc/arcbridge/relay.toml")
    assert not debian.has("/etc/arcbridge/agent.toml")
    assert debian.run(*enabled).stdout == ""
    for role, kept in (("relay", "/var/lib/arcbridge"), ("agent", "/var/lib/arcbridge-agent")):
        assert debian.has(kept)
        assert f"arcbridge-{role}: {kept} is kept" in done.stderr


def test_rpm_installs_the_same_and_keeps_edited_settings(dist: Path, tmp_path: Path) -> None:
    """On a system of dpkg's rpm knows none of the packages that are needed: they are compared by their names."""
    with made("rpm", "rpm", dist, tmp_path / "machine") as machine:
        rpm = ("rpm", "--force-debian")
        needed = machine.run(*rpm, "--query", "--requires", "--package", f"/mnt/{RPMS[1]}").stdout.splitlines()
        assert {f"arcbridge = {__version__}", "systemd"} <= set(needed)
        (glibc,) = re.findall(r"^glibc >= (2\.\d+)$", machine.run(*rpm, "-qRp", f"/mnt/{RPMS[0]}").stdout, re.MULTILINE)
        assert f"(>= {glibc})" in machine.run("dpkg-deb", "--field", f"/mnt/{DEBS[0]}", "Depends").stdout
        files = machine.run(*rpm, "--query", "--configfiles", "--package", f"/mnt/{RPMS[1]}").stdout.split()
        assert sorted(files) == sorted(
            [*(f"/etc/arcbridge/{name}" for name in SETTINGS["relay"]), "/etc/logrotate.d/arcbridge-relay"]
        )
        done = machine.run(*rpm, "--install", "--nodeps", *(f"/mnt/{name}" for name in RPMS))
        assert "arcbridge-agent is installed, and nothing runs yet" in done.stdout
        assert machine.run(*rpm, "--verify", "--nodeps", "arcbridge", "arcbridge-relay", "arcbridge-agent").stdout == ""
        assert f"arcbridge {__version__} (commit " in machine.run("arcbridge", "version").stdout
        assert "arcbridge:" in machine.read("/etc/passwd")
        machine.write("/etc/arcbridge/policy.toml", "# mine\n")
        machine.run(*rpm, "--erase", "arcbridge-relay", "arcbridge-agent", "arcbridge")
        assert not machine.has("/usr/lib/arcbridge")
        assert machine.read("/etc/arcbridge/policy.toml.rpmsave") == "# mine\n"


def test_lintian_finds_no_error(dist: Path) -> None:
    lintian = shutil.which("lintian")
    if lintian is None:
        require_or_skip("lintian", "lintian is not on this machine (Debian: package lintian)")
    done = subprocess.run(
        [lintian, "--fail-on", "error", "--tag-display-limit", "0", *(dist / name for name in DEBS)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def after_install(directory: Path, role: str, state: str, *words: str, check: str = "exit 0") -> tuple[list[str], str]:
    """Run the script of an upgrade of `role`, whose unit is in `state`; return what it called, and what it printed."""
    calls, programs = directory / "calls", directory / "bin"
    calls.write_text("")
    programs.mkdir(exist_ok=True)
    enabled = f'*is-enabled*) ;; *) echo "systemctl $*" >> {calls}'
    for name, body in {
        "systemctl": f'case "$*" in show*) echo {state} ;; {enabled} ;; esac',
        "runuser": f'echo "runuser $1 $2" >> {calls}; shift 3; exec "$@"',
        "systemd-sysusers": "exit 0",
        "install": "exit 0",
        "arcbridge": f'echo "another arcbridge" >> {calls}; exit 1',
        "packaged": f'echo "config check" >> {calls}; {check}',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    users = "config/sysusers/arcbridge-@ROLE@.conf"
    text = Path(".ci/release/linux/after-install.sh").read_text()
    for path, here in (
        ("/usr/bin/arcbridge", programs / "packaged"),
        ("/run/systemd/system", directory),
        ("/usr/lib/sysusers.d/arcbridge-@ROLE@.conf", users),
        ("--kill-after=5 60 ", "--kill-after=1 1 "),
    ):
        assert path in text
        text = text.replace(path, str(here))
    script = linux_packages.filled(text, {"ROLE": role, "STATE": "/state"})
    environment = {"PATH": f"{programs}:/usr/bin:/bin"}
    done = subprocess.run(
        ["sh", "-c", script, "script", *words], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return calls.read_text().splitlines(), done.stdout + done.stderr


RESTART = "systemctl --no-block try-restart arcbridge-{}.service"


@pytest.mark.parametrize(("role", "check"), [("relay", []), ("agent", ["runuser -u arcbridge"])])
@pytest.mark.parametrize("words", [("configure", "0.1.0"), ("2",)], ids=["dpkg", "rpm"])
@pytest.mark.parametrize(
    ("state", "runs"), [("active", True), ("activating", True), ("inactive", False), ("failed", False)]
)
def test_an_upgrade_restarts_what_runs_and_asks_the_package_s_own_program(
    role: str, check: list[str], words: tuple[str, ...], state: str, runs: bool, tmp_path: Path
) -> None:
    """An agent that has not reached a relay yet is "activating". Root's PATH has another arcbridge first."""
    calls, said = after_install(tmp_path, role, state, *words)
    restarted = [*check, "config check", RESTART.format(role)] if runs else []
    assert calls == ["systemctl daemon-reload", *restarted]
    stopped = f"arcbridge-{role} is enabled, and does not run: `systemctl start arcbridge-{role}` starts it.\n"
    assert said == ("" if runs else stopped)


@pytest.mark.parametrize("role", ["relay", "agent"])
@pytest.mark.parametrize("check", ["exit 2", "exec sleep 50"])
def test_settings_that_are_refused_or_hang_the_check_leave_the_version_before(
    role: str, check: str, tmp_path: Path
) -> None:
    calls, said = after_install(tmp_path, role, "active", "configure", "0.1.0", check=check)
    assert RESTART.format(role) not in calls
    assert f"arcbridge-{role}: not restarted" in said


def test_what_is_kept_is_named_by_the_directory_behind_systemd_s_link(tmp_path: Path) -> None:
    """Who removes the link of a unit with DynamicUser= alone has not removed the keys."""
    (tmp_path / "private").mkdir()
    (tmp_path / "state").symlink_to("private")
    text = Path(".ci/release/linux/after-remove.sh").read_text().replace("/run/systemd/system", str(tmp_path / "none"))
    script = linux_packages.filled(text, {"ROLE": "relay", "STATE": f"{tmp_path}/state {tmp_path}/never-made"})
    done = subprocess.run(["sh", "-c", script, "script", "0"], capture_output=True, text=True, timeout=60, check=True)
    assert re.findall(r"(\S+) is kept", done.stderr) == [str((tmp_path / "private").resolve())]


@pytest.mark.parametrize(
    ("version", "packed"), [("0.2.0", "0.2.0"), ("0.2.0rc1", "0.2.0~rc1"), ("1.0.0a2", "1.0.0~a2")]
)
def test_a_version_before_a_release_is_older_than_it(version: str, packed: str, tmp_path: Path) -> None:
    assert linux_packages.packed_version(version) == packed
    if packed != version and (dpkg := shutil.which("dpkg")):
        subprocess.run([dpkg, "--compare-versions", packed, "lt", packed.partition("~")[0]], check=True)


def test_the_newest_glibc_that_is_wanted_is_the_one_that_is_needed(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "one.so").write_bytes(b"\0GLIBC_2.9\0GLIBC_2.34\0")
    (tmp_path / "two.so").write_bytes(b"\0GLIBC_2.28\0GLIBC_PRIVATE\0")
    assert linux_packages.glibc(tmp_path) == "2.34"


def test_a_mark_without_a_value_is_refused() -> None:
    assert linux_packages.filled("a @NAME@ b", {"NAME": "x"}) == "a x b"
    with pytest.raises(ValueError, match="@OTHER@ has no value"):
        linux_packages.filled("@NAME@ @OTHER@", {"NAME": "x"})
