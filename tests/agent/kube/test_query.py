"""Fields of a query, as Go and the API server read them."""

from __future__ import annotations

import pytest

from arcbridge.agent.kube.query import is_true, query_values


@pytest.mark.parametrize(
    ("query", "values"),
    [
        ("a=1&a=2&b=3", ["1", "2"]),
        ("a", [""]),
        ("a=&xa=1&a%3D=2", [""]),
        ("%61=x+y%20z", ["x y z"]),
        ("a=1;a=2&a=%zz&a=3", ["3"]),
        ("a=b=c", ["b=c"]),
        ("A=1", []),
        ("a=%ff", ["\udcff"]),
        ("", []),
    ],
)
def test_values(query: str, values: list[str]) -> None:
    assert query_values(query, "a") == values


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # What `Convert_Slice_string_To_bool` of k8s.io/apimachinery makes of them.
        ([], False),
        (["true"], True),
        (["TRUE"], True),
        (["false"], False),
        (["FALSE"], False),
        (["fal\u017fe"], False),
        (["0"], False),
        (["1"], True),
        ([""], True),
        (["x"], True),
        (["00"], True),
        ([" false"], True),
        (["no"], True),
        (["off"], True),
        (["true", "false"], True),
        (["false", "true"], False),
    ],
)
def test_a30_true_is_whatever_is_not_false(values: list[str], expected: bool) -> None:
    assert is_true(values) is expected
