"""The recording of the first ten minutes: what docs/transcript.md shows, and its pictures show its last frame."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from tests.readme.recording import ASCIICAST, COLUMNS, PICTURES, ROOT, SCHEMES, output_of, picture_of
from tests.readme.test_images import contrast
from tests.readme.transcript import is_output, masked, recorded, unnamed

HELD = ASCIICAST.read_text(encoding="utf-8")
ANEW = "run tests/release/test_newcomer.py with ARCBRIDGE_TRANSCRIPT=write"


def test_it_shows_what_the_transcript_shows() -> None:
    lines = [unnamed(masked(line.removesuffix("\r"), ROOT)) for line in output_of(HELD).split("\n")]
    lines = [line for line in lines if is_output(line) and not line.startswith("# ")]
    assert lines == recorded(ROOT / "docs" / "transcript.md"), ANEW


def test_nothing_of_the_machine_that_recorded_it_is_in_it() -> None:
    assert "/tmp" not in HELD
    assert "/home/" not in HELD
    assert "pytest" not in HELD


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_the_pictures_are_its_last_frame(scheme: str) -> None:
    picture = PICTURES[scheme].read_text(encoding="utf-8")
    assert picture == picture_of(HELD, scheme), ANEW
    colours = {text.attrib["fill"] for text in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")}
    assert colours <= set(SCHEMES[scheme].values())
    for name in set(SCHEMES[scheme]) - {"background", "border"}:
        assert contrast(SCHEMES[scheme][name], SCHEMES[scheme]["background"]) >= 4.5


def test_the_readme_shows_it_in_both_schemes_and_says_how_to_play_it() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert 'media="(prefers-color-scheme: dark)" srcset="docs/images/first-ten-minutes-dark.svg"' in readme
    assert '<img src="docs/images/first-ten-minutes-light.svg"' in readme
    assert str(ASCIICAST.relative_to(ROOT)) in readme
    assert COLUMNS == 80
