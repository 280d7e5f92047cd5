"""The token with which one application asks Microsoft Graph (client credentials, RFC 6749 §4.4).

One request at a time is at the token endpoint, for all look-ups together; it goes on where the look-up that began it
ends. A request that fails is not made again for the next user: until a delay with jitter is over, or the files of the
credential have changed, every user is refused, and the log says why it failed. This module asks Graph nothing.
Invariant: a secret, a key or an assertion is in no error.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import urlencode

from arcbridge.errors import ArcbridgeError, Unreachable
from arcbridge.identity.client_assertion import asserted, read_word, sign_assertion
from arcbridge.identity.fetch import Reply, SendRequest
from arcbridge.identity.refusal import GroupsUnavailable
from arcbridge.untrusted_json import read_json_object

if TYPE_CHECKING:
    from arcbridge.settings.config import GraphConfig

DEADLINE = 5.0
"""Seconds for one request: below the six of a look-up, so that its caller gets a reason that names the endpoint."""
FIRST_DELAY = 5.0
"""Seconds after the first failure, at least; as much again is drawn, then twice as much, up to `MOST_SPREAD`."""
MOST_SPREAD = 60.0
"""Seconds that are drawn at most: a credential that was mended is tried after these and `FIRST_DELAY` at the latest."""
MOST_ASKED_FOR = 120.0
"""Seconds that a `Retry-After` of the token endpoint counts at most."""
MARGIN = 300.0
"""Seconds before its end at which the token is renewed, at most half of its life."""
DEFAULT_LIFE = 600.0
"""Seconds, of a token whose answer does not say how long it lives."""
MOST_LIFE = 86400.0
"""Seconds that the `expires_in` of an answer counts at most."""
_TOKEN: Final = re.compile(r"[A-Za-z0-9\-._~+/]{1,32768}=*", re.ASCII)
"""RFC 6750 §2.1."""
_OAUTH_ERROR: Final = re.compile(r"[a-z_]{1,40}", re.ASCII)
_FILES: Final = ("certificate_file", "key_file", "client_secret_file", "federated_token_file")
TOLD_CALLER = "Microsoft Graph does not answer this end"
"""The reason that a caller gets where the operator's application or its credential is at fault."""


class Failure(NamedTuple):
    """Why there is no token, or no new one."""

    code: str
    """`graph_credential`: the application is refused, or its credential cannot be used; `graph_unreachable`: the token
    endpoint does not answer, or not as one; `graph_permission`: Graph refuses the application."""
    why: str


class GraphToken:
    """See the module's docstring. `at`: the table of the settings (`graph.NAME`); `clock`: unix seconds; `monotonic`:
    seconds; `draw` returns floats in [0, 1)."""

    def __init__(
        self,
        at: str,
        credential: GraphConfig,
        endpoint: str,
        scope: str,
        ca_pem: str | None,
        ask: SendRequest,
        *,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._at = at
        self._credential = credential
        self._endpoint = endpoint
        self._scope = scope
        self._ca_pem = ca_pem
        self._ask = ask
        self._clock = clock
        self._monotonic = monotonic
        self._draw = draw
        self._failures = 0
        """Failures in a row."""
        self._renewing: asyncio.Task[None] | None = None
        self._token = ""
        self._renew_at = self._ends_at = 0.0
        self._not_before = 0.0
        self._rejected = False
        """Whether Graph has refused a token and accepted none since."""
        self._tried: tuple[object, ...] = ()
        """The files of the credential as they were at the last request."""
        self.failure: Failure | None = None
        """Why the last request failed; None where it did not, and before the first."""
        self.on_failure: Callable[[], None] = lambda: None
        """Called when a request has failed."""
        self.granted = 0
        self.failed = 0
        """Requests to the token endpoint, or attempts at one, by what came of them."""

    @property
    def usable(self) -> bool:
        """Whether there is a token now."""
        return bool(self._token) and self._monotonic() < self._ends_at

    async def get(self, *, refused: str = "") -> str:
        """Return the token; a new one where Graph has just `refused` the one that is known. Raises GroupsUnavailable.

        A cancelled call leaves the request running for others.
        """
        if refused and refused == self._token:
            self._token = ""
        if not self.usable:
            await self._renew()
        elif self._monotonic() >= self._renew_at and self._may_ask():
            self._begin()  # the one that is known is good until the new one is there
        if not self.usable:
            raise GroupsUnavailable(TOLD_CALLER, detail=self._words(), asked=False)
        return self._token

    def reject(self, token: str, why: str) -> None:
        """Use `token`, which Graph refuses though it is new, no more, and ask for another one after a delay."""
        if token == self._token:
            self._token, self._rejected = "", True
            self._fail(Failure("graph_permission", why), None)

    def accepted(self) -> None:
        """Note that Graph accepts the token: delays begin anew."""
        if self._rejected:
            self._rejected = False
            self._failures = 0

    async def look(self) -> Failure | None:
        """See to it that there is a token, as often as the delays allow; return why there is none, or no new one."""
        if not self.usable:
            await self._renew()
        elif self._monotonic() >= self._renew_at and self._may_ask():
            await asyncio.wait([self._begin()])
        return self.failure

    async def close(self) -> None:
        """End what is under way."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])

    # -- inside -------------------------------------------------------------------------------------------------------

    def _may_ask(self) -> bool:
        return self._monotonic() >= self._not_before or self._tried != self._files()

    def _words(self) -> str:
        why = "there is no token for Microsoft Graph yet" if self.failure is None else self.failure.why
        left = self._not_before - self._monotonic()
        return f"{why}; it is asked for again in {left:.0f} s" if left >= 1 else why

    async def _renew(self) -> None:
        if (self._renewing is not None and not self._renewing.done()) or self._may_ask():
            await asyncio.shield(self._begin())

    def _begin(self) -> asyncio.Task[None]:
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.get_running_loop().create_task(self._request(), name="graph-token")
        return self._renewing

    async def _request(self) -> None:
        self._tried = self._files()
        try:
            form = self._form()
        except ArcbridgeError as error:
            words = f"the credential for Microsoft Graph cannot be used ({error.message})"
            return self._fail(Failure("graph_credential", words), None)
        form |= {"grant_type": "client_credentials", "scope": self._scope}
        headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
        where = f"{self._at}: the token endpoint for Microsoft Graph"
        try:
            async with asyncio.timeout(DEADLINE):
                reply = await self._ask(
                    "POST", self._endpoint, self._ca_pem, headers=headers, body=urlencode(form).encode()
                )
        except TimeoutError:
            return self._fail(Failure("graph_unreachable", f"{where} did not answer within {DEADLINE:.0f} s"), None)
        except Unreachable as error:
            return self._fail(Failure("graph_unreachable", f"{where} does not answer ({error.message})"), None)
        document = read_json_object(reply.body)
        token, life = document.get("access_token"), document.get("expires_in")
        if reply.status != 200 or not isinstance(token, str) or _TOKEN.fullmatch(token) is None:
            return self._fail(self._refusal(reply, document), reply.retry_after)
        lasts = DEFAULT_LIFE
        if isinstance(life, int | float) and not isinstance(life, bool) and life > 0:
            lasts = float(min(life, MOST_LIFE))
        now = self._monotonic()
        self._token, self._renew_at, self._ends_at = token, now + max(lasts - MARGIN, lasts / 2), now + lasts
        self._not_before, self.failure = 0.0, None
        self.granted += 1
        if not self._rejected:
            self._failures = 0
        return None

    def _refusal(self, reply: Reply, document: dict[str, Any]) -> Failure:
        word = document.get("error")
        said = f", {word}" if isinstance(word, str) and _OAUTH_ERROR.fullmatch(word) else ""
        # RFC 6749 §5.2 refuses with 400 or 401; anything else is no word about the credential.
        code = "graph_credential" if reply.status in (400, 401, 403) else "graph_unreachable"
        return Failure(
            code,
            f"the application {self._credential.client_id} of {self._at} gets no token for Microsoft Graph "
            f"(status {reply.status}{said})",
        )

    def _fail(self, failure: Failure, retry_after: float | None) -> None:
        self.failure = failure
        self.failed += 1
        least = min(max(retry_after or 0.0, FIRST_DELAY), MOST_ASKED_FOR)
        # Spread, so that the processes of all clusters do not come back in one instant.
        spread = self._draw() * min(FIRST_DELAY * 2.0 ** min(self._failures, 16), MOST_SPREAD)
        self._failures += 1
        self._not_before = self._monotonic() + least + spread
        self.on_failure()

    def _files(self) -> tuple[object, ...]:
        """Return what tells whether the files of the credential are the same as before."""
        found: list[object] = []
        for name in _FILES:
            path: Path | None = getattr(self._credential, name)
            try:
                stat = None if path is None else path.stat()
            except OSError:
                stat = None
            found.append(None if stat is None else (stat.st_mtime_ns, stat.st_size, stat.st_ino))
        return tuple(found)

    def _form(self) -> dict[str, str]:
        """Return the fields of a form that prove which application this is."""
        given, at = self._credential, self._at
        if given.certificate_file is not None and given.key_file is not None:
            signed = sign_assertion(
                given.client_id,
                self._endpoint,
                self._clock(),
                key=(given.key_file, f"{at}.key_file"),
                certificate=(given.certificate_file, f"{at}.certificate_file"),
            )
            return asserted(given.client_id, signed)
        if given.federated_token_file is not None:
            return asserted(given.client_id, read_word(given.federated_token_file, f"{at}.federated_token_file"))
        assert given.client_secret_file is not None
        secret = read_word(given.client_secret_file, f"{at}.client_secret_file")
        return {"client_id": given.client_id, "client_secret": secret}
