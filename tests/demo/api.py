"""A demonstration API for machines without a real API server: a few resources, honest about the caller's identity.

It speaks just enough of Kubernetes' API for `kubectl version`, `get namespaces`, `get configmaps` and `auth whoami`
(over JSON discovery, with server-side tables), and believes impersonation headers as a real API server would that
gave the agent the right. Run as `python -m tests.demo.api --port 0 --directory DIR`; it prints its URL when ready.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
from datetime import UTC, datetime
from pathlib import Path

import trustme
from aiohttp import web

CREATED = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
TOKEN = "demonstration-agent-token"


def _resource(name: str, kind: str, namespaced: bool, verbs: list[str], group: str = "") -> dict[str, object]:
    return {
        "resource": name,
        "responseKind": {"group": group, "version": "v1", "kind": kind},
        "scope": "Namespaced" if namespaced else "Cluster",
        "singularResource": kind.lower(),
        "verbs": verbs,
    }


def _discovery(group: str, resources: list[dict[str, object]]) -> dict[str, object]:
    return {
        "metadata": {"name": group, "creationTimestamp": None},
        "versions": [{"version": "v1", "resources": resources, "freshness": "Current"}],
    }


CORE = _discovery(
    "",
    [
        _resource("namespaces", "Namespace", False, ["get", "list"]),
        _resource("configmaps", "ConfigMap", True, ["get", "list"]),
    ],
)
CORE["metadata"] = {"creationTimestamp": None}
GROUPS = _discovery(
    "authentication.k8s.io",
    [_resource("selfsubjectreviews", "SelfSubjectReview", False, ["create"], "authentication.k8s.io")],
)
OBJECTS: dict[str, list[dict[str, object]]] = {
    "namespaces": [{"name": name} for name in ("default", "kube-system", "shop")],
    "configmaps": [{"name": "opening-hours", "namespace": "shop"}],
}
KINDS = {"namespaces": "Namespace", "configmaps": "ConfigMap"}


def _caller(request: web.Request) -> tuple[str, list[str]]:
    if request.headers.get("Authorization") != f"Bearer {TOKEN}":
        raise web.HTTPUnauthorized(text=json.dumps(_status(401, "Unauthorized", "Unauthorized")))
    user = request.headers.get("Impersonate-User", "system:serviceaccount:arcbridge:arcbridge-agent")
    return user, [*request.headers.getall("Impersonate-Group", []), "system:authenticated"]


def _status(code: int, reason: str, message: str) -> dict[str, object]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code,
    }


def _json(body: object, content_type: str = "application/json", status: int = 200) -> web.Response:
    return web.Response(text=json.dumps(body), content_type=content_type, status=status)


async def version(request: web.Request) -> web.Response:
    """The server's version."""
    _caller(request)
    return _json({"major": "1", "minor": "36", "gitVersion": "v1.36.0-demonstration"})


async def discovery(request: web.Request) -> web.Response:
    """Aggregated discovery of the core group, or of the others."""
    _caller(request)
    item = CORE if request.path == "/api" else GROUPS
    body = {"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": [item]}
    response = _json(body)
    response.headers["Content-Type"] = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
    return response


async def whoami(request: web.Request) -> web.Response:
    """SelfSubjectReview: the identity that the request came with. The (protobuf) body is not looked at."""
    user, groups = _caller(request)
    async for _ in request.content.iter_any():
        pass
    return _json(
        {
            "kind": "SelfSubjectReview",
            "apiVersion": "authentication.k8s.io/v1",
            "metadata": {"creationTimestamp": CREATED},
            "status": {"userInfo": {"username": user, "groups": groups}},
        },
        status=201,
    )


async def listing(request: web.Request) -> web.Response:
    """A list as a table, one object as JSON."""
    _caller(request)
    resource = request.match_info["resource"]
    found = [
        one for one in OBJECTS.get(resource, []) if request.match_info.get("namespace") in (None, one.get("namespace"))
    ]
    if resource not in OBJECTS:
        return _json(_status(404, "NotFound", "the server could not find the requested resource"), status=404)
    rows = [
        {
            "cells": [one["name"], CREATED],
            "object": {
                "kind": "PartialObjectMetadata",
                "apiVersion": "meta.k8s.io/v1",
                "metadata": {**one, "creationTimestamp": CREATED},
            },
        }
        for one in found
    ]
    columns = [
        {"name": "Name", "type": "string", "format": "name", "description": "", "priority": 0},
        {"name": "Created At", "type": "date", "format": "", "description": "", "priority": 0},
    ]
    return _json(
        {
            "kind": "Table",
            "apiVersion": "meta.k8s.io/v1",
            "metadata": {"resourceVersion": "1"},
            "columnDefinitions": columns,
            "rows": rows,
        }
    )


def app() -> web.Application:
    """The API."""
    application = web.Application()
    application.router.add_get("/version", version)
    application.router.add_get("/api", discovery)
    application.router.add_get("/apis", discovery)
    application.router.add_post("/apis/authentication.k8s.io/v1/selfsubjectreviews", whoami)
    application.router.add_get("/api/v1/{resource}", listing)
    application.router.add_get("/api/v1/namespaces/{namespace}/{resource}", listing)
    return application


async def serve(port: int, directory: Path) -> None:
    """Serve until cancelled; the CA and the agent's token are in `directory`."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    (directory / "token").write_text(TOKEN)
    runner = web.AppRunner(app(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, ssl_context=context)
    await site.start()
    print(f"listening on https://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description=serve.__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--directory", type=Path, required=True)
    options = parser.parse_args()
    try:
        asyncio.run(serve(options.port, options.directory))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
