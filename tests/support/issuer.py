"""A real OIDC issuer for tests: HTTPS, signed tokens, five grants, DPoP, and every way to go wrong on request.

    with Issuer(tmp_path / "issuer") as issuer:
        token = issuer.mint(sub="alice", aud="arcbridge-relay", groups=["platform"])

As a process of its own, `python -m tests.support.issuer --state DIR` writes its CA to `DIR/ca.pem` and prints
`issuer ready URL`. What is in DIR is kept: started again there, it has the same CA and the same key.

Any user name and any public client are taken; there are no passwords. So it listens on loopback alone. Paths under
`/_test/` are for the tests:

    POST /_test/mint      claims, headers, foreign, lifetime       -> {"token": ...}
    POST /_test/settings  any of `Settings`                        -> all of them
    POST /_test/device    user_code, user or deny
    GET  /_test/requests  how often each public path was asked
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import signal
import socket
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trustme
from aiohttp import web

from tests.support.issuer_server import IssuerServer, Settings
from tests.support.processes import ManagedProcess
from tests.support.stopping import Stopping


class Issuer(Stopping):
    """An issuer process. Ready when the constructor returns; ends with `stop` or the `with` block."""

    def __init__(self, directory: Path, *, port: int = 0, **settings: Any) -> None:
        self.directory = directory
        self._settings = settings
        self.ca_file = directory / "ca.pem"
        self._start(port)
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}),
            urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=self.ca_file)),
            _Unfollowed,
        )

    def _start(self, port: int) -> None:
        self.process = ManagedProcess(
            [
                *(sys.executable, "-m", "tests.support.issuer", "--state", self.directory, "--port", str(port)),
                *("--settings", json.dumps(self._settings)),
            ],
            log_dir=self.directory / "logs",
            name="issuer",
            cwd=Path(__file__).resolve().parents[2],
        )
        try:
            self.url = self.process.wait_for_line(r"^issuer ready (https://\S+)$", stream="stdout", timeout=30)[1]
        except BaseException:
            self.process.kill()
            raise

    @property
    def port(self) -> int:
        """The port of 127.0.0.1 it listens on."""
        return int(self.url.rpartition(":")[2])

    def mint(
        self,
        *,
        sub: str = "alice",
        aud: str | Sequence[str] = "arcbridge-relay",
        groups: Sequence[str] | None = None,
        lifetime: float = 3600,
        email: str | None = None,
        email_verified: bool = True,
        claims: Mapping[str, object] | None = None,
        headers: Mapping[str, object] | None = None,
        foreign: bool = False,
    ) -> str:
        """Return a token for a user; `lifetime` (seconds) may be negative.

        Without `groups`, the user's own. `claims` and `headers` are added last; None removes a claim. A `foreign` one
        is signed by a forger's key, under our key's id.
        """
        asked: dict[str, object] = {"sub": sub, "aud": aud if isinstance(aud, str) else list(aud)}
        asked["email_verified"] = email_verified
        if groups is not None:
            asked["groups"] = list(groups)
        if email is not None:
            asked["email"] = email
        body = {"claims": asked | dict(claims or {}), "headers": dict(headers or {}), "foreign": foreign}
        return str(self._test("mint", {**body, "lifetime": lifetime})["token"])

    def settings(self, **changes: Any) -> Settings:
        """Change any of `Settings`, and return them."""
        return Settings(**self._test("settings", changes))

    def down(self, down: bool = True) -> None:
        """Answer 503 to everything public, or stop doing so."""
        self.settings(down=down)

    def approve(self, user_code: str, user: str = "alice") -> None:
        """Approve a device login as a user."""
        self._test("device", {"user_code": user_code, "user": user})

    def deny(self, user_code: str) -> None:
        """Deny a device login."""
        self._test("device", {"user_code": user_code, "deny": True})

    def requests(self, path: str = "/jwks") -> int:
        """Return how often a public path was asked, refused and delayed requests included."""
        return int(self._test("requests").get(path, 0))

    def request(
        self, method: str, path: str, form: Mapping[str, str] | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """Send a request as any client would; return the status, and the JSON, the text, or where a redirect leads."""
        data = None if form is None else urllib.parse.urlencode(form).encode()
        return self._send(urllib.request.Request(self.url + path, data, dict(headers or {}), method=method))

    def stop(self) -> None:
        """End the process. What it knows is in its directory."""
        self.process.stop()

    def _test(self, name: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/_test/{name}", data, {"Content-Type": "application/json"})
        status, answer = self._send(request)
        if status != 200:
            raise AssertionError(f"/_test/{name}: {status} {answer}\n{self.process.tail()}")
        return answer

    def _send(self, request: urllib.request.Request) -> tuple[int, Any]:
        try:
            with self._opener.open(request, timeout=30) as answer:
                status, body, kind = answer.status, answer.read().decode(), answer.headers.get_content_type()
        except urllib.error.HTTPError as error:
            with error:
                if location := error.headers["Location"]:
                    return error.code, location
                status, body, kind = error.code, error.read().decode(), error.headers.get_content_type()
        return status, json.loads(body) if kind == "application/json" else body


class _Unfollowed(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer to look at."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


def _serving_context(state: Path, host: str) -> ssl.SSLContext:
    """Return the TLS side, with the CA and the certificate that the directory has, or new ones."""
    certificate = state / "server.pem"
    if not certificate.exists():
        ca = trustme.CA()
        ca.cert_pem.write_to_path(str(state / "ca.pem"))
        certificate.touch(mode=0o600)
        ca.issue_cert(*dict.fromkeys((host, "127.0.0.1", "localhost"))).private_key_and_cert_chain_pem.write_to_path(
            str(certificate)
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


async def serve(state: Path, port: int, settings: Settings, *, host: str = "127.0.0.1") -> None:
    """Serve until SIGTERM or SIGINT, at the address that `host` has and under this name."""
    state.mkdir(parents=True, exist_ok=True)
    issuer = IssuerServer(state, settings)
    runner = web.AppRunner(issuer.app(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, host, port, ssl_context=_serving_context(state, host))
    end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end.set)
    try:
        await site.start()
        issuer.url = f"https://{host}:{runner.addresses[0][1]}"
        print(f"issuer ready {issuer.url}", flush=True)
        await end.wait()
    finally:
        await runner.cleanup()


def main(argv: Sequence[str] | None = None) -> int:
    """Run an issuer until it is told to end."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.issuer", description=main.__doc__)
    parser.add_argument("--state", type=Path, required=True, help="directory for CA, certificate and keys")
    parser.add_argument("--host", default="127.0.0.1", help="its name or address, of the loopback interface")
    parser.add_argument("--port", type=int, default=0, help="port (0: any)")
    parser.add_argument("--settings", type=json.loads, default={}, metavar="JSON", help="settings to start with")
    options = parser.parse_args(argv)
    addresses = {str(one[4][0]) for one in socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)}
    if not all(ipaddress.ip_address(address).is_loopback for address in addresses):
        parser.error(
            f"--host {options.host}: the issuer signs for anybody, so it listens on loopback alone; take localhost, "
            "and `ssh -N -L PORT:localhost:PORT` on other machines"
        )
    asyncio.run(serve(options.state, options.port, Settings(**options.settings), host=options.host))
    return 0


if __name__ == "__main__":
    sys.exit(main())
