"""The tests mirror the house: arcbridge/net/address.py has tests/net/test_address.py, and the other way round."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOUSE = ROOT / "arcbridge"
TESTS = ROOT / "tests"

# Modules without a test file of their own, each with its reason.
WITHOUT_TEST: dict[str, str] = {
    "__main__": "two lines; tests/test_start.py runs it as a process",
    "agent/agent_session": "with `sessions`, in whose tests sessions are opened, resumed and ended",
    "settings/config": "declarations; the tests of `config_loader` load them",
    "agent/parts": "declarations",
    "audit/log": "with `agent/audit/log`, which is one",
    "audit/metrics": "with the metrics of each role",
    "audit/sinks/collector": "with the transports over it, and the check of their settings",
    "client/session/relay_http": "with `client/commands/directory`, whose list is one of its answers",
    "cli/words": "with `parser`, whose command lines are read word by word",
    "cli/administration": "with `relay` and `admin`, in whose tests the words of each command are read",
    "http_fields": "declarations",
    "identity/fetch": "declarations",
    "pki/new_token": "with relay/admin, in whose tests a shell runs its lines",
    "relay/counters": "declarations",
    "relay/client_join": "with `rendezvous`, in whose tests both ends meet",
    "relay/membership": "with `service`; that of a worker in tests of its own",
    "relay/page/opening": "with `service`, whose relay with a page a browser opens in tests/e2e",
    "relay/parts": "declarations",
    "relay/recovery_words": "with `recovery`",
    "relay/pending_dials": "with `rendezvous`, in whose tests both ends meet",
    "protobuf": "with `agent/kube/pod_body` and `identity/cel/syntax`, which read by it",
    "errors": "declarations; each is tested where it is raised",
    "wire/context": "declarations; the parts that share it are tested with it",
    "wire/events": "declarations; the tests of the session read them",
    "wire/state": "declarations; the tests of the session go through each state",
}

# Test files without a module of their own, each with its reason. Folders that test what is not a module are below.
WITHOUT_MODULE: dict[str, str] = {
    "identity/test_kubernetes_cases": "loader and verifier beside the tests of Kubernetes",
    "cli/test_snapshots": "what people read of all commands",
    "relay/page/test_script": "relay/page/script.js in a browser",
    "test_dead_code": "about all modules",
    "test_docstrings": "about all modules",
    "test_layers": "about all modules",
    "test_mirror": "this file",
    "test_pages": "about links of pages",
    "test_patterns": "about the regular expressions of all modules",
    "test_sentences": "about all modules",
    "test_sizes": "about all modules",
    "test_start": "the executable as a process",
    "test_threats": "about docs/threats.md and docs/security.md",
}
# Tests of one module in several files, one for each matter: tests/agent/test_sessions_limits.py belongs to sessions.py.
CUT: dict[str, tuple[str, ...]] = {
    "agent/accounts": ("loop",),
    "agent/sessions": ("actors", "bound_tokens", "limits", "restrictions", "resumption", "revocation"),
    "agent/kube/proxy": ("audit", "hostile", "walk"),
    "client/credentials/login": ("mixup", "tokens"),
    "client/session/resumable_session": ("moving",),
    "client/session/session_manager": ("behind_auth_ok",),
    "relay/http/api": ("limits",),
    "wire/resumption": ("rules",),
    "wire/session": ("endings", "hostile", "liveness"),
}
OTHER_FOLDERS = {
    "actionlint": "the Go module of actionlint",
    "age": "the Go module of age and the vectors of its format",
    "bench": "bench/",
    "blindness": "what a relay sees",
    "cluster": "the Go module of the test cluster",
    "config": "the files in config/",
    "demo": "demo/",
    "differential": "the agent's parsers beside other ones, over the network",
    "e2e": "real processes",
    "fuzz": "every parser of outside input",
    "release": ".ci/release/",
    "helm": "the Go module of Helm",
    "k9s": "the Go module of k9s",
    "hostile": "a relay, an agent or a client with one lie, against the other roles",
    "keycloak": "real processes with a real identity provider",
    "readme": "README.md, docs/tutorial.md and docs/transcript.md, block by block",
    "nethttp": "the Go module of a net/http server",
    "support": "the parts that tests are made of",
    "walkthrough": "real processes with the shapes of Entra ID",
}


def has_code(file: Path) -> bool:
    """Say whether there is anything to test: more than a docstring, imports and `__all__`."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    trivial = (ast.Import, ast.ImportFrom)
    return any(
        not isinstance(node, trivial)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        and not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("__all__", "__version__"))
        for node in body
    )


def modules() -> set[str]:
    files = (file for file in HOUSE.rglob("*.py") if has_code(file))
    return {file.relative_to(HOUSE).with_suffix("").as_posix().replace("/__init__", "") for file in files}


def covered() -> set[str]:
    found = set()
    for file in TESTS.rglob("test_*.py"):
        place = file.relative_to(TESTS)
        if place.parts[0] in OTHER_FOLDERS and len(place.parts) > 1:
            continue
        found.add((place.parent / place.stem.removeprefix("test_")).as_posix())
    return found


def test_every_module_has_its_test() -> None:
    missing = sorted(modules() - covered() - set(WITHOUT_TEST))
    assert not missing, "without tests: " + ", ".join(missing)


def test_every_test_has_its_module() -> None:
    everything = {file.relative_to(HOUSE).with_suffix("").as_posix() for file in HOUSE.rglob("*.py")}
    without = {name.replace("test_", "") for name in WITHOUT_MODULE}
    # One module may have a second file: tests/wire/test_session_properties.py also belongs to session.py.
    parts = {f"{module}_{matter}" for module, matters in CUT.items() for matter in matters}
    lonely = sorted(
        name for name in covered() - everything - without - parts if name.removesuffix("_properties") not in everything
    )
    assert not lonely, "tests of nothing: " + ", ".join(lonely)


def test_the_exceptions_are_still_needed() -> None:
    assert sorted(set(WITHOUT_TEST) - modules()) == []
    assert sorted(set(WITHOUT_TEST) & covered()) == []
    assert [name for name in WITHOUT_MODULE if not (TESTS / f"{name}.py").is_file()] == []
    assert {f"{module}_{matter}" for module, matters in CUT.items() for matter in matters} <= covered()


def test_nothing_is_tested_twice_under_one_name() -> None:
    """Folders of tests are packages, so that two files may have one name."""
    folders = {file.parent for file in TESTS.rglob("test_*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []
