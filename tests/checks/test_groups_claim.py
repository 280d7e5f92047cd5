"""What is logged of tokens without the claim of the groups, and how often."""

from __future__ import annotations

import structlog

from arcbridge.checks.groups_claim import INTERVAL, missing_groups_logger


def test_one_line_a_minute_for_each_issuer() -> None:
    now = 100.0
    anna = ("anna", "roles", "https://issuer")
    with structlog.testing.capture_logs() as lines:
        report = missing_groups_logger(structlog.get_logger(), clock=lambda: now)
        for _ in range(10_000):
            report(*anna, False)
        report(*anna, True)
        now += INTERVAL
        report(*anna, False)
    assert [(line["log_level"], line["tokens"]) for line in lines] == [("warning", 1), ("info", 1), ("warning", 10_000)]
    assert (lines[0]["claim"], lines[0]["user"], lines[0]["issuer"]) == ("roles", "anna", "https://issuer")
    assert "claimMappings.groups" in lines[0]["reason"]
