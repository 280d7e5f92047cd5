"""The pictures of the README: one drawing in two colour schemes, legible on each background, and described in words."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
BACKGROUNDS = {"light": "#ffffff", "dark": "#0d1117"}
"""Of the page around the picture, as GitHub has them."""
NARROW = 320
"""Pixels of the narrowest screen."""


def luminance(colour: str) -> float:
    """Relative luminance of a colour (WCAG 2.2)."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours (WCAG 2.2)."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", sorted(BACKGROUNDS))
def test_text_can_be_read(scheme: str) -> None:
    text = (IMAGES / f"overview-{scheme}.svg").read_text()
    root = ElementTree.fromstring(text)
    width = float(root.attrib["viewBox"].split()[2])
    groups = re.findall(r'<g fill="(#\w{6})" font-size="(\d+)"', text)
    boxes = re.findall(r'fill="(#\w{6})" stroke', text)
    assert len(groups) == len(boxes) == 2
    for colour, size in groups:
        assert int(size) * NARROW / width >= 10
        assert all(contrast(colour, behind) >= 4.5 for behind in (BACKGROUNDS[scheme], *boxes))


def test_the_readme_shows_the_one_that_fits() -> None:
    readme = (ROOT / "README.md").read_text()
    assert 'media="(prefers-color-scheme: dark)" srcset="docs/images/overview-dark.svg"' in readme
    assert re.search(r'<img src="docs/images/overview-light.svg" width="\d+" alt="[^"]{40,}"', readme)
    first_screen = readme.splitlines()[:20]
    assert any("overview-dark.svg" in line for line in first_screen)
    assert "make run" in first_screen
