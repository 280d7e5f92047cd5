"""`login`, `logout` and `whoami`: what each prints, where to, and its exit code."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from arcbridge.cli.commands import DOCUMENTS
from arcbridge.cli.output import plain, print_document, print_prose, print_rows, print_warning, rfc3339
from arcbridge.cli.parser import Invocation
from arcbridge.cli.screen import Column
from arcbridge.cli.settings import given_settings, load_settings
from arcbridge.errors import ConfigError, ExitCode, StateError, Unauthenticated
from arcbridge.settings.config import ClientConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from arcbridge.client.credentials.identity_summary import IdentitySummary


def _settings(invocation: Invocation) -> ClientConfig:
    """Return the settings, after contexts that a killed process left were put right."""
    from arcbridge.cli.terminal import repair_contexts

    config: ClientConfig = load_settings(invocation, os.environ)
    repair_contexts(config.state_dir)
    return config


# --- login ----------------------------------------------------------------------------------------------------------


def login(invocation: Invocation) -> int:
    """Log in, and print as whom."""
    config = _settings(invocation)
    given = given_settings(invocation, os.environ)
    named = {path.removeprefix("login.") for path in given if path.startswith("login.")}
    from arcbridge.cli.loop import run_until_signal

    return run_until_signal(_log_in(config, invocation, named))


async def _log_in(config: ClientConfig, invocation: Invocation, named: set[str]) -> int:
    from arcbridge.cli.terminal import ask_yes, configure_logging, terminal
    from arcbridge.client.commands.sign_in import log_in

    configure_logging(config, default_level="warning")
    shown = terminal(sys.stderr)
    ask = ask_yes if shown.ask_trust is not None else None
    found = await log_in(
        config,
        invocation.texts("relay_url"),
        shown,
        ask=ask,
        renew=invocation.switch("renew_trust"),
        named=named,
        environment=os.environ,
        force=invocation.switch("force"),
        wait=_wait(invocation.text("wait")),
    )
    until = time.strftime(", until %Y-%m-%d %H:%M", time.localtime(found.until)) if found.until else ""
    as_whom = f" as {plain(found.user)}" if found.user else ""
    if found.already:
        where = f" at {plain(found.relay)}" if found.relay else ""
        print_prose(f"You are logged in{where}{as_whom}{until}. `arcbridge login --force` logs in anew.")
    else:
        print_prose(f"Logged in{as_whom}{until}")
    return ExitCode.DONE


def _wait(text: str) -> float:
    """Return the seconds of `--wait`; 0: it was not given. Raises ConfigError."""
    from arcbridge.settings.config_loader import parse_duration

    if not text:
        return 0.0
    try:
        return max(parse_duration(text), 1.0)
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"flag --wait: {text[:20]!r} is no duration; write 60s or 10m") from error


# --- logout ---------------------------------------------------------------------------------------------------------


def logout(invocation: Invocation) -> int:
    """Forget the kept tokens, here and at the issuer."""
    from arcbridge.cli.loop import run_until_signal

    return run_until_signal(_log_out(_settings(invocation)))


async def _log_out(config: ClientConfig) -> int:
    from arcbridge.cli.terminal import configure_logging
    from arcbridge.client.commands.sign_in import log_out

    configure_logging(config, default_level="warning")
    if not config.login.issuer:
        raise ConfigError(
            "login.issuer: no OIDC login is configured and no relay was logged in at, so there is nothing to forget"
        )
    from arcbridge.client.credentials.identity_summary import in_words, login_meant, other_logins
    from arcbridge.client.state import StateDirectory

    state = StateDirectory.find(config.state_dir, os.environ)
    mine: list[IdentitySummary] = []
    with contextlib.suppress(StateError):  # what is damaged is forgotten all the same
        mine = login_meant(config, state)
    forgotten, warning = await log_out(config, os.environ)
    others = other_logins(config, state, print_warning)
    if warning:
        print_warning(warning)
    named = in_words(mine) or ", ".join(config.relay_urls()[:1])
    where = f" at {plain(named)}" if named else ""
    still = f" Still logged in at {plain(in_words(others))}; `arcbridge logout --relay URL` ends one." if others else ""
    print_prose(f"Logged out{where}.{still}" if forgotten else f"There was no login{where} to forget.{still}")
    return ExitCode.DONE


# --- whoami ---------------------------------------------------------------------------------------------------------


def whoami(invocation: Invocation) -> int:
    """Print who is logged in, until when, and where; changes nothing."""
    config: ClientConfig = load_settings(invocation, os.environ)
    from arcbridge.client.credentials.identity_summary import in_words, other_logins, summary_of
    from arcbridge.client.state import StateDirectory

    state = StateDirectory.find(config.state_dir, os.environ)
    others = other_logins(config, state, print_warning)
    try:
        found = summary_of(config, state)
    except Unauthenticated as error:
        if others:
            raise Unauthenticated(f"{error.message}\nlogged in at {in_words(others)}") from error
        raise
    checked = ""
    if invocation.switch("check"):
        from arcbridge.cli.loop import run_until_signal

        run_until_signal(_check(config))
        checked = f"{found.relay} takes the login"
    output = invocation.text("output", "table")
    if output in DOCUMENTS:
        print_document(_as_document(found, checked, others), output)
    elif output == "name":
        print(plain(found.user or found.subject))
    else:
        rows = [{"name": name, "value": value} for name, value in _as_rows(found, checked, in_words(others)) if value]
        print_rows(rows, (Column("name"), Column("value", words=True)), output)
    return ExitCode.DONE


async def _check(config: ClientConfig) -> None:
    """Ask the relay; raises what it says of the login."""
    from arcbridge.cli.terminal import configure_logging, terminal
    from arcbridge.client.commands.directory import list_clusters
    from arcbridge.client.service import ClientContext

    configure_logging(config, default_level="warning")
    context = ClientContext(config, terminal(sys.stderr))
    context.tokens.interactive = False
    await list_clusters(context.relays, context.tokens)


def _as_document(found: IdentitySummary, checked: str, others: Sequence[IdentitySummary]) -> dict[str, Any]:
    document = {name: value if isinstance(value, bool) else value or None for name, value in asdict(found).items()}
    document |= {"expires": rfc3339(found.expires), "groups": list(found.groups)}
    document["others"] = [{"relay": one.relay, "user": one.user or None} for one in others]
    return {**document, **({"checked": True} if checked else {})}


def _as_rows(found: IdentitySummary, checked: str, others: str) -> list[tuple[str, str]]:
    until = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.expires)) if found.expires else ""
    renewed = "renewed by itself" if found.renews else "then log in again" if found.source == "login" else ""
    return [
        ("user", found.user),
        ("issuer", found.issuer),
        ("groups", ", ".join(found.groups)),
        ("relay", found.relay),
        ("also logged in", others and f"{others} (--relay URL)"),
        ("until", ", ".join(filter(None, (until, renewed)))),
        ("key", found.key or ("none: a copy of the token is as good as the token" if found.user else "")),
        ("tokens", "" if found.source == "login" else f"from {found.source}"),
        ("checked", checked),
    ]
