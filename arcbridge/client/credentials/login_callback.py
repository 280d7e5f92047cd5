"""The listener on loopback to which the browser comes back from a login in the browser (RFC 8252 §7.3).

It takes one valid answer to one login, hands its code to that login alone, and answers no other user of
the machine: the command line of the browser, which all users can read, holds `state` (docs/threats.md#W12). It opens no
port and sends no code anywhere; `client.credentials.login` does. Invariant: an answer with another `state`, or of
another issuer, gives no code. Which issuer an answer is of `iss` says (RFC 9207); where an issuer does not announce
that it sends it, the path of the redirect URI does (RFC 9700 §4.4.2), because the other issuer knows another one: a
hostile issuer can hand the whole request of a login on to another issuer's page (docs/threats.md#B32).
"""

from __future__ import annotations

import asyncio
import hmac
from urllib.parse import parse_qs, quote, urlsplit

import structlog

from arcbridge.client.credentials.client_authentication import IssuerEndpoints
from arcbridge.client.credentials.issuer import IssuerError
from arcbridge.errors import ConfigError
from arcbridge.net.peer_user import PeerUser, peer_user

HEAD_LIMIT = 16 * 1024
"""Bytes of a request's head, for the listener's stream reader."""
_CONNECTIONS = 64
"""Connections of the listener at a time; beyond them the oldest is closed."""
_PAGE = "<!doctype html><meta charset=utf-8><title>arcbridge</title><p>{}</p>"

log = structlog.get_logger("arcbridge.client")


def redirect_path(endpoints: IssuerEndpoints, setting: str) -> str:
    """Return the path of the redirect URI of a login; empty: none.

    `setting`: `login.redirect_path`. Without it an issuer that announces `iss` needs none, and another one has the path
    that no other issuer has: its own URL without `https://`. Raises ConfigError for a URL that makes no path.
    """
    if setting:
        return "" if setting == "/" else setting
    if endpoints.response_iss:
        return ""
    # Letters that a browser or an issuer could write otherwise are encoded, "%" among them.
    path = "/" + quote(endpoints.issuer.removeprefix("https://"), safe="/:")
    if not _is_path(path):
        raise ConfigError(f"login.issuer: the path of {endpoints.issuer} has parts that a browser would take out")
    return path


def check_redirect_path(setting: str) -> None:
    """Raise ConfigError for a `login.redirect_path` that an issuer could not send a browser to."""
    if setting and (setting != quote(setting, safe="/:") or not _is_path(setting)):
        raise ConfigError("login.redirect_path: must be a path that begins with /, of letters, digits and - . _ ~ : /")


def _is_path(path: str) -> bool:
    """Return whether a browser asks for just this path."""
    return path.startswith("/") and not {".", ".."} & set(path.split("/"))


class LoginCallback:
    """The loopback listener's one question: which code came back under our state, from our issuer?"""

    def __init__(self, state: str, endpoints: IssuerEndpoints, path: str = "") -> None:
        """`path`: that of the redirect URI (`redirect_path`)."""
        self._state = state
        self._issuer = endpoints.issuer
        self._demands_iss = endpoints.response_iss
        self._path = path
        # In the order in which they came, because the oldest makes room for the newest. They are aborted and not
        # cancelled: asyncio of Python 3.11 logs an error for each server task that was cancelled.
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self.code: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= _CONNECTIONS:
            # Taken out at once: of connections that were accepted in one turn of the loop each displaces another one.
            self._connections.pop(next(iter(self._connections))).transport.abort()
        self._connections[task] = writer
        try:
            user = peer_user(writer.get_extra_info("socket"))
            if user is PeerUser.OTHER:
                log.warning(
                    "login refused to another user",
                    reason="a program of another user asked for the answer to the login",
                )
            if user is not PeerUser.OWN:
                return
            async with asyncio.timeout(10):
                head = await reader.readuntil(b"\r\n\r\n")
                status, text = self._judge(head.split(b"\r\n", 1)[0].decode("latin-1"))
                body = _PAGE.format(text).encode()
                writer.write(
                    f"HTTP/1.1 {status}\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
                    "Cache-Control: no-store\r\nReferrer-Policy: no-referrer\r\nConnection: close\r\n\r\n".encode()
                    + body
                )
                await writer.drain()
        except (OSError, EOFError, asyncio.LimitOverrunError, TimeoutError):
            pass  # a browser's spare connection, or another program: the answer comes on another connection
        finally:
            self._connections.pop(task, None)
            writer.close()

    async def finish(self) -> None:
        """Let the page reach the browser, then end what is left."""
        if self._connections:
            await asyncio.wait(self._connections, timeout=1)
        for writer in self._connections.values():
            writer.transport.abort()
        if self._connections:
            await asyncio.wait(self._connections)
        if not self.code.done():
            self.code.cancel()

    def _judge(self, line: str) -> tuple[str, str]:
        method, _, rest = line.partition(" ")
        target = urlsplit(rest.partition(" ")[0])
        fields = parse_qs(target.query, keep_blank_values=True)
        query = {key: values[0] for key, values in fields.items()}
        if method != "GET" or target.path != (self._path or "/") or not query:
            return "404 Not Found", "Nothing here."
        # What the redirect URI of another issuer's request had in its query stands before what that issuer adds.
        if any(len(fields.get(name, ())) > 1 for name in ("state", "iss", "code", "error")):
            return "400 Bad Request", "This answer has a parameter twice."
        if not hmac.compare_digest(query.get("state", "").encode(), self._state.encode()):
            return "400 Bad Request", "This answer belongs to another login."
        if query.get("iss", self._issuer) != self._issuer:  # RFC 9207
            return "400 Bad Request", "This answer comes from another issuer."
        if self._demands_iss and "iss" not in query:
            return "400 Bad Request", (
                "This answer does not say which issuer it is from (iss), and yours announces that its answers do. Have "
                "its operator send iss to this client; at Keycloak, switch Exclude Issuer From Authentication Response "
                "off."
            )
        if self.code.done():
            return "400 Bad Request", "This login has been answered already."
        if query.get("code"):
            self.code.set_result(query["code"])
            return "200 OK", "You are logged in. You may close this window."
        self.code.set_exception(IssuerError(query.get("error", "no_code")))
        return "200 OK", "The login was refused. You may close this window."
