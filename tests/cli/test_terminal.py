"""How commands talk to their user; questions at a real terminal are tests/cli/test_login.py's and test_client.py's."""

import asyncio
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from arcbridge.cli import terminal as module
from arcbridge.cli.loop import loop_factory
from arcbridge.client.background.caller import answer_of
from arcbridge.client.background.process import _error
from arcbridge.client.state import StateDirectory
from arcbridge.errors import ArcbridgeError, PermissionRefused, Unauthenticated
from arcbridge.settings.config import ClientConfig, ObserveConfig


def test_without_a_terminal_no_question_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = io.StringIO()
    monkeypatch.setattr(module.sys, "stdin", io.StringIO())
    found = module.terminal(lines)
    assert found.ask_trust is None
    found.tell("Proxy is listening on port 47011")
    assert lines.getvalue() == "Proxy is listening on port 47011\n"


def test_a_document_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    module.terminal(io.StringIO()).write_data("apiVersion: v1\n")
    assert capsys.readouterr().out == "apiVersion: v1\n"


@pytest.mark.parametrize(
    ("default", "set_to", "given", "level", "form", "dated"),
    [
        ("", "info", "auto", "info", "auto", True),
        ("warning", "info", "auto", "warning", "console", False),
        ("warning", "error", "auto", "error", "console", False),
        ("warning", "debug", "auto", "debug", "console", True),
        ("warning", "info", "console", "warning", "console", True),
        ("warning", "info", "json", "warning", "json", True),
    ],
)
def test_commands_that_answer_log_less_and_for_people(
    monkeypatch: pytest.MonkeyPatch, default: str, set_to: str, given: str, level: str, form: str, dated: bool
) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr("arcbridge.observe.logging.configure", lambda *words, dated: asked.append((*words, dated)))
    module.configure_logging(ClientConfig(observe=ObserveConfig(log_level=set_to, log_format=given)), default)
    assert asked == [("client", level, form, dated)]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
async def test_b48_what_was_typed_before_the_question_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import pty

    main, other = pty.openpty()

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            os.write(main, b"n\n")
            return super().write(text)

    with os.fdopen(other, encoding="ascii") as keyboard:
        monkeypatch.setattr(module.sys, "stdin", keyboard)
        monkeypatch.setattr(module.sys, "stderr", Screen())
        os.write(main, b"y\n")
        assert not await module.ask_yes("Trust it? [y/N] ")
    os.close(main)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_a_question_leaves_the_terminal_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell's `read` behind it, and a long output of our own, fail at a terminal that does not block."""
    import pty

    main, other = pty.openpty()

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            os.write(main, b"y\n")
            return super().write(text)

    with os.fdopen(other, encoding="ascii") as keyboard, asyncio.Runner(loop_factory=loop_factory()) as runner:
        monkeypatch.setattr(module.sys, "stdin", keyboard)
        monkeypatch.setattr(module.sys, "stderr", Screen())
        assert runner.run(module.ask_yes("Trust it? [y/N] "))
        assert os.get_blocking(other)
    os.close(main)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes that can be waited for")
async def test_an_end_of_input_ends_the_line_of_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(writer)
    with os.fdopen(reader, encoding="ascii") as keyboard:
        monkeypatch.setattr(module.sys, "stdin", keyboard)
        monkeypatch.setattr(module.sys, "stderr", screen := io.StringIO())
        assert not await module.ask_yes("Trust it? [y/N] ")
    assert screen.getvalue() == "Trust it? [y/N] \n"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("berlin-factry", "did you mean berlin-factory? `arcbridge clusters` lists"),
        ("berlin-factory", "`arcbridge clusters` lists"),
        ("prague", "`arcbridge clusters` lists"),
    ],
)
def test_a_mistyped_cluster_is_told_the_nearest_one_that_is_known_here(name: str, said: str, tmp_path: Path) -> None:
    """Without the network: by the names that the relay listed last; and also where the background process refuses."""
    state = StateDirectory(tmp_path, tmp_path / "cache")
    state.keep_cluster_names(["berlin-factory", "munich"])
    for error in (PermissionRefused("no"), refused_by_the_process(PermissionRefused("no"))):
        assert module.cluster_meant(error, [name], state).startswith(f"\n{said}")
    for other in (Unauthenticated("no"), refused_by_the_process(Unauthenticated("no"))):
        assert module.cluster_meant(other, [name], state) == ""


def refused_by_the_process(error: ArcbridgeError) -> ArcbridgeError:
    with pytest.raises(ArcbridgeError) as caught:
        answer_of(_error(error))
    return caught.value


@pytest.mark.skipif(os.name == "nt", reason="browsers are started in another way there")
def test_what_a_browser_prints_is_not_on_standard_output(tmp_path: Path) -> None:
    """kubectl reads its credential there, and waits for each program that has it open."""
    browser = tmp_path / "browser"
    browser.write_text("#!/bin/sh\necho Opening in existing browser session.\n")
    browser.chmod(0o700)
    code = (
        "import asyncio\nfrom arcbridge.cli.terminal import open_browser\n"
        "asyncio.run(open_browser('https://login.example.org'))\nprint('the credential')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "BROWSER": f"{browser} %s &"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("the credential\n", "Opening in existing browser session.\n")


@pytest.mark.skipif(os.name == "nt", reason="browsers are started in another way there")
def test_where_standard_output_is_closed_its_number_is_left_to_what_has_it(tmp_path: Path) -> None:
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f"#!/bin/sh\n: >{opened}\n")
    browser.chmod(0o700)
    code = (
        "import asyncio, os\nfrom arcbridge.cli.terminal import open_browser\n"
        "taken = os.open(os.devnull, os.O_RDONLY)\nassert taken == 1\n"
        "before = os.fstat(1).st_ino\nreplaced = []\nos.dup2 = lambda *numbers: replaced.append(numbers)\n"
        "asyncio.run(open_browser('https://login.example.org'))\n"
        "assert not replaced and os.fstat(1).st_ino == before\n"
    )
    command = ["/bin/sh", "-c", 'exec "$0" "$@" >&-', sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**os.environ, "BROWSER": str(browser)}, stderr=subprocess.PIPE, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert opened.exists()
