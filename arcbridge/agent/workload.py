"""Takes a draining pod out of its DaemonSet: gives it a label of its own that the DaemonSet's selector does not match.

A DaemonSet counts the oldest pod of each node until it is gone, so that a rollout would be over only after the longest
drain (docs/decisions/0037-rollouts.md). It does not decide when an agent drains, and it ends no pod: the kubelet does.
Invariant: one label of this pod is all that is ever written, and a refusal changes nothing of the drain.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping
from typing import Any, Final

import structlog

from arcbridge.agent.kube.apiserver import AnswerFailed, ApiServer
from arcbridge.errors import ConfigError
from arcbridge.net.backoff import Backoff
from arcbridge.observe.untrusted_text import clean

DEADLINE: Final = 15.0
"""Seconds for one answer of the API server."""
SLOWEST: Final = 10.0
"""Largest bound of the pause between two tries, in seconds; they go on for as long as the drain."""

_NAME: Final = "[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL: Final = re.compile(rf"((?:[a-z0-9]([a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_NAME})=({_NAME})")

log = structlog.get_logger("arcbridge.agent")


def parse_label(text: str) -> tuple[str, str]:
    """Split `key=value`, as Kubernetes writes labels. Raises ConfigError."""
    match = _LABEL.fullmatch(text)
    if match is None:
        raise ConfigError(
            "kubernetes.drain_label: write key=value as Kubernetes has labels, such as "
            "app.kubernetes.io/instance=arcbridge-draining"
        )
    key, _, value = text.partition("=")
    return key, value


def pod_name(environ: Mapping[str, str] | None = None) -> str:
    """Return the name of this pod, which the kubelet puts into the environment. Raises ConfigError."""
    name = (os.environ if environ is None else environ).get("POD_NAME")
    if not name:
        raise ConfigError(
            "kubernetes.drain_label: needs the pod's name in the environment variable POD_NAME "
            "(fieldRef: metadata.name); remove it where the agent is no pod"
        )
    return name


class PodOfWorkload:
    """This agent's pod, as its workload sees it."""

    def __init__(self, api: ApiServer, namespace: str, name: str, label: str) -> None:
        """`label` is what the pod gets when it leaves, as `key=value`. Raises ConfigError."""
        key, value = parse_label(label)
        self._api = api
        self._path = f"/api/v1/namespaces/{namespace}/pods/{name}"
        self._patch = {"metadata": {"labels": {key: value}}}
        self._label = label

    async def leave(self) -> None:
        """Label the pod, so that its workload counts it no more; return when the API server has done or refused it."""
        try:
            await self._leave()
        except Exception as error:
            # Nobody else looks at the end of this: the drain goes on without it.
            log.exception("pod stays in its workload", status=0, reason=type(error).__name__, label=self._label)

    async def _leave(self) -> None:
        backoff = Backoff(cap=SLOWEST)
        warned = False
        while True:
            status, answer = await self._ask()
            if status == 200:
                log.info("pod left its workload", label=self._label)
                return
            if status in (400, 403, 404, 422):
                log.warning("pod stays in its workload", status=status, reason=_reason(answer), label=self._label)
                return
            if not warned:
                # Once: each further failure would be the same line, for as long as the drain.
                log.warning("pod cannot leave yet", status=status, reason=_reason(answer), label=self._label)
                warned = True
            await asyncio.sleep(backoff.next_delay())

    async def _ask(self) -> tuple[int, Any]:
        """Return the status and what was answered; status 0 with a reason where there was no answer."""
        try:
            async with asyncio.timeout(DEADLINE):
                return await self._api.ask(
                    "PATCH", self._path, self._patch, content_type="application/merge-patch+json"
                )
        except AnswerFailed as error:
            return 0, {"message": error.message}
        except TimeoutError:
            return 0, {"message": f"the API server does not answer within {DEADLINE:g} seconds"}


def _reason(answer: Any) -> str:
    """Return the API server's own sentence, of which logs bound the length."""
    said = answer.get("message") if isinstance(answer, dict) else None
    return clean(said) if isinstance(said, str) else "the API server gives no reason"
