"""Brackets in YAML are read as deep as anyone nests them, and no further."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from arcbridge.shallow_yaml import DEEPEST, ShallowScanner


class Loader(ShallowScanner, yaml.SafeLoader):
    pass


@pytest.mark.parametrize("pair", [("[", "]"), ("{a: ", "}")], ids=["lists", "mappings"])
def test_h30_the_scanner_stops_at_the_bracket_that_is_too_deep(pair: tuple[str, str]) -> None:
    begin, end = pair
    document: Any = yaml.load(begin * DEEPEST + end * DEEPEST, Loader)
    for _ in range(DEEPEST - 1):
        document = document[0] if begin == "[" else document["a"]
    loader = Loader(begin * 100_000)
    with pytest.raises(RecursionError):
        loader.get_single_data()
    assert loader.get_mark().index == DEEPEST * len(begin)
