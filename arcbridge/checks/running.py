"""Asks the process that runs beside a `doctor` what its listener for machines tells: readiness and metrics.

It reads /readyz and /metrics of `observe.listen` over loopback, as a probe and a scraper do, and turns them into
findings. Nothing of it is secret, and nothing is changed. That no listener is configured, or that nothing answers, is a
finding, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

import aiohttp

from arcbridge.observe.untrusted_text import clean

from .diagnosis import Finding, failed, ok, skipped, warning

DEADLINE: Final = 5.0
"""Seconds for one page; metrics of several workers are gathered first."""
MOST_WITHOUT: Final = 0.9
"""Share of the accepted tokens without groups from which on that is told: some users may be in none."""
MAX_PAGE: Final = 4 * 1024 * 1024

_SAMPLE: Final = re.compile(r"([a-z0-9_]+(?:\{[^}]*\})?) ([0-9.eE+-]+|NaN)$")

_EXPLAINED: Final[Mapping[str, tuple[str, str, str]]] = {
    "token.iss": (
        "token_issuer",
        "come from an issuer that the authentication file does not have",
        "add the issuer to the authentication file, or have users log in at one that is there; the log has its name",
    ),
    "token.aud": (
        "token_audience",
        "are for another audience",
        "let the client ask for an audience of the authentication file; the log has both",
    ),
    "token.key": (
        "token_key",
        "are signed with a key that their issuer does not publish",
        "see whether the issuer's keys are those of this issuer",
    ),
    "token.nbf": (
        "token_clock",
        "are not valid yet, by this machine's clock",
        "compare the clocks of this machine and of the issuer (NTP)",
    ),
    "claims.rule": (
        "token_claim",
        "lack a claim that claimValidationRules require",
        "correct the rule in the authentication file, or what the issuer puts into tokens; the log names the claim",
    ),
    "claims.username": (
        "token_claim",
        "lack the claim that gives the user name",
        "correct claimMappings.username, or what the issuer puts into tokens; the log names the claim",
    ),
}
"""What operators can do about refused tokens, by rule: code, what is wrong with them, remedy."""


class Page(NamedTuple):
    """An answer of the listener."""

    status: int
    text: str


async def read_page(listen: str, path: str) -> Page | None:
    """Read one page of the listener `listen` (`host:port`, `:port`); None where nothing answers."""
    host, _, port = listen.rpartition(":")
    if host in ("", "0.0.0.0", "[::]", "::"):
        host = "localhost"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(DEADLINE)) as session,
            session.get(f"http://{host}:{port}{path}", headers={"Host": "localhost"}, allow_redirects=False) as answer,
        ):
            data = b""
            while len(data) <= MAX_PAGE and (chunk := await answer.content.readany()):
                data += chunk
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        return None
    return Page(answer.status, data.decode("utf-8", "replace")) if len(data) <= MAX_PAGE else None


async def look_at_process(listen: str) -> list[Finding]:
    """Return whether the process runs and is ready, by its own word."""
    hop = "running process"
    if not listen or listen.endswith(":0"):
        return [skipped(hop, "observe.listen is not set, so the running process cannot be asked")]
    page = await read_page(listen, "/readyz?verbose")
    if page is None:
        remedy = "start it; its log says why it ended or does not start"
        return [failed(hop, f"nothing answers at {listen}", remedy, "not_running")]
    bad = [line.removeprefix("[-] ") for line in page.text.splitlines() if line.startswith("[-] ")]
    if page.status == 200 and not bad:
        return [ok(hop, "runs and is ready")]
    detail = clean("; ".join(bad) or f"answered {page.status}", 400)
    return [failed(hop, detail, "see the findings above, and its log", "not_ready")]


async def look_at_refusals(prefix: str, listen: str, what: str) -> list[Finding]:
    """Look which tokens (`what`: as people call them) the running process has refused since its start, where an
    operator can do something about it."""
    hop = f"refused {what}"
    page = await read_page(listen, "/metrics") if listen else None
    if page is None or page.status != 200:
        return [skipped(hop, "the metrics of the running process cannot be read")]
    samples = samples_of(page.text)
    found: list[Finding] = []
    for rule, (code, words, remedy) in _EXPLAINED.items():
        count = samples.get(f'{prefix}token_refusals_total{{rule="{rule}"}}', 0.0)
        if count:
            found.append(warning(hop, f"{count:.0f} since its start {words} ({rule})", remedy, code))
    without = samples.get(f"{prefix}tokens_without_groups_total", 0.0)
    accepted = samples.get(f"{prefix}tokens_verified_total", samples.get(f'{prefix}tokens_total{{result="verified"}}'))
    if without and without >= MOST_WITHOUT * (accepted or 0.0):
        words = f"{without:.0f} of {accepted or without:.0f} that were accepted lack the claim that gives the groups"
        remedy = "correct claimMappings.groups, or what the issuer puts into tokens; the log names the claim"
        found.append(warning(f"groups in {what}", words, remedy, "token_groups"))
    return found or [ok(hop, "none that settings could be the cause of")]


def samples_of(text: str) -> dict[str, float]:
    """Read the samples of a page in Prometheus' text format, by name with labels."""
    matches = map(_SAMPLE.match, text.splitlines())
    return {match[1]: float(match[2]) for match in matches if match is not None}
