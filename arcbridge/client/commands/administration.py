"""Gives a relay an administrator's command over HTTPS, by the user's own login.

A command goes to one relay: to the next one only where the first was not reached, or is of a version that knows no
commands, because a command that has left may have been done. Invariants: the access token is sent only after the
relay's certificate is verified; a name that is returned can be one of a cluster; the shell lines beside a new join
token are made here, of parts that were checked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from arcbridge.client.commands.directory import check_names, read_answer
from arcbridge.client.credentials.tokens import Tokens
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.relay.relays import Relays, RelaysFailed, concerns_all
from arcbridge.client.session.relay_http import request
from arcbridge.errors import ArcbridgeError, ConfigError, OverLimit, PermissionRefused, StateError, Unreachable
from arcbridge.net.address import parse_address
from arcbridge.observe.untrusted_text import clean
from arcbridge.pki.enrolment import JoinToken
from arcbridge.pki.names import check_cluster_name
from arcbridge.pki.new_token import NewToken
from arcbridge.pki.pins import check_pin

PATH: Final = "/v1/admin"
MOST_WORDS: Final = 500
"""Bytes of a relay's sentence that are shown: an administrator has to read why a command was not done."""
_KINDS: Final[dict[int, type[ArcbridgeError]]] = {
    400: ConfigError, 403: PermissionRefused, 409: StateError, 429: OverLimit, 503: Unreachable
}  # fmt: skip

Row = dict[str, Any]


class OlderRelay(Unreachable):
    """The relay is of a version without administration over HTTPS: it has done nothing."""


class Answered(NamedTuple):
    """What a relay answers to a command."""

    rows: list[Row]
    more: bool
    """Whether there are more rows than the relay has sent."""


async def administer(relays: Relays, tokens: Tokens, command: str, given: Mapping[str, str]) -> Answered:
    """Give the command to the first relay that is reached (then `relays.in_use`). Raises as the relay refuses, or
    Unreachable, which names the relay, and whether the command may have been done."""
    document = json.dumps({"command": command, **given}).encode()

    async def once() -> Answered:
        token = await tokens.access()
        failures: list[tuple[RelayAccess, ArcbridgeError]] = []
        for relay in relays.order():
            left = asyncio.Event()
            try:
                status, body = await request(relay, token, tokens, PATH, document, left.set)
            except ArcbridgeError as error:
                if concerns_all(error):
                    raise
                if left.is_set():
                    raise Unreachable(
                        f"{error.message}; the command had left, and may have been done: look with a list"
                    ) from error
                relays.failed(relay)
                failures.append((relay, error))
                continue
            try:
                answered = _read(relay, status, body)
            except OlderRelay as error:
                failures.append((relay, error))
                continue
            finally:
                relays.works(relay)
            return answered
        failed = RelaysFailed(failures).summed_up(lambda error: isinstance(error, OlderRelay))
        raise failed from failed.__cause__

    return await tokens.retry_once(once)


def new_token(row: Row, cluster: str, kubernetes: list[str]) -> NewToken:
    """Return the join token of an answer, with the command for its agent; `kubernetes` as in `NewToken.of`. Raises
    Unreachable where a part is not what it has to be: it goes to a shell."""
    try:
        if row["cluster"] != cluster:
            raise ValueError
        return NewToken.of(
            JoinToken.parse(str(row["token"])).text,
            cluster=check_cluster_name(cluster),
            uses=int(row["uses"]),
            expires_at=float(row["expires_at"]),
            relay=parse_address(str(row["relay"])).url,
            pin=check_pin(str(row["relay_ca_pin"])) if row["relay_ca_pin"] else "",
            kubernetes=kubernetes,
        )
    except (KeyError, TypeError, ValueError, OverflowError, ArcbridgeError):
        raise Unreachable("the relay made a join token and sent no such thing; tell its operator") from None


def _read(relay: RelayAccess, status: int, body: bytes) -> Answered:
    url = relay.address.url
    document = read_answer(url, body)
    if not isinstance(document, dict):
        document = {}
    if status == 200:
        rows = document.get("rows")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise Unreachable(f"{url} did not answer with rows: is this an arcbridge relay?")
        check_names(url, (row[key] for row in rows for key in ("cluster", "name") if key in row))
        return Answered(rows, document.get("more") is True)
    if status == 404:
        raise OlderRelay(f"the relay {url} knows no administration over HTTPS: its version is an earlier one")
    refusal = document.get("error")
    words = clean(str(refusal.get("message", "")), MOST_WORDS) if isinstance(refusal, dict) else ""
    if status in _KINDS and words:
        raise _KINDS[status](f"the relay {url} refuses: {words}")
    raise Unreachable(f"the relay {url} answered with status {status}; its log says why")
