"""Readiness checks: a reason, or nothing."""

from __future__ import annotations

import pytest

from arcbridge.observe.health import Checks


def test_reasons_are_told_in_order_and_recover() -> None:
    state: dict[str, str | None] = {"reason": "no join has worked for 60 s"}
    checks = Checks()
    checks.add("join", lambda: state["reason"])
    checks.add("keys", lambda: None)
    with pytest.raises(ValueError, match="twice"):
        checks.add("keys", lambda: None)
    assert [tuple(result) for result in checks.run()] == [("join", "no join has worked for 60 s"), ("keys", None)]
    state["reason"] = None
    assert checks.failures() == {}


def test_a_check_that_raises_has_failed_without_its_text() -> None:
    def broken() -> str | None:
        raise RuntimeError("secret")

    checks = Checks()
    checks.add("broken", broken)
    assert checks.failures() == {"broken": "the check itself failed (RuntimeError)"}


def test_reasons_are_cleaned() -> None:
    checks = Checks()
    checks.add("a", lambda: "x\n[+] fake: ok\x1b[0m")
    checks.add("b", lambda: "")
    assert checks.failures() == {"a": "x\\n[+] fake: ok\\x1b[0m", "b": "no reason given"}
