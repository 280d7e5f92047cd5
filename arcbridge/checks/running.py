"""Asks the process that runs beside a `doctor` what its listener for machines tells: readiness and metrics.

It reads /readyz and /metrics of `observe.listen` over loopback, as a probe and a scraper do, and turns them into
findings. Nothing of it is secret, and nothing is changed. That no listener is configured, or that nothing answers, is a
finding, too.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from arcbridge.observe.untrusted_text import clean

from .diagnosis import Finding, failed, ok, skipped, warning

DEADLINE: Final = 5.0
"""Seconds for one page; metrics of several workers are gathered first."""
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
    host = host.strip("[]")
    if host in ("", "0.0.0.0", "::"):
        host = "localhost"
    if not port.isdigit():
        return None
    try:
        async with asyncio.timeout(DEADLINE):
            reader, writer = await asyncio.open_connection(host, int(port), limit=MAX_PAGE)
            try:
                writer.write(f"GET {path} HTTP/1.0\r\nHost: localhost\r\nAccept: text/plain\r\n\r\n".encode())
                data = await reader.read(MAX_PAGE)
                while chunk := await reader.read(MAX_PAGE):
                    data += chunk
                    if len(data) > MAX_PAGE:
                        return None
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return None
    head, _, body = data.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    if len(words) < 2 or not words[1].isdigit():
        return None
    return Page(int(words[1]), body.decode("utf-8", "replace"))


async def look_at_process(listen: str) -> list[Finding]:
    """Return whether the process runs and is ready, by its own word."""
    hop = "running process"
    if not listen or listen.endswith(":0"):
        return [skipped(hop, "observe.listen is not set, so the running process cannot be asked")]
    page = await read_page(listen, "/readyz?verbose")
    if page is None:
        return [
            failed(hop, f"nothing answers at {listen}", "start it; its log says why it ended or does not start",
                   "not_running")
        ]  # fmt: skip
    bad = [line.removeprefix("[-] ") for line in page.text.splitlines() if line.startswith("[-] ")]
    if page.status == 200 and not bad:
        return [ok(hop, "runs and is ready")]
    return [
        failed(hop, clean("; ".join(bad) or f"answered {page.status}", 400), "see the findings above, and its log",
               "not_ready")
    ]  # fmt: skip


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
    return found or [ok(hop, "none that settings could be the cause of")]


def samples_of(text: str) -> dict[str, float]:
    """Read the samples of a page in Prometheus' text format, by name with labels."""
    found = {}
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is not None:
            found[match[1]] = float(match[2])
    return found
