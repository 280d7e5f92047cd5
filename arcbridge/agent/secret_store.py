"""Keeps the agent's credential in a Kubernetes Secret that all pods of the DaemonSet share.

It is a `pki.credentials.CredentialStore`: versions are resourceVersions, and an update carries the one that was read,
so the API server itself decides which of several pods was first. The manifest ships the Secret empty, because `create`
cannot be granted for one name only; where the agent may create, a missing Secret is created. Invariant: no error
quotes what the Secret holds.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

from arcbridge.agent.kube.apiserver import AnswerFailed, ApiServer
from arcbridge.errors import ConfigError, StateError, Unreachable
from arcbridge.pki.credentials import Snapshot, VersionConflict

DEADLINE = 15.0
MAX_ANSWER = 2 << 20
"""A Secret is at most 1 MiB."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


class SecretStore:
    """The Secret `namespace/name`. Both methods raise a StateError that says what to do, and Unreachable where the API
    server is away or too busy: it helps to wait."""

    def __init__(self, api: ApiServer, secret: str) -> None:
        """Raise ConfigError unless `secret` is `namespace/name`."""
        namespace, slash, name = secret.partition("/")
        if not slash or not _NAME.fullmatch(namespace) or not _NAME.fullmatch(name):
            raise ConfigError("state.secret: write namespace/name")
        self._api = api
        self._where = secret
        self._namespace = namespace
        self._name = name
        self._collection = f"/api/v1/namespaces/{namespace}/secrets"
        self._path = f"{self._collection}/{name}"

    async def load(self) -> Snapshot | None:
        """Answer what the Secret holds; None when there is no Secret."""
        document = await self._get()
        return None if document is None else self._snapshot(document)

    async def save(self, update: Mapping[str, bytes], *, expect_version: str | None) -> str:
        """Set the entries of `update`, leave the others, and answer the new version. Raises VersionConflict."""
        fresh = {name: base64.b64encode(value).decode() for name, value in update.items()}
        if expect_version is None:
            metadata = {"name": self._name, "namespace": self._namespace}
            document: dict[str, Any] = {
                "apiVersion": "v1",
                "kind": "Secret",
                "type": "Opaque",
                "metadata": metadata,
                "data": fresh,
            }
            status, answer = await self._request("POST", self._collection, document)
        else:
            current = await self._get()
            if current is None or self._snapshot(current).version != expect_version:
                raise VersionConflict(f"the Secret {self._where} was written by another pod in the meantime")
            # The resourceVersion that was read goes with it: the API server refuses if another pod was faster.
            document = {**current, "data": {**(current.get("data") or {}), **fresh}}
            status, answer = await self._request("PUT", self._path, document)
        if status == 409:
            raise VersionConflict(f"the Secret {self._where} was written by another pod in the meantime")
        if status not in (200, 201):
            raise self._refused("written", status)
        return self._snapshot(answer).version

    async def _get(self) -> dict[str, Any] | None:
        status, document = await self._request("GET", self._path, None)
        if status == 404:
            return None
        if status != 200:
            raise self._refused("read", status)
        return document

    def _snapshot(self, document: dict[str, Any]) -> Snapshot:
        try:
            version = document["metadata"]["resourceVersion"]
            data = document.get("data") or {}
            entries = {str(name): base64.b64decode(value, validate=True) for name, value in data.items()}
        except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
            raise StateError(f"the Secret {self._where} is not readable as one") from error
        return Snapshot(entries, str(version))

    def _refused(self, what: str, status: int) -> StateError | Unreachable:
        if status == 429 or status >= 500:
            return Unreachable(f"the Secret {self._where} cannot be {what}: the API server answered {status}")
        hint = "the agent's Role must allow get and update on it" if status in (401, 403) else "see its log"
        return StateError(f"the Secret {self._where} cannot be {what}: the API server answered {status}; {hint}")

    async def _request(self, method: str, path: str, document: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        try:
            async with asyncio.timeout(DEADLINE):
                status, answer = await self._api.ask(method, path, document, most=MAX_ANSWER)
        except (AnswerFailed, TimeoutError) as error:
            # Never the answer itself: it holds keys, and no AnswerFailed quotes one.
            why = f"the API server did not answer within {DEADLINE:.0f} s" if isinstance(error, TimeoutError) else error
            raise Unreachable(f"the Secret {self._where} is not available: {why}") from None
        return status, answer if isinstance(answer, dict) else {}
