"""Named formats."""

from __future__ import annotations

import pytest

from arcbridge.identity.cel.formats import FORMATS, named, validate
from arcbridge.identity.cel.values import NONE, EvaluationError
from tests.identity.cel.calls import called

TABLE: list[tuple[str, list[str], list[str]]] = [
    ("dns1123Label", ["a", "a-1", "1"], ["", "A", "-a", "a-", "a.b", "a" * 64, "a\n"]),
    ("dns1123Subdomain", ["a.b", "a-b.c1"], ["a..b", ".a", "a.", "A.b", "a" * 254]),
    ("dns1035Label", ["a1"], ["1a", ""]), ("dns1123LabelPrefix", ["a-", "a"], ["-", "A-"]),
    ("dns1123SubdomainPrefix", ["a.b-"], ["a.-b."]), ("dns1035LabelPrefix", ["a-"], ["1-"]),
    ("qualifiedName", ["a", "a.b/c_D.e", "A"], ["", "/a", "a/", "a/b/c", "A.b/c/", "-a"]),
    ("labelValue", ["", "a", "A_b.c-d"], ["-a", "a b", "a" * 64]), ("uri", ["https://a", "/a"], ["a", ""]),
    ("uuid", ["123E4567-e89b-12d3-a456-426614174000", "123e4567e89b12d3a456426614174000"], ["123", ""]),
    ("byte", ["aGk=", "YWJj"], ["a===", "", "aGk", "aG k="]),
    ("date", ["2024-02-29"], ["2023-02-29", "2024-2-1", "20240201"]),
    ("datetime", ["2024-02-29T23:59:59Z", "2024-02-29t00:00:00.5+01:00"], ["2024-02-29", "2024-02-29T24:00:00Z"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "good", "bad"), TABLE, ids=[row[0] for row in TABLE])
def test_formats(name: str, good: list[str], bad: list[str]) -> None:
    assert all(validate(FORMATS[name], text) is NONE for text in good)
    for text in bad:
        assert validate(FORMATS[name], text).value == [f"does not have the format {FORMATS[name].name}"], text


def test_all_formats_are_tested() -> None:
    assert {row[0] for row in TABLE} == set(FORMATS)


def test_formats_by_name() -> None:
    assert named("uuid").value is FORMATS["uuid"]
    assert named("nope") is NONE
    for wrong in (("format.named", 1), ("validate", "uuid", "a"), ("validate", FORMATS["uuid"], 1)):
        with pytest.raises(EvaluationError):
            called(*wrong)
