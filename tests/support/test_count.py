"""The counter of lines."""

from __future__ import annotations

from pathlib import Path

from tests.support.count import lines


def test_blank_lines_comments_and_docstrings_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(
        '"""A."""\n\n# why\nx = """a\nb"""  # c\n\n\ndef f():\n    """D.\n\n    E."""\n    return (\n        x\n    )\n'
    )
    assert lines(tmp_path / "x.py") == 6
