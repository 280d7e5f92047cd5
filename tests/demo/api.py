"""A demonstration API for machines without a real API server: a few resources, honest about the caller's identity.

It speaks just enough of Kubernetes' API for `kubectl version`, `get` of namespaces, configmaps and pods, `logs`, `exec`
(`tests/demo/pods.py`) and `auth whoami`: JSON discovery, server-side tables, nothing that can be changed. It believes
impersonation headers as a real API server would that gave the agent the right, and has two groups in place of RBAC:
`platform` may look and exec, `developers` may look. Whatever it lacks it refuses, in words that say that it is a
demonstration. Run as `python -m tests.demo.api --port 0 --directory DIR`; it prints its URL when ready.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import signal
import ssl
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path

import trustme
from aiohttp import web

from tests.demo.pods import LOG_LINES, STATUS, Executions, Pod

STARTED = datetime.now(UTC)
CREATED = STARTED.strftime("%Y-%m-%dT%H:%M:%SZ")
AGENT = "system:serviceaccount:arcbridge:arcbridge-agent"
READERS, WRITERS = frozenset({"platform", "developers"}), frozenset({"platform"})
WATCH = 300.0
"""Seconds after which a watch ends, unless the caller asks for less; nothing ever happens in it."""

Object = dict[str, object]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _resource(name: str, kind: str, namespaced: bool, verbs: list[str], group: str = "") -> Object:
    return {
        "resource": name,
        "responseKind": {"group": group, "version": "v1", "kind": kind},
        "scope": "Namespaced" if namespaced else "Cluster",
        "singularResource": kind.lower(),
        "shortNames": {"pods": ["po"], "namespaces": ["ns"], "configmaps": ["cm"]}.get(name, []),
        "verbs": verbs,
    }


def _discovery(group: str, resources: list[Object]) -> Object:
    return {
        "metadata": {"name": group, "creationTimestamp": None},
        "versions": [{"version": "v1", "resources": resources, "freshness": "Current"}],
    }


CORE = _discovery(
    "",
    [
        _resource("namespaces", "Namespace", False, ["get", "list", "watch"]),
        _resource("configmaps", "ConfigMap", True, ["get", "list", "watch"]),
        _resource("pods", "Pod", True, ["delete", "get", "list", "watch"]),
    ],
)
CORE["metadata"] = {"creationTimestamp": None}
GROUPS = [
    _discovery(group, [_resource(name, kind, False, ["create"], group)])
    for group, name, kind in (
        ("authentication.k8s.io", "selfsubjectreviews", "SelfSubjectReview"),
        ("authorization.k8s.io", "selfsubjectaccessreviews", "SelfSubjectAccessReview"),
    )
]
KINDS = {"namespaces": "Namespace", "configmaps": "ConfigMap", "pods": "Pod"}


def _json(body: object, status: int = 200) -> web.Response:
    return web.Response(text=json.dumps(body), content_type="application/json", status=status)


@web.middleware
async def explain(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Put every refusal into the Status that kubectl reads."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        text = error.text or error.reason
        if error.status in (404, 405) and text.startswith(f"{error.status}:"):
            text = (
                f"the demonstration API has no {request.method} {request.path}; `make run REAL=1` has a real API server"
            )
        reason = HTTPStatus(error.status).phrase.replace(" ", "")
        return _json({**STATUS, "message": text, "reason": reason, "code": error.status}, error.status)


class DemonstrationApi:
    """The API: who asks, what there is, and the pods that live in it."""

    def __init__(self, token: str, directory: Path) -> None:
        """`token` is the agent's; the pods' commands run below `directory`."""
        self._token = token
        self._executions = Executions()
        self.pods = [Pod("till", "shop", directory / "till"), Pod("stockroom", "shop", directory / "stockroom")]
        for pod in self.pods:
            pod.directory.mkdir(parents=True, exist_ok=True)

    # Who asks.

    def _caller(self, request: web.Request) -> tuple[str, list[str]]:
        """Return the user and groups of a request. Raises HTTPUnauthorized without the agent's token."""
        given = request.headers.get("Authorization", "")
        if not secrets.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            raise web.HTTPUnauthorized(text="Unauthorized")
        user = request.headers.get("Impersonate-User", AGENT)
        return user, [*request.headers.getall("Impersonate-Group", []), "system:authenticated"]

    def _allowed(self, request: web.Request, verb: str, resource: str) -> bool:
        user, groups = self._caller(request)
        return user == AGENT or not (READERS if verb in ("get", "list", "watch") else WRITERS).isdisjoint(groups)

    def _require(self, request: web.Request, verb: str, resource: str) -> str:
        """Return the user if the demonstration's two groups allow it. Raises HTTPForbidden."""
        user, _ = self._caller(request)
        if not self._allowed(request, verb, resource):
            raise web.HTTPForbidden(
                text=f'{resource} is forbidden: User "{user}" cannot {verb} resource "{resource}" in this demonstration'
            )
        return user

    # What there is.

    async def version(self, request: web.Request) -> web.Response:
        """The server's version."""
        self._caller(request)
        return _json({"major": "1", "minor": "36", "gitVersion": "v1.36.0-demonstration"})

    async def discovery(self, request: web.Request) -> web.Response:
        """Aggregated discovery of the core group, or of the others."""
        self._caller(request)
        items = [CORE] if request.path == "/api" else GROUPS
        response = _json(
            {"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items}
        )
        response.headers["Content-Type"] = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
        return response

    async def whoami(self, request: web.Request) -> web.Response:
        """SelfSubjectReview: the identity that the request came with. The (protobuf) body is not looked at."""
        user, groups = self._caller(request)
        await request.read()
        status = {"userInfo": {"username": user, "groups": groups}}
        kind = {"kind": "SelfSubjectReview", "apiVersion": "authentication.k8s.io/v1"}
        return _json({**kind, "metadata": {"creationTimestamp": CREATED}, "status": status}, 201)

    async def may_i(self, request: web.Request) -> web.Response:
        """SelfSubjectAccessReview in JSON, as the agent asks it."""
        try:
            review = json.loads(await request.read())
            asked = review["spec"].get("resourceAttributes") or {"verb": "get"}
        except (ValueError, LookupError):
            raise web.HTTPUnsupportedMediaType(text="the demonstration API reads reviews in JSON only") from None
        allowed = self._allowed(request, asked.get("verb", ""), asked.get("resource", ""))
        return _json({**review, "status": {"allowed": allowed}}, 201)

    def _objects(self, resource: str) -> list[Object]:
        if resource == "namespaces":
            return [_object("Namespace", {"name": name}) for name in ("default", "kube-system", "shop")]
        if resource == "configmaps":
            data: Object = {"data": {"monday": "9 to 17", "sunday": "closed"}}
            return [_object("ConfigMap", {"name": "opening-hours", "namespace": "shop"}, data)]
        if resource == "pods":
            return [_pod(pod) for pod in self.pods]
        raise web.HTTPNotFound(text=f"the demonstration API has no {resource}; `make run REAL=1` has a real API server")

    async def listing(self, request: web.Request) -> web.StreamResponse:
        """A list of objects, or a watch in which nothing happens."""
        resource, namespace = request.match_info["resource"], request.match_info.get("namespace")
        watch = request.query.get("watch") in ("true", "1")
        self._require(request, "watch" if watch else "list", resource)
        found = [one for one in self._objects(resource) if namespace in (None, _metadata(one).get("namespace"))]
        if not watch:
            return _shown(request, resource, found, listed=True)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        await asyncio.sleep(min(float(request.query.get("timeoutSeconds", WATCH)), WATCH))
        return response

    async def one(self, request: web.Request) -> web.Response:
        """One object."""
        resource, namespace = request.match_info["resource"], request.match_info.get("namespace")
        self._require(request, "get", resource)
        name = request.match_info["name"]
        for found in self._objects(resource):
            if _metadata(found)["name"] == name and namespace == _metadata(found).get("namespace"):
                return _shown(request, resource, [found], listed=False)
        raise web.HTTPNotFound(text=f'{resource} "{name}" not found')

    async def delete(self, request: web.Request) -> web.Response:
        """Refuse: those who may not, as RBAC does, and the others because this is a demonstration."""
        self._require(request, "delete", request.match_info["resource"])
        raise web.HTTPMethodNotAllowed(
            "DELETE", ["GET"], text="the demonstration API changes nothing; `make run REAL=1` has a real API server"
        )

    # The pods.

    def _pod(self, request: web.Request) -> Pod:
        name, namespace = request.match_info["name"], request.match_info["namespace"]
        for pod in self.pods:
            if (pod.name, pod.namespace) == (name, namespace):
                return pod
        raise web.HTTPNotFound(text=f'pods "{name}" not found')

    async def log(self, request: web.Request) -> web.StreamResponse:
        """A pod's log; with `follow` until the caller leaves."""
        self._require(request, "get", "pods/log")
        pod, query = self._pod(request), request.query
        tail = int(query["tailLines"]) if query.get("tailLines", "").isdecimal() else LOG_LINES
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            async for line in pod.read(tail=tail, follow=query.get("follow") in ("true", "1")):
                await response.write(f"{line}\n".encode())
        return response

    async def execute(self, request: web.Request) -> web.StreamResponse:
        """Run a command in a pod."""
        user = self._require(request, "create", "pods/exec")
        return await self._executions.serve(request, self._pod(request), user)

    def application(self) -> web.Application:
        """Return the API as an application of aiohttp."""
        application = web.Application(middlewares=[explain])
        router = application.router
        router.add_get("/version", self.version)
        router.add_get("/api", self.discovery)
        router.add_get("/apis", self.discovery)
        router.add_post("/apis/authentication.k8s.io/v1/selfsubjectreviews", self.whoami)
        router.add_post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", self.may_i)
        router.add_get("/api/v1/{resource}", self.listing)
        router.add_get("/api/v1/{resource:namespaces}/{name}", self.one)
        router.add_get("/api/v1/namespaces/{namespace}/{resource}", self.listing)
        router.add_get("/api/v1/namespaces/{namespace}/{resource}/{name}", self.one)
        router.add_delete("/api/v1/namespaces/{namespace}/{resource}/{name}", self.delete)
        router.add_get("/api/v1/namespaces/{namespace}/pods/{name}/log", self.log)
        router.add_get("/api/v1/namespaces/{namespace}/pods/{name}/exec", self.execute)
        # kubectl tries SPDY where WebSocket was refused, and shows what that is told.
        router.add_post("/api/v1/namespaces/{namespace}/pods/{name}/exec", self.execute)
        return application


def _metadata(found: Object) -> Mapping[str, object]:
    metadata = found["metadata"]
    assert isinstance(metadata, dict)
    return metadata


def _object(kind: str, metadata: Mapping[str, str], rest: Mapping[str, object] | None = None) -> Object:
    return {
        "kind": kind,
        "apiVersion": "v1",
        "metadata": {**metadata, "resourceVersion": "1", "creationTimestamp": CREATED},
        **(rest or {}),
    }


def _pod(pod: Pod) -> Object:
    container: Object = {"name": pod.name, "image": "none: a demonstration"}
    running = {"ready": True, "restartCount": 0, "imageID": "", "state": {"running": {"startedAt": CREATED}}}
    status = {"phase": "Running", "startTime": CREATED, "containerStatuses": [{**container, **running}]}
    spec = {"containers": [container], "nodeName": "demonstration"}
    return _object("Pod", {"name": pod.name, "namespace": pod.namespace}, {"spec": spec, "status": status})


def _shown(request: web.Request, resource: str, found: list[Object], *, listed: bool) -> web.Response:
    """Objects as a table where the caller asks for one (`kubectl get`), else as they are."""
    if "as=Table" not in request.headers.get("Accept", ""):
        if not listed:
            return _json(found[0])
        kind = f"{KINDS[resource]}List"
        return _json({"kind": kind, "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": found})
    age = int((datetime.now(UTC) - STARTED).total_seconds())
    cells = {"pods": ["1/1", "Running", "0"], "namespaces": ["Active"], "configmaps": ["2"]}[resource]
    names = {"pods": ["Ready", "Status", "Restarts"], "namespaces": ["Status"], "configmaps": ["Data"]}[resource]
    rows = [
        {
            "cells": [_metadata(one)["name"], *cells, f"{age}s" if age < 120 else f"{age // 60}m"],
            "object": {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": one["metadata"]},
        }
        for one in found
    ]
    columns = [
        {"name": name, "type": "string", "format": "name" if name == "Name" else "", "description": "", "priority": 0}
        for name in ("Name", *names, "Age")
    ]
    kind = {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {"resourceVersion": "1"}}
    return _json({**kind, "columnDefinitions": columns, "rows": rows})


async def serve(port: int, directory: Path, token: str) -> None:
    """Serve until cancelled; the CA is put into `directory`."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    api = DemonstrationApi(token, directory / "pods")
    runner = web.AppRunner(api.application(), access_log=None, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, ssl_context=context)
    await site.start()
    print(f"listening on https://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        await asyncio.gather(*(pod.live() for pod in api.pods))
    finally:
        await runner.cleanup()  # which ends the commands that run


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description="Serve; the CA and the agent's token are put into the directory.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--directory", type=Path, required=True)
    options = parser.parse_args()
    directory: Path = options.directory
    # Its holder may run commands as this user: it is another one each time, in a file of this user alone.
    token = secrets.token_urlsafe(32)
    with open(os.open(directory / "token", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(token)
    try:
        asyncio.run(serve(options.port, directory, token))
    except (KeyboardInterrupt, asyncio.CancelledError):
        pass


if __name__ == "__main__":
    main()
