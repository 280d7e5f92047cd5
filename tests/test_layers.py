"""Imports go one way (docs/architecture.md): these tests read each import from the source.

    cli -> client | relay | agent -> identity | pki | net -> mux -> wire

The roles never import each other, the core imports no clock and no socket, and the relay imports nothing that could
parse what it carries.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "arcbridge"
ROLES = ("client", "relay", "agent")

# The packages of arcbridge that each package may import, besides itself and the leaves.
LEAVES = frozenset(
    {
        "build",
        "errors",
        "http_fields",
        "legacy_refusals",
        "limiters",
        "loop_shares",
        "protobuf",
        "refusals",
        "installation",
        "single_file",
        "tasks",
        "units",
        "shallow_yaml",
        "untrusted_json",
        "",
    }
)
# "" is the package itself: __version__
FOUNDATION = frozenset({"identity", "pki", "net", "mux", "wire", "socket_options"})
ALLOWED: dict[str, frozenset[str]] = {
    "__main__": frozenset({"cli"}),
    "cli": frozenset({*ROLES, *FOUNDATION, "audit", "bundle", "checks", "observe", "sealing", "settings"}),
    **{role: frozenset({*FOUNDATION, "audit", "checks", "observe", "sealing", "settings"}) for role in ROLES},
    "audit": frozenset({"checks", "net", "observe", "pki", "settings"}),
    "identity": frozenset({"net", "mux", "settings", "wire"}),
    "pki": frozenset({"net", "mux", "wire"}),
    "net": frozenset({"identity", "pki", "mux", "wire", "socket_options"}),
    "mux": frozenset({"wire", "socket_options"}),
    "wire": frozenset(),
    "bundle": frozenset({"observe", "pki", "settings"}),
    "sealing": frozenset(),
    "checks": frozenset({"observe", "settings"}),
    "observe": frozenset({"settings"}),
    "settings": frozenset({"pki"}),
    "build": frozenset(),
    "errors": frozenset(),
    "http_fields": frozenset(),
    "legacy_refusals": frozenset(),
    "refusals": frozenset(),
    "limiters": frozenset(),
    "loop_shares": frozenset(),
    "protobuf": frozenset(),
    "tasks": frozenset(),
    "units": frozenset(),
    "shallow_yaml": frozenset(),
    "untrusted_json": frozenset(),
    "socket_options": frozenset(),
    "installation": frozenset(),
    "single_file": frozenset(),
    "": frozenset(),
}

# Groups of modules that import each other, each with its reason. None of these imports runs when its module is loaded.
MUTUAL: dict[frozenset[str], str] = {
    frozenset({"arcbridge.agent.sessions", "arcbridge.agent.agent_session"}): (
        "all sessions make each session, which calls them back; it imports their name for annotations alone"
    ),
    frozenset({"arcbridge.agent.accounts", "arcbridge.agent.actor_accounts"}): (
        "the accounts import those of actors with the first actor; these have the names of limits from there"
    ),
    frozenset({"arcbridge.mux.session", "arcbridge.mux.connection", "arcbridge.mux.stream"}): (
        "a session makes its connections and streams, which call it back; they import its name for annotations alone"
    ),
}

# `wire` decides and does not act: it uses no event loop, socket, clock, source of randomness or log.
NOT_IN_WIRE = frozenset(
    {"asyncio", "ssl", "time", "datetime", "logging", "structlog", "socket", "select", "selectors", "threading", "os",
     "random", "secrets", "subprocess", "concurrent", "signal"}
)  # fmt: skip

# Modules that parse the HTTP of Kubernetes: the relay must not reach them, at any depth of imports.
KUBERNETES = ("arcbridge.agent", "arcbridge.client", "kubernetes", "kubernetes_asyncio", "arcbridge.agent.kube")

SLOW = frozenset(
    {"aiofastnet", "aiohttp", "cryptography", "filelock", "jwt", "structlog", "prometheus_client", "yaml", "uvloop"}
)
FAST_MODULES = ("__init__", "__main__", "errors", "cli", "settings")


class Import(NamedTuple):
    """One import: the module it stands in, its absolute target, its line, and whether it runs when that is loaded."""

    module: str
    target: str
    line: int
    at_import: bool


def module_name(file: Path) -> str:
    parts = ("arcbridge", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for file in sorted(PACKAGE.rglob("*.py")) for found in imports_of(file))


def imports_of(file: Path) -> Iterator[Import]:
    name = module_name(file)
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    for node, at_import in walk(tree, True):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, node.lineno, at_import)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
            for alias in node.names:
                # `from arcbridge import relay` names a package, `from arcbridge.relay import run` a thing in one.
                yield Import(name, f"{base}.{alias.name}", node.lineno, at_import)


def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it runs at import: not inside functions, nor under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        runs = at_import
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            runs = False
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.body:
                yield from walk(ast.Module([statement], []), False)
            for statement in child.orelse:
                yield from walk(ast.Module([statement], []), at_import)
            continue
        yield child, runs
        yield from walk(child, runs)


def layer(module: str) -> str:
    """`arcbridge.relay.fleet.nats` is of layer `relay`; `arcbridge` itself, and names in it, of layer ``."""
    parts = module.split(".")
    if len(parts) < 2:
        return ""
    known = parts[1] in ALLOWED or (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file()
    return parts[1] if known else ""


def ours() -> list[Import]:
    return [found for found in imports() if found.target.split(".")[0] == "arcbridge"]


def described(found: list[Import]) -> list[str]:
    return [f"{item.module}:{item.line} imports {item.target}" for item in found]


def cycles(*, at_import: bool = False) -> set[frozenset[str]]:
    """The groups of our modules that import each other, directly or not; `at_import`: counting only what runs then."""
    known = {item.module for item in imports()} | {module_name(file) for file in PACKAGE.rglob("*.py")}
    edges: dict[str, set[str]] = {module: set() for module in known}
    for item in ours():
        target = item.target if item.target in known else item.target.rpartition(".")[0]
        if target in known and target != item.module and item.at_import >= at_import:
            edges[item.module].add(target)

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = list(edges[start])
        while waiting:
            module = waiting.pop()
            if module not in found:
                found.add(module)
                waiting += edges[module]
        return found

    reach = {module: reached(module) for module in known}
    groups = {frozenset(other for other in reach[module] if module in reach[other]) for module in known}
    return groups - {frozenset()}


def test_every_package_has_a_layer() -> None:
    packages = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert packages - {"__init__"} <= set(ALLOWED)


def test_imports_go_one_way() -> None:
    wrong = [
        item for item in ours() if layer(item.target) not in ALLOWED[layer(item.module)] | LEAVES | {layer(item.module)}
    ]
    assert described(wrong) == []


def test_roles_never_import_each_other() -> None:
    wrong = [item for item in ours() if {layer(item.module), layer(item.target)} <= set(ROLES)
             and layer(item.module) != layer(item.target)]  # fmt: skip
    assert described(wrong) == []


def test_the_relay_has_processes_above_its_service_and_siblings_below() -> None:
    """A worker process runs the service, the service hands joins to siblings; neither is imported from below."""
    above, service = "arcbridge.relay.processes", "arcbridge.relay.service"
    below = ("arcbridge.relay.siblings", "arcbridge.relay.fleet", "arcbridge.relay.registry")
    relay = [item for item in ours() if layer(item.module) == "relay"]
    wrong = [item for item in relay if item.target.startswith(above) and not item.module.startswith(above)]
    wrong += [item for item in relay if item.target.startswith(service) and item.module.startswith(below)]
    assert described(wrong) == []


def test_no_two_of_identity_pki_and_net_need_each_other_both_ways() -> None:
    pairs = {(layer(item.module), layer(item.target)) for item in ours()}
    both = {pair for pair in pairs if pair[0] != pair[1] and pair[::-1] in pairs and set(pair) <= FOUNDATION}
    assert both == set()


def test_no_two_rooms_of_the_client_need_each_other_both_ways() -> None:
    """Rooms are its folders and the modules beside them; none is in a circle of any length."""

    def room(module: str) -> str:
        return ".".join(module.split(".")[:3])

    known = {module_name(file) for file in PACKAGE.rglob("*.py")}
    edges: dict[str, set[str]] = {}
    for item in ours():
        target = item.target if item.target in known else item.target.rpartition(".")[0]
        if layer(item.module) == layer(target) == "client" and room(item.module) != room(target):
            edges.setdefault(room(item.module), set()).add(room(target))
    floors: list[set[str]] = []
    left = {room(module) for module in known if layer(module) == "client"} - {"arcbridge.client"}
    assert len(left) <= 12, f"the client has {len(left)} names at its top"
    while floor := {name for name in left if not edges.get(name, set()) & left}:
        floors.append(floor)
        left -= floor
    assert left == set(), {name: sorted(edges[name] & left) for name in left}


def test_no_modules_need_each_other() -> None:
    assert cycles(at_import=True) == set()
    assert cycles() <= set(MUTUAL)


def private_names(package: str) -> set[str]:
    """Attributes, methods and names of a package that begin with one underscore."""
    found = set()
    for file in (PACKAGE / package).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                found.add(node.attr)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def private_reads(source: str, private: set[str]) -> list[str]:
    """Reads of those names on anything but `self`, and imports of them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in private and ast.unparse(node.value) != "self":
            found.append(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("arcbridge.wire"):
            found += [alias.name for alias in node.names if alias.name.startswith("_")]
    return found


def test_mux_reads_nothing_private_of_wire() -> None:
    private = private_names("wire")
    wrong = {
        file.name: private_reads(file.read_text(encoding="utf-8"), private) for file in (PACKAGE / "mux").glob("*.py")
    }
    assert {name: reads for name, reads in wrong.items() if reads} == {}


def test_the_check_of_private_reads_finds_what_it_should() -> None:
    private = private_names("wire")
    assert {"_context", "_make_room", "_PATH"} <= private
    source = "from arcbridge.wire.sender import _PATH\nself._context\nself._machine.sender._context\nx._make_room(1)"
    assert private_reads(source, private) == ["_PATH", "self._machine.sender._context", "x._make_room"]


def test_the_core_is_pure() -> None:
    wrong = [
        item
        for item in imports()
        if layer(item.module) in ("wire", "limiters") and item.target.split(".")[0] in NOT_IN_WIRE
    ]
    assert described(wrong) == []


def test_the_relay_cannot_parse_what_it_carries() -> None:
    reached: set[str] = set()
    waiting = [item.module for item in imports() if layer(item.module) == "relay"]
    edges: dict[str, set[str]] = {}
    for item in imports():
        edges.setdefault(item.module, set()).update({item.target, item.target.rpartition(".")[0]})
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += edges.get(module, set())
    assert {module for module in reached if module.startswith(KUBERNETES)} == set()
    assert any(module.startswith("arcbridge.errors") for module in reached), "no import was followed"


def test_no_slow_import_where_every_start_pays_for_it() -> None:
    wrong = [
        item
        for item in imports()
        if item.at_import
        and [*item.module.split("."), "__init__"][1] in FAST_MODULES
        and item.target.split(".")[0] in SLOW
    ]
    assert described(wrong) == []


def test_the_environment_is_read_in_the_command_line_alone() -> None:
    """Layers below `cli` take settings as arguments. The modules in `allowed` read names that the platform defines."""
    allowed = {
        "arcbridge.net.dialer",  # HTTPS_PROXY and NO_PROXY
        "arcbridge.agent.kube.apiserver",  # KUBERNETES_SERVICE_HOST, set by the kubelet
        "arcbridge.agent.workload",  # POD_NAME, set by the kubelet
        "arcbridge.client.service",  # the default of an argument: KUBECONFIG, XDG_*
        "arcbridge.single_file",  # what the loader of that file leaves in it
        "arcbridge.client.credentials.login",  # handed on to the user's own token command
    }
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = module_name(file)
        if layer(name) in ("cli", "__main__") or name in allowed:
            continue
        text = file.read_text(encoding="utf-8")
        wrong += [f"{name}: {use}" for use in ("os.environ", "os.getenv", "environ[") if use in text]
    assert wrong == []


@pytest.mark.parametrize(
    "module", ["arcbridge", "arcbridge.settings.config_loader", "arcbridge.errors", "arcbridge.cli.parser"]
)
def test_start_loads_nothing_slow(module: str) -> None:
    """Ask the interpreter what it loaded: that counts imports at any depth, where the test above reads the source."""
    code = f"import sys, {module}; print(*sorted(set(m.split('.')[0] for m in sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & (SLOW | {"asyncio", "ssl"}), module


def test_a_cycle_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "arcbridge"
    (package / "wire").mkdir(parents=True)
    (package / "wire" / "a.py").write_text("from arcbridge.wire import b\n")
    (package / "wire" / "b.py").write_text("def f():\n    from arcbridge.wire.c import C\n")
    (package / "wire" / "c.py").write_text("TYPE_CHECKING = False\nif TYPE_CHECKING:\n    import arcbridge.wire.a\n")
    (package / "wire" / "d.py").write_text("from arcbridge.wire import a\n")
    this = sys.modules[__name__]
    monkeypatch.setattr(this, "PACKAGE", package)
    monkeypatch.setattr(this, "imports", lambda: tuple(i for f in package.rglob("*.py") for i in imports_of(f)))
    assert cycles() == {frozenset({"arcbridge.wire.a", "arcbridge.wire.b", "arcbridge.wire.c"})}
    assert cycles(at_import=True) == set()


STREAMS = ("stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__")
LOGS = {("arcbridge.observe.logging", "stderr")}
"""Standard streams that carry a log and no message to a user: the log of every role."""


def test_only_the_command_line_prints() -> None:
    """A role writes to its user through an interface that `cli` gives it, such as the client's `Terminal`."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = module_name(file)
        if layer(name) not in ("cli", "__main__"):
            found += [f"{name}:{line} uses {what}" for what, line in terminal_uses(file) if (name, what) not in LOGS]
    assert found == []


def terminal_uses(file: Path) -> Iterator[tuple[str, int]]:
    """Find each use of `print`, `input` and the standard streams: called, handed on, or imported by name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Name) and node.id in ("print", "input"):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "sys" and node.attr in STREAMS:
            yield node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "sys":
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in STREAMS)


def test_the_check_of_printing_finds_what_it_should(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("import sys\nfrom sys import stderr\nprint()\ndef f(tell=print):\n    sys.stdout.write(input())\n")
    assert sorted(terminal_uses(file)) == [("input", 5), ("print", 3), ("print", 4), ("stderr", 2), ("stdout", 5)]


def test_the_check_itself_finds_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "arcbridge"
    (package / "wire").mkdir(parents=True)
    file = package / "wire" / "bad.py"
    file.write_text(
        "import time\nfrom ..relay import pump\nfrom . import frames\nfrom arcbridge import errors\n"
        "TYPE_CHECKING = False\nif TYPE_CHECKING:\n    import ssl\ndef f():\n    import socket\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", package)
    found = [(item.target, item.at_import) for item in imports_of(file)]
    assert found == [
        ("time", True), ("arcbridge.relay.pump", True), ("arcbridge.wire.frames", True), ("arcbridge.errors", True),
        ("ssl", False), ("socket", False),
    ]  # fmt: skip
