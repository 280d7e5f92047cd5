"""What a request says about the audience of the token that it wants."""

from __future__ import annotations

from typing import Any

import pytest

from arcbridge.client.credentials import audience_parameters
from arcbridge.settings.config import LoginConfig


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({"cluster_audience_by": "resource"}, {"resource": "a"}),
        ({"cluster_audience_by": "audience"}, {"audience": "a"}),
        ({"cluster_audience_by": "exchange"}, {"audience": "a"}),
        ({"cluster_audience_by": "exchange", "cluster_scopes": ("{audience}",)}, {"scope": "a", "audience": "a"}),
        ({"cluster_audience_by": "scope"}, {"scope": "a"}),
        (
            {"cluster_audience_by": "scope", "cluster_scopes": ("openid", "{audience}/.default")},
            {"scope": "openid a/.default"},
        ),
    ],
)
def test_for_a_cluster(settings: dict[str, Any], form: dict[str, str]) -> None:
    assert audience_parameters.for_cluster(LoginConfig(**settings), "a") == form


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({}, {}),
        ({"audience": "relay"}, {}),
        ({"audience": "relay", "cluster_audience": "a"}, {"resource": "relay"}),
        ({"audience": "relay", "cluster_audience": "a", "cluster_audience_by": "exchange"}, {}),
        ({"audience": "relay", "cluster_audience": "a", "cluster_audience_by": "scope"}, {}),
        ({"relay_scopes": ("openid", "relay")}, {"scope": "openid relay"}),
    ],
)
def test_for_the_relay(settings: dict[str, Any], form: dict[str, str]) -> None:
    assert audience_parameters.for_relay(LoginConfig(**settings)) == form


@pytest.mark.parametrize(
    ("audience", "pattern", "found"),
    [
        ("arcbridge-prod", "arcbridge-{cluster}", True),
        ("arcbridge-", "arcbridge-{cluster}", False),
        ("arcbridge-A_b", "arcbridge-{cluster}", False),
        ("https://prod.example/prod", "https://{cluster}.example/{cluster}", True),
        ("https://prod.example/test", "https://{cluster}.example/{cluster}", False),
        ("payroll", "payroll", True),
        ("payroll", "", False),
    ],
)
def test_c3_whether_an_audience_is_a_clusters(audience: str, pattern: str, found: bool) -> None:
    assert audience_parameters.is_clusters(audience, pattern) == found


def test_b47_patterns_that_can_mean_one_audience() -> None:
    assert audience_parameters.overlap("arcbridge-{cluster}", "arcbridge-prod")
    assert audience_parameters.overlap("arcbridge-{cluster}", "arcbridge-{cluster}")
    assert not audience_parameters.overlap("a-{cluster}", "b-{cluster}")
