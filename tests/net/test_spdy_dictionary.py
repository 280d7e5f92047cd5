"""The dictionary of SPDY/3, by the checksum that stands in each stream which was compressed with it."""

from __future__ import annotations

import zlib

from arcbridge.net.spdy_dictionary import DICTIONARY


def test_the_dictionary_is_that_of_the_draft() -> None:
    assert zlib.adler32(DICTIONARY) == 0xE3C6A7C2
    assert len(DICTIONARY) == 1423
