"""The bill of materials: valid CycloneDX, and about what is installed, exactly."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest

from arcbridge import __version__
from release import lock, sbom
from release.artifacts import sha256
from tests.release.test_lock import applies, entries, environment

# What comes from an index comes as fast as it comes.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def bill(dist: Path) -> dict[str, Any]:
    (path,) = dist.glob("*.cdx.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_it_is_valid(dist: Path) -> None:
    (path,) = dist.glob("*.cdx.json")
    # Seconds, for which no other test of the process should wait.
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(path.read_text()) is None
    assert validator.validate_str(path.read_text().replace('"bomFormat"', '"format"')) is not None


def test_it_names_the_product(bill: dict[str, Any], dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    product = bill["metadata"]["component"]
    assert (product["name"], product["version"], product["type"]) == ("arcbridge", __version__, "application")
    assert product["licenses"] == [{"license": {"acknowledgement": "declared", "id": "Apache-2.0"}}]
    assert product["hashes"] == [{"alg": "SHA-256", "content": sha256(wheel)}]


def test_components_are_those_of_the_lock(bill: dict[str, Any]) -> None:
    where = environment(".".join(platform.python_version_tuple()[:2]), platform.machine())
    where["python_full_version"] = platform.python_version()
    locked = {
        (name, str(pin.specifier).removeprefix("=="), digest.removeprefix("--hash=sha256:"))
        for name, (pin, digests) in entries(lock.RUNTIME).items()
        if applies(pin.marker, where)
        for digest in digests
    }
    described = {
        (re.sub(r"[-_.]+", "-", part["name"]).lower(), part["version"], digest["content"])
        for part in bill["components"]
        for digest in part["hashes"]
    }
    assert described <= locked
    assert {name for name, _, _ in described} == {name for name, _, _ in locked}
    assert len(described) == len(bill["components"])


def test_each_component_has_its_licence_and_its_needs(bill: dict[str, Any]) -> None:
    for part in bill["components"]:
        assert part["licenses"], part["name"]
        assert part["purl"] == f"pkg:pypi/{part['name'].lower().replace('_', '-')}@{part['version']}"
    known = {part["bom-ref"] for part in (*bill["components"], bill["metadata"]["component"])}
    graph = {node["ref"]: set(node.get("dependsOn", ())) for node in bill["dependencies"]}
    assert set(graph) == known
    reached, queue = set(), [bill["metadata"]["component"]["bom-ref"]]
    while queue:
        reached.add(node := queue.pop())
        queue += graph[node] - reached
    assert reached == known, "each component is there because another one needs it"


def test_no_path_of_a_machine_is_in_it(bill: dict[str, Any], dist: Path) -> None:
    text = json.dumps(bill)
    assert "file://" not in text
    assert str(lock.ROOT) not in text
    assert "/tmp/" not in text


FILES = {"arcbridge-2.0-py3-none-any.whl": "aa", "some.thing-1.0.tar.gz": "bb"}


def small_bill(name: str = "Some_Thing", licences: tuple[str, ...] = ("MIT",)) -> dict[str, Any]:
    licenses = [{"license": {"id": licence}} for licence in licences]
    return {
        "metadata": {"component": {"name": "arcbridge", "licenses": [{"license": {"id": "Apache-2.0"}}]}},
        "components": [{"name": name, "version": "1.0", "licenses": licenses}],
    }


def test_a_component_has_the_hash_of_its_file() -> None:
    made = json.loads(sbom.complete(small_bill(), FILES))
    assert made["components"][0]["hashes"] == [{"alg": "SHA-256", "content": "bb"}]
    assert made["metadata"]["component"]["version"] == "2.0"
    with pytest.raises(ValueError, match=r"other 1\.0 was installed from no file"):
        sbom.complete(small_bill("Other"), FILES)


def test_a_component_without_a_licence_is_an_error() -> None:
    with pytest.raises(ValueError, match="some-thing names no licence"):
        sbom.complete(small_bill(licences=()), FILES)


@pytest.mark.parametrize("name", sorted(sbom.LICENCES))
def test_a_licence_that_we_conclude_is_that_of_the_file(name: str) -> None:
    distribution = importlib.metadata.distribution(name)
    assert not distribution.metadata.get("License-Expression")
    (file,) = [file for file in distribution.files or [] if file.name == "LICENSE"]
    assert file.read_text().startswith(f"The {sbom.LICENCES[name]} License")
