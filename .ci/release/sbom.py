"""The bill of materials: what an environment has installed, as CycloneDX 1.6 JSON.

cyclonedx-py reads names, versions, licences and dependencies from what is installed. It knows no hashes, because an
installed distribution does not say which file it came from; they are added here, and licences that are in a file alone.
Each component has exactly one hash and at least one licence. The bill covers Python distributions, not the interpreter
and not the system below it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

SPEC: Final = "1.6"
LICENCES: Final = {"aiofastnet": "MIT"}
"""SPDX identifiers of distributions whose metadata names no licence, as their licence files say."""


def describe(python: Path, pyproject: Path, artifacts: Mapping[str, str], *, epoch: int) -> str:
    """Return the bill of the environment of `python`, which was installed from `artifacts` (file name -> SHA-256).

    Raises `ValueError` for a distribution that came from none of these files, or whose licence is not known.
    """
    done = subprocess.run(
        [
            *(sys.executable, "-m", "cyclonedx_py", "environment", "--pyproject", pyproject),
            *("--output-reproducible", "--spec-version", SPEC, python),
        ],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch)},
    )
    return complete(json.loads(done.stdout), artifacts)


def complete(bill: dict[str, Any], artifacts: Mapping[str, str]) -> str:
    """Return the text of a bill with the product's version, and with each component's hash and licence."""
    by_distribution = {_distribution(name): digest for name, digest in artifacts.items()}
    product = bill["metadata"]["component"]
    # pyproject.toml leaves the version to the source, so that cyclonedx-py does not find it there.
    product["version"] = next(version for name, version in by_distribution if name == normal_name(product["name"]))
    for component in [product, *bill["components"]]:
        name = normal_name(component["name"])
        if (name, component["version"]) not in by_distribution:
            raise ValueError(f"{name} {component['version']} was installed from no file that was checked")
        if not component.get("licenses"):
            if name not in LICENCES:
                raise ValueError(
                    f"{name} names no licence: read its licence file, and add it to LICENCES in .ci/release/sbom.py"
                )
            component["licenses"] = [{"license": {"acknowledgement": "concluded", "id": LICENCES[name]}}]
        component["hashes"] = [{"alg": "SHA-256", "content": by_distribution[name, component["version"]]}]
    return json.dumps(bill, indent=2, sort_keys=True) + "\n"


def _distribution(file_name: str) -> tuple[str, str]:
    """Name and version of a wheel or a source archive."""
    stem = file_name.removesuffix(".tar.gz")
    if stem == file_name:
        name, version = file_name.split("-")[:2]
    else:
        name, _, version = stem.rpartition("-")
    return normal_name(name), version


def normal_name(name: str) -> str:
    """Return the name of a distribution as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()
