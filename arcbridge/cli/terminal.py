"""Connects the client's sub-commands with the terminal: lines for the user, questions, the log.

It decides nothing: what is told and asked comes from `arcbridge.client`. Invariant: one question is open at a time, and
the log is silent meanwhile.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from arcbridge.cli.output import plain, print_note
from arcbridge.cli.screen import Screen, Waiting, over_waiting, prose
from arcbridge.errors import ArcbridgeError, PermissionRefused
from arcbridge.settings.config import ClientConfig
from arcbridge.settings.suggest import nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from arcbridge.client.service import Terminal
    from arcbridge.client.state import StateDirectory


def configure_logging(config: ClientConfig, default_level: str = "") -> None:
    """Set logging up by the settings; `default_level` takes the place of `info`, which is their default, for a command
    that ends: what it logs stands between lines for people, so that it is one of them, without a date and on a pipe,
    too, unless the settings ask for a log: by its form, or with `debug`."""
    from arcbridge.observe import logging

    level, form = config.observe.log_level, config.observe.log_format
    if default_level:
        level = default_level if level == "info" else level
        form = "console" if form == "auto" else form
    dated = not default_level or config.observe.log_format != "auto" or level == "debug"
    logging.configure("client", level, form, dated=dated)


def terminal(lines: TextIO) -> Terminal:
    """Return what commands write to and ask: `lines`, and the terminal where there is one."""
    from arcbridge.client.service import Terminal

    def tell(line: str) -> None:
        lines.write(over_waiting(prose(plain(line), Screen.of(lines), "  "), lines))
        # Tools wait for these lines on a pipe.
        lines.flush()

    return Terminal(
        tell=tell,
        write_data=write_data,
        ask_trust=ask_trust if may_ask() else None,
        may_log_in=sys.stderr.isatty(),
        waiting=lambda text, limit: Waiting(sys.stderr, text, limit),
        open_browser=open_browser,
    )


def repair_contexts(state_dir: Path | None) -> None:
    """Let no context of ours name the port of a process that was killed, and print which ones did."""
    from arcbridge.client.state import StateDirectory

    if StateDirectory.find(state_dir, os.environ).kubeconfigs():
        from arcbridge.client.kubeconfig import running

        for sentence in running.repair_contexts(state_dir, os.environ):
            print_note(plain(sentence))


def cluster_meant(error: ArcbridgeError, names: Sequence[str], state: StateDirectory) -> str:
    """Return a further line for an error: which cluster was probably meant, by the names that are kept here."""
    if error.status_code != PermissionRefused.status_code or not names:
        return ""
    known = state.cluster_names()
    near = next((one for name in names if name not in known and (one := nearest(name, known))), "")
    meant = f"did you mean {near}? " if near else ""
    return f"\n{meant}`arcbridge clusters` lists the clusters that you may reach"


def write_data(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def may_ask() -> bool:
    """Return whether there is a terminal for a question (standard error) and its answer (standard input)."""
    return sys.stdin.isatty() and sys.stderr.isatty()


async def ask_trust(cluster: str, pin: str) -> bool:
    return await ask_yes(
        f"Cluster {plain(cluster)!r} is not known here. The pin of its CA is\n  {pin}\n"
        "Compare it with the one its owner gave you. Trust it from now on? [y/N] "
    )


async def ask_yes(question: str) -> bool:
    """Ask at the terminal, one question at a time, and return whether the answer was yes; the loop goes on meanwhile,
    Ctrl-C works, and the log waits."""
    import asyncio

    from arcbridge.observe import logging

    loop = asyncio.get_running_loop()

    def readable() -> None:
        if not answer.done():
            answer.set_result(sys.stdin.readline())

    async with _questions.setdefault(loop, asyncio.Lock()):
        with logging.paused():
            _forget_typed()
            sys.stderr.write(question)
            sys.stderr.flush()
            if sys.platform == "win32":
                # A console cannot be waited for there; Ctrl-C ends the process all the same.
                return (await asyncio.to_thread(sys.stdin.readline)).strip().lower() in ("y", "yes")
            answer: asyncio.Future[str] = loop.create_future()
            blocking = os.get_blocking(sys.stdin.fileno())
            loop.add_reader(sys.stdin, readable)
            try:
                if not (typed := await answer):  # Ctrl-D: no answer, and no end of the line
                    sys.stderr.write("\n")
                return typed.strip().lower() in ("y", "yes")
            finally:
                loop.remove_reader(sys.stdin)
                # uvloop changes it for all that have this terminal: our own output, the shell, and what that starts.
                os.set_blocking(sys.stdin.fileno(), blocking)


def _forget_typed() -> None:
    """Drop what was typed before the question was there to be read: it is no answer to it."""
    if sys.platform != "win32" and sys.stdin.isatty():
        import termios

        termios.tcflush(sys.stdin, termios.TCIFLUSH)


async def open_browser(url: str) -> bool:
    import asyncio

    return await asyncio.to_thread(_open_beside_output, url)


def _open_beside_output(url: str) -> bool:
    """Open a browser whose output is this process's standard error: standard output may be a credential, of which
    kubectl reads the browser's lines too, and waits until the browser has closed it."""
    import webbrowser

    if sys.__stdout__ is None or sys.__stderr__ is None:  # closed at the start, and the number is another file's by now
        return webbrowser.open(url)
    output = os.dup(1)
    try:
        os.dup2(2, 1)
        return webbrowser.open(url)
    finally:
        os.dup2(output, 1)
        os.close(output)


_questions: dict[object, Any] = {}
"""The lock of each loop under which the user is asked: clusters that are met at once are asked about in turn."""
