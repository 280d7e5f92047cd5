"""Lines of settings in TOML files."""

from __future__ import annotations

import tomllib

import pytest

from arcbridge.settings.toml_lines import line_of, parts, syntax_place

TEXT = """\
listen = "a"
[limits]
sessions = 1
[limits.users."anna@example.org"]
sessions = 2
observe.level = 1

[[allow]]  # one
users = ["a"]
[[allow]]
"groups" = ["b"]
[allow.more]
x = 1
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("listen", 1),
        ("limits", 2),
        ("limits.sessions", 3),
        ('limits.users."anna@example.org".sessions', 5),
        ('limits.users."anna@example.org".observe.level', 6),
        ("limits.agents", 2),
        ("allow", 8),
        ("allow[0].users", 9),
        ("allow[0].users[3]", 9),
        ("allow[1]", 10),
        ("allow[1].groups", 11),
        ("allow[1].more.x", 13),
        ("allow[1].clusters", 10),
        ("nothing", 0),
        ("", 0),
    ],
)
def test_line_of(path: str, line: int) -> None:
    tomllib.loads(TEXT)
    assert line_of(parts(path), TEXT) == line


@pytest.mark.parametrize(("text", "line"), [("a = 1\nb = \n", 2), ("a = 1\nb = '''x\n", 3), ("[[a]", 1)])
def test_the_place_of_a_mistake_of_syntax(text: str, line: int) -> None:
    with pytest.raises(tomllib.TOMLDecodeError) as caught:
        tomllib.loads(text)
    said, found, _ = syntax_place(str(caught.value), text)
    assert found == line
    assert said
    assert "(at " not in said


def test_other_words_have_no_place() -> None:
    assert syntax_place("something else", "") == ("something else", 0, 0)
