"""The version moves in every place at once, and no tag releases what is not whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from arcbridge import __version__
from release import number

NOTES = "## 3.1.4 (2027-01-15)\n\n* New: a thing.\n\n### Client\n\n* Another.\n\n## 3.1.3 (2027-01-01)\n\n* Old.\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files that name the version, and a changelog, of 3.1.4."""
    for path in {path for path, _ in number.PLACES}:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(number.ROOT / path, tmp_path / path)
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{NOTES}")
    number.set_version("3.1.4", tmp_path)
    return tmp_path


def test_each_place_of_the_tree_is_of_one_version() -> None:
    found = {path: number._found(number.ROOT, path, pattern) for path, pattern in number.PLACES}
    assert found == dict.fromkeys(found, __version__)


def test_it_moves_everywhere_and_nothing_else_changes(tree: Path) -> None:
    assert number.version(tree) == "3.1.4"
    for path, pattern in number.PLACES:
        assert number._found(tree, path, pattern) == "3.1.4"
    number.set_version(__version__, tree)
    for path, _ in number.PLACES:
        assert (tree / path).read_bytes() == (number.ROOT / path).read_bytes(), path


@pytest.mark.parametrize("text", ["", "v1.2.3", "1.2", "1.2.3+x", "1.2.3; rm -rf /", "1.2.3\n"])
def test_what_is_no_version_is_refused(tree: Path, text: str) -> None:
    with pytest.raises(ValueError, match="is no version"):
        number.set_version(text, tree)
    assert number.version(tree) == "3.1.4"


def test_a_place_that_is_none_any_more_is_named(tree: Path) -> None:
    (tree / "Dockerfile").write_text("FROM scratch\n")
    with pytest.raises(ValueError, match="Dockerfile names no version"):
        number.set_version("4.0.0", tree)


def test_a_whole_tree_is_released_with_what_its_changelog_says(tree: Path) -> None:
    assert number.check("v3.1.4", tree) == "3.1.4"
    assert number.notes("3.1.4", tree) == "* New: a thing.\n\n### Client\n\n* Another.\n"


@pytest.mark.parametrize("tag", ["", "3.1.4", "v3.1.5", "v3.1.4-rc1", "main"])
def test_another_tag_releases_nothing(tree: Path, tag: str) -> None:
    with pytest.raises(ValueError, match=r"is not v3\.1\.4"):
        number.check(tag, tree)


@pytest.mark.parametrize(
    "heading", ["## 3.1.4 (unreleased)", "## 3.1.4", "## 3.1.40 (2027-01-15)", "## 3x1x4 (2027-01-15)"]
)
def test_without_a_dated_section_nothing_is_released(tree: Path, heading: str) -> None:
    (tree / "CHANGELOG.md").write_text(NOTES.replace("## 3.1.4 (2027-01-15)", heading))
    with pytest.raises(ValueError, match="CHANGELOG"):
        number.check("v3.1.4", tree)


def test_a_section_without_words_is_none(tree: Path) -> None:
    (tree / "CHANGELOG.md").write_text("## 3.1.4 (2027-01-15)\n\n## 3.1.3 (2027-01-01)\n\n* Old.\n")
    with pytest.raises(ValueError, match="CHANGELOG"):
        number.check("v3.1.4", tree)


def test_a_place_of_another_version_keeps_the_release_back(tree: Path) -> None:
    chart = tree / "config" / "helm" / "arcbridge-agent" / "Chart.yaml"
    chart.write_text(chart.read_text().replace("appVersion: 3.1.4", "appVersion: 3.1.3"))
    with pytest.raises(ValueError, match=r"Chart\.yaml says 3\.1\.3 .* make number VERSION=3\.1\.4"):
        number.check("v3.1.4", tree)
