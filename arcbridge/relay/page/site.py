"""Serves the administrators' page at the relay's HTTPS entrance, with its bounds and who may see what.

    GET  /page              the page; ?q= part of clusters' names, ?cluster= and ?user= what is looked up
    GET  /page/events       the same parts again whenever they change (server-sent events), for `script.js`
    GET  /page/login        to the issuer; GET /page/callback: back from it
    POST /page/logout       takes the cookie back
    GET  /page/style.css, /page/script.js

It is for people whom an `[[admin]]` names, and each sees what is theirs: clusters by name and pattern; what of the
relay itself, what was changed and who was refused, by `read`. The right, and whether the login is revoked, is asked for
at each request, before each event, and every `LOOK` seconds of a page that is open. A page of another origin may lead
here and do nothing else. Invariants: nothing here changes anything at the relay; a person without the right gets one
answer; a stream that no browser reads ends.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from importlib.resources import files
from typing import Final, NamedTuple

import structlog
from aiohttp import web

from arcbridge.errors import ArcbridgeError, PermissionRefused, Unauthenticated
from arcbridge.identity.claims import Identity
from arcbridge.identity.policy import EVERY_CLUSTER, WHAT, PolicyFile
from arcbridge.limiters import KeyedTokenBucket
from arcbridge.net.address import Address, source_of
from arcbridge.observe.metrics import Metrics
from arcbridge.relay.audit.record import Actor
from arcbridge.relay.http.answers import ApiRefusal
from arcbridge.relay.http.api import SOURCES, SUBJECTS, Api
from arcbridge.relay.http.server import address_of, keep_stream, note_proved, take_turn
from arcbridge.relay.page import view
from arcbridge.relay.page.facts import FactBook, Facts
from arcbridge.relay.page.login import CALLBACK, LOGIN_LIFE, BegunLogin, PageLogin, PageSessions
from arcbridge.relay.page.lookups import reach_of, refusals_of

SESSION_COOKIE: Final = "__Host-arcbridge-page"
LOGIN_COOKIE: Final = "__Host-arcbridge-login"
MOST_STREAMS: Final = 100
"""Pages that are live at once at one process."""
OWN_STREAMS: Final = 10
"""Of them those of one person: windows, and what a browser has left behind."""
STREAM_LIFE: Final = 300.0
"""Seconds after which a stream ends; the browser begins another one."""
LOOK: Final = 5.0
"""Seconds after which the right to a page that is open is asked for again, also while there are no new facts."""
VIEWS: Final = 60
"""Pages that one person may open at once."""
VIEWS_RATE: Final = 1.0
"""Pages per second and person that grow back."""
LOGINS: Final = 20
"""Logins of one address at once, begun or ended; an end costs a request to the issuer."""
LOGINS_RATE: Final = 0.2
"""Logins per second and address that grow back."""
ENDING_AT_ONCE: Final = 8
"""Logins that ask the issuer at a time."""
TURN: Final = 5.0
"""Seconds that a login waits for its turn."""
OUTCOMES: Final = ("done", "refused", "failed")
"""How a login ends."""
REFUSED: Final = "you are logged in, and no [[admin]] of the relay's policy names you: ask the owner of its file"
PATHS: Final = ("/page", "/page/events", "/page/login", CALLBACK, "/page/logout", "/page/style.css", "/page/script.js")
_LANDING: Final = frozenset({"/page", CALLBACK})
"""Paths to which a page of another origin may lead."""
_ASSETS: Final = {"/page/style.css": "text/css", "/page/script.js": "text/javascript"}
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    # No other site learns where one comes from. With `no-referrer` a browser would send `Origin: null` with the form
    # that logs out (Fetch standard, "append a request Origin header").
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}

log = structlog.get_logger("arcbridge.relay")


Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Viewer(NamedTuple):
    """A person who may look."""

    identity: Identity
    clusters: tuple[str, ...]
    """Names and patterns of the clusters that are the person's."""
    readable: tuple[str, ...]
    """Those of which the person may `read` everything."""

    @property
    def whole(self) -> bool:
        """Whether what is the relay's own is shown, too."""
        return EVERY_CLUSTER in self.readable


@dataclass(eq=False, repr=False)
class PageSite:
    """The page at one process of the relay."""

    api: Api
    facts: FactBook
    login: PageLogin
    sessions: PageSessions
    policy: PolicyFile
    public: Address
    issuer: str
    """Its URL, for people."""
    monotonic: Callable[[], float] = field(default=time.monotonic, kw_only=True)

    def __post_init__(self) -> None:
        self._access = self.api.checks.access
        self._views = KeyedTokenBucket[str](VIEWS, VIEWS_RATE, size=SUBJECTS)
        self._logins = KeyedTokenBucket[str](LOGINS, LOGINS_RATE, size=SOURCES)
        self._ending = asyncio.Semaphore(ENDING_AT_ONCE)
        self._rendering = asyncio.Lock()
        self._comparing = asyncio.Lock()
        self._assets = {path: files(__package__).joinpath(path.rpartition("/")[2]).read_bytes() for path in _ASSETS}
        self.streams: Counter[str] = Counter()
        """Pages that are live, by subject."""
        self.logins = dict.fromkeys(OUTCOMES, 0)
        """How logins ended."""

    def install(self, app: web.Application) -> None:
        """Add the routes, and what ends with the application."""
        routes: dict[str, tuple[str, Answer]] = {
            "/page": ("GET", self._show),
            "/page/events": ("GET", self._events),
            "/page/login": ("GET", self._begin),
            CALLBACK: ("GET", self._finish),
            "/page/logout": ("POST", self._leave),
            **dict.fromkeys(_ASSETS, ("GET", self._asset)),
        }
        for path, (method, handler) in routes.items():
            app.router.add_route(method, path, partial(self._handled, handler=handler))
        app.on_cleanup.append(self._end)

    def register(self, metrics: Metrics) -> None:
        """Tell `metrics` where to read."""
        metrics.gauge("page_streams", "Administrators' pages that are live.", None, lambda: self.streams.total())
        metrics.counter("page_logins_total", "Logins at the administrators' page, by how they ended.",
                        {"outcome": OUTCOMES}, lambda: self.logins)  # fmt: skip
        metrics.counter("page_facts_total", "How often the facts of the administrators' page were computed.", None,
                        lambda: self.facts.computed)  # fmt: skip

    # -- what is shown -----------------------------------------------------------------------------------------------

    async def _show(self, request: web.Request) -> web.StreamResponse:
        try:
            viewer = self._opener(request)
        except Unauthenticated as error:
            return self._notice(error.message)
        payer = self.api.payer_of(viewer.identity)
        await take_turn(payer, "your sessions and requests take")
        return await payer.steps(self._page(request, viewer), inner=True)

    async def _page(self, request: web.Request, viewer: Viewer) -> web.Response:
        looked = _looked(request.query)
        facts = await self.facts.get()
        own = [one.name for one in await facts.choose(viewer.readable)] if viewer.readable else []
        relay, found = self.facts.relay, view.Found()
        try:
            if looked.user and viewer.readable:
                policy = self.policy.current()
                found = view.Found(reach=await reach_of(
                    looked.user, relay, policy, own, viewer.readable, self._comparing, whole=viewer.whole
                ))  # fmt: skip
            elif looked.cluster in own:
                found = view.Found(refusals=await refusals_of(relay, [looked.cluster]))
        except ArcbridgeError as error:
            found = view.Found(failure=error.message)
        live = await self._live(request, facts, looked.text)
        return _html(view.page(facts, live, str(self.public), viewer.identity.username, looked, found))

    async def _events(self, request: web.Request) -> web.StreamResponse:
        viewer = self._opener(request)
        text = _looked(request.query).text
        with self._stream(viewer):
            keep_stream(request, STREAM_LIFE + TURN)
            answer = web.StreamResponse(headers={**_HEADERS, "Content-Type": "text/event-stream"})
            await answer.prepare(request)
            try:
                await self.api.payer_of(viewer.identity).steps(self._send(request, answer, text), inner=True)
            except ConnectionError:
                pass  # a browser that is gone resets the connection, which ends this
            except Exception as error:
                # What was sent cannot be taken back, and no second head may follow it, so the answer is cut off.
                log.error("page stream failed", reason=type(error).__name__, exc_info=True)
                raise ConnectionAbortedError("the page cannot be made") from error
            return answer

    async def _send(self, request: web.Request, answer: web.StreamResponse, text: str) -> None:
        await answer.write(b"retry: 3000\n\n")
        ends, sent = self.monotonic() + STREAM_LIFE, ""
        try:
            facts = await self._next(request, None)
            while self.monotonic() < ends:
                shown = await self._live(request, facts, text)
                if shown != sent:
                    await answer.write(_event("facts", shown))
                    sent = shown
                await answer.write(_event("now", time.strftime("%H:%M:%S UTC", time.gmtime(facts.at))))
                facts = await self._next(request, facts)
        except ApiRefusal:
            return  # the person takes too much of the loop's time; the browser begins another one later
        except ArcbridgeError as error:
            await answer.write(_event("over", error.message))

    async def _next(self, request: web.Request, seen: Facts | None) -> Facts:
        """Return the facts that follow; ask meanwhile whether the person may still look. Raises `ArcbridgeError`."""
        waiting = asyncio.ensure_future(self.facts.get() if seen is None else self.facts.after(seen))
        try:
            while not (await asyncio.wait({waiting}, timeout=LOOK))[0]:
                self._viewer(request)
            return waiting.result()
        finally:
            waiting.cancel()

    async def _live(self, request: web.Request, facts: Facts, text: str) -> str:
        """Return a viewer's live parts. Pages that wake together are rendered one in each turn of the
        loop, so that sessions have the turns between. Raises `ArcbridgeError`."""
        await take_turn(self.api.payer_of(self._viewer(request).identity), "your sessions and requests take")
        async with self._rendering:
            await asyncio.sleep(0)
            viewer = self._viewer(request)  # as it is by now
            await facts.choose(viewer.clusters)
            return view.live_parts(facts, viewer.clusters, viewer.readable, text=text)

    async def _asset(self, request: web.Request) -> web.Response:
        self.api.spend_of_stranger(request)
        return web.Response(body=self._assets[request.path], content_type=_ASSETS[request.path], headers=_HEADERS)

    # -- who looks -----------------------------------------------------------------------------------------------------

    def _viewer(self, request: web.Request) -> Viewer:
        """Return who looks. Raises `Unauthenticated` without a login, `PermissionRefused` without a right."""
        cookie = _cookie(request, SESSION_COOKIE)
        identity = self.sessions.identity(cookie)
        if identity is None:
            raise Unauthenticated("your login is over: log in again" if cookie else "log in to see your clusters")
        return self._judged(identity)

    def _judged(self, identity: Identity) -> Viewer:
        if (refused := self._access.refusal(identity)) is not None:
            raise Unauthenticated(refused.message)
        clusters = self._access.administered(identity, *WHAT)
        if not clusters:
            raise PermissionRefused(REFUSED)
        return Viewer(identity, clusters, self._access.administered(identity, "read"))

    def _opener(self, request: web.Request) -> Viewer:
        """Return who opens a page or a stream, and count that: for the person, or for the address of one who may not
        look. Raises as `_viewer`, and `ApiRefusal` for too many."""
        try:
            viewer = self._viewer(request)
        except ArcbridgeError:
            self.api.spend_of_stranger(request)
            raise
        note_proved(request)
        self.api.spend("page", self._views, viewer.identity.subject, "you open this page too often")
        return viewer

    @contextmanager
    def _stream(self, viewer: Viewer) -> Iterator[None]:
        subject = viewer.identity.subject
        if self.streams.total() >= MOST_STREAMS or self.streams[subject] >= OWN_STREAMS:
            raise ApiRefusal(HTTPStatus.SERVICE_UNAVAILABLE, "too many pages are live: close some", retry_after=10)
        self.streams[subject] += 1
        try:
            yield
        finally:
            self.streams[subject] -= 1
            if not self.streams[subject]:
                del self.streams[subject]

    async def _begin(self, request: web.Request) -> web.Response:
        self._spend_login(request)
        url, cookie = await self.login.begin(_cookie(request, LOGIN_COOKIE))
        answer = _led(url)
        _set(answer, LOGIN_COOKIE, cookie, LOGIN_LIFE)
        return answer

    async def _finish(self, request: web.Request) -> web.Response:
        self._spend_login(request)
        source, identity, outcome = address_of(request), None, "failed"
        logins = _cookie(request, LOGIN_COOKIE)
        begun: BegunLogin | None = None
        try:
            # What was not begun here holds no other login up.
            begun = self.login.recognise(logins, dict(request.query))
            identity = await self._in_turn(begun)
            self._judged(identity)
            answer = _led("/page")
            cookie = self.sessions.cookie(identity, self.policy.current())
            _set(answer, SESSION_COOKIE, cookie, int(self.sessions.life))
            note_proved(request)
            outcome = "done"
            log.info("administrator logged in at the page", user=identity.username, source=source)
        except ArcbridgeError as error:
            who = {} if identity is None else {"user": identity.username}
            log.warning("login at the page failed", source=source, reason=error.message, **who, **error.log_fields())
            if identity is not None:
                outcome = "refused"
                actor = Actor("person", identity.username, {"subject": identity.subject, "source": source})
                self.api.audit.note_stranger("administration", {"command": "page"}, actor, error.message)
            answer = self._notice(error.message, error)
        finally:
            self.logins[outcome] += 1
        if begun is not None:  # else another site may have led here while a login is under way
            if others := self.login.without(logins, begun):
                _set(answer, LOGIN_COOKIE, others, LOGIN_LIFE)
            else:
                answer.del_cookie(LOGIN_COOKIE, path="/", secure=True, httponly=True, samesite="Lax")
        return answer

    async def _in_turn(self, begun: BegunLogin) -> Identity:
        try:
            async with asyncio.timeout(TURN):
                await self._ending.acquire()
        except TimeoutError:
            raise ApiRefusal(HTTPStatus.SERVICE_UNAVAILABLE, "too many log in now: try again", retry_after=5) from None
        try:
            return await self.login.finish(begun)
        finally:
            self._ending.release()

    def _spend_login(self, request: web.Request) -> None:
        source = source_of(address_of(request))
        self.api.spend("page", self._logins, source, "too many logins from this address")

    async def _leave(self, request: web.Request) -> web.Response:
        self.api.spend_of_stranger(request)
        answer = _led("/page")
        answer.del_cookie(SESSION_COOKIE, path="/", secure=True, httponly=True, samesite="Lax")
        return answer

    # -- inside ----------------------------------------------------------------------------------------------------

    def _admits(self, request: web.BaseRequest) -> bool:
        """Return whether a browser may send this: a page of the relay's own did, or a person who went there."""
        headers, site = request.headers, request.headers.get("Sec-Fetch-Site", "")
        own = headers.get("Origin") == self.public.origin
        if request.method == "POST":
            return own or ("Origin" not in headers and site == "same-origin")
        if site in ("", "none", "same-origin"):
            return own or "Origin" not in headers
        went = (headers.get("Sec-Fetch-Mode"), headers.get("Sec-Fetch-Dest")) == ("navigate", "document")
        return went and request.path in _LANDING

    def _notice(self, words: str, error: ArcbridgeError | None = None) -> web.Response:
        status = 200 if error is None else error.status_code
        answer = _html(view.notice(str(self.public), words, login=self.issuer), status)
        if error is not None and error.retry_after is not None:
            answer.headers["Retry-After"] = str(error.retry_after)
        return answer

    async def _handled(self, request: web.Request, handler: Answer) -> web.StreamResponse:
        """Answer a request; refusals are pages, too."""
        if not self._admits(request):
            return self._notice("another page may not ask this of the relay", PermissionRefused(""))
        try:
            return await handler(request)
        except ArcbridgeError as error:
            if error.status_code >= 500 and error.status_code != HTTPStatus.SERVICE_UNAVAILABLE:
                raise  # about this machine: `answer_of` logs it and gives no details
            return self._notice(error.message, error)

    async def _end(self, app: web.Application) -> None:
        await self.facts.close()
        await self.login.close()


def _looked(query: Mapping[str, str]) -> view.Looked:
    return view.Looked(query.get("q", "").strip()[:63], query.get("cluster", "")[:253], query.get("user", "")[:1024])


def _html(text: str, status: int = 200) -> web.Response:
    return web.Response(text=text, content_type="text/html", status=status, headers=_HEADERS)


def _led(url: str) -> web.Response:
    return web.Response(status=HTTPStatus.SEE_OTHER, headers={**_HEADERS, "Location": url})


def _cookie(request: web.Request, name: str) -> str:
    """Return the value of a cookie, empty without one. aiohttp parses all that a browser sends, and takes 0.2 s for a
    header of 64 KiB, which any stranger may send. Only RFC 6265's white space is stripped: a name with another blank is
    no `__Host-` name to a browser, which takes it from any host of the domain."""
    for header in request.headers.getall("Cookie", ()):
        for pair in header.split(";"):
            found, _, value = pair.partition("=")
            if found.strip(" \t") == name:
                return value.strip(" \t").strip('"')  # `set_cookie` quotes a value with `=`
    return ""


def _set(answer: web.Response, name: str, value: str, life: int) -> None:
    answer.set_cookie(name, value, max_age=life, path="/", secure=True, httponly=True, samesite="Lax")


def _event(name: str, data: str) -> bytes:
    lines = "".join(f"data: {line}\n" for line in data.splitlines())
    return f"event: {name}\n{lines}\n".encode()
