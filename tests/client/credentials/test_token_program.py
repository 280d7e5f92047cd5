"""Programs that print tokens: what comes back, and what an error never has."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from arcbridge.client.credentials import token_program
from arcbridge.errors import Unauthenticated


def program(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


async def test_the_output() -> None:
    assert await token_program.output_of("login.command", program("print('SECRET')")) == b"SECRET\n"


@pytest.mark.parametrize("code", ["print('x' * (256 * 1024 + 1))", "while True: print('x' * 4096)"])
async def test_an_output_beyond_the_bound_is_an_error_and_the_program_ends(code: str) -> None:
    with pytest.raises(Unauthenticated, match=r"login\.command: .* printed more than 256 KiB, which is no token"):
        await token_program.output_of("login.command", program(code))


@pytest.mark.parametrize(
    ("code", "match"),
    [("print('SECRET'); raise SystemExit(3)", "ended with code 3"), ("import time; time.sleep(60)", "no token within")],
)
async def test_an_error_names_the_setting_and_no_output(code: str, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "sleep" in code:
        monkeypatch.setattr(token_program, "DEADLINE", 0.3)
    with pytest.raises(Unauthenticated, match=match) as caught:
        await token_program.output_of("login.client_assertion_command", program(code))
    assert "login.client_assertion_command" in str(caught.value)
    assert "SECRET" not in str(caught.value)


async def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Unauthenticated, match="cannot run"):
        await token_program.output_of("login.command", (str(tmp_path / "missing"),))
