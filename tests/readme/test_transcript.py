"""What is masked in a transcript, and how its commands are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.readme.transcript import commands, masked

HERE = Path("/home/alice/here")


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("Proxy is listening on port 47011", "Proxy is listening on port PORT"),
        (f"pin sha256:{'0f' * 32} of it", "pin sha256:… of it"),
        ("berlin   Connected   2026-11-26T03:10:24Z   0.1.0", "berlin  Connected  TIME  0.1.0"),
        ("till   1/1     Running   0          114s", "till  1/1  Running  0  AGE"),
        ("Logged in as alice, until 2026-11-26 04:30", "Logged in as alice, until TIME"),
        ("open https://127.0.0.1:8444/device and enter WKMD-MTPP", "open https://ADDRESS/device and enter CODE"),
        ("kubeconfig at /home/alice/here/.kube/config", "kubeconfig at ~/.kube/config"),
        ("\x1b[1mbold\x1b[0m", "bold"),
        ("sessions 12 of 200", "sessions 12 of 200"),
    ],
)
def test_what_differs_from_run_to_run_is_masked(line: str, shown: str) -> None:
    assert masked(line, HERE) == shown


def test_commands_and_what_they_print_are_told_apart() -> None:
    text = "$ cat > a <<END\n> one\n> END\n$ cat a\none\n$ true"
    assert commands(text) == [["$ cat > a <<END", "> one", "> END"], ["$ cat a"], ["$ true"]]
