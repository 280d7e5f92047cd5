"""Knows the pods behind a name: follows the thing that was named, and the pods that it selects, with the user's rights.

It chooses the pod of new connections, and stays with it for as long as new connections may go there; it opens none.
Invariants: only a pod that may serve is chosen (`Pod.usable`); of at most MAX_PODS pods anything is kept.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from arcbridge.client.serving.pod_ports.collection import Collection
from arcbridge.client.serving.pod_ports.target import PodTarget
from arcbridge.client.serving.pod_ports.workload import NoSuchPort, Pod, Workload
from arcbridge.client.session.session_manager import SessionManager
from arcbridge.errors import ArcbridgeError, PermissionRefused, Unreachable
from arcbridge.tasks import in_time

MAX_PODS = 1000
"""Pods behind one name that are kept; one is used at a time, and the others are its successors."""

START_TIMEOUT = 30.0
"""Seconds until the thing and its pods are known."""


class PodWatch:
    """The pods behind one target; `run` until cancelled, and `started` before anything is asked of it."""

    def __init__(self, sessions: SessionManager, target: PodTarget, changed: Callable[[], None]) -> None:
        """`changed` is called after each change of what is known."""
        self.target = target
        self.workload: Workload | None = None
        """The thing that was named; None while it does not exist."""
        self.pods: dict[str, Pod] = {}
        """By name."""
        self.chosen: Pod | None = None
        """The pod of new connections; None while there is none that may serve."""
        self.failure: ArcbridgeError | None = None
        """Why it does not know more; None while it does."""
        self._sessions = sessions
        self._changed = changed
        self._cut = False
        """Whether there are more pods than are known."""
        self._gone: deque[str] = deque(maxlen=MAX_PODS)
        """Uids of pods that were deleted last."""
        self._started = asyncio.Event()
        """Whether the start has succeeded, or failed with `_refusal`."""
        self._refusal: ArcbridgeError | None = None
        self._tasks = asyncio.TaskGroup()
        self._pods_task: asyncio.Task[None] | None = None

    @property
    def starting(self) -> bool:
        """Whether it is not known yet that the thing and its pods can be followed."""
        return not self._started.is_set()

    async def started(self) -> None:
        """Wait until the thing and its pods are known, at most START_TIMEOUT seconds. Raises ArcbridgeError."""
        if not await in_time(self._started.wait(), START_TIMEOUT):
            late = Unreachable(f"the API server has not listed {self.target} within {START_TIMEOUT:.0f} s")
            raise self.failure or late
        if self._refusal is not None:
            raise self._refusal

    async def run(self) -> None:
        """Follow until cancelled."""
        query = {"fieldSelector": f"metadata.name={self.target.name}"}
        named = Collection(
            self._sessions, self.target.collection, query, self._named, self._named_changed, self._failed, most=1
        )
        async with self._tasks:
            await named.run()

    def state(self) -> str:
        """Say why no pod may serve."""
        if self.failure is not None:
            return self.failure.message
        if self.workload is None:
            return f"there is no {self.target} in namespace {self.target.namespace}"
        count = f"{len(self.pods)} pods" if len(self.pods) != 1 else "1 pod"
        return f"{self.target} has {count}, and none is ready" if self.pods else f"{self.target} has no pods"

    # -- the thing that was named -----------------------------------------------------------------------------------

    def _named(self, objects: list[Any], _more: bool) -> None:
        if not objects:
            self.failure = None
            self._fail_start(ArcbridgeError(self.state()))
        self._take(objects[0] if objects else None)

    def _named_changed(self, kind: str, document: Any) -> None:
        self._take(None if kind == "DELETED" else document)

    def _take(self, document: Any) -> None:
        before, self.failure = self.workload, None
        try:
            self.workload = None if document is None else Workload.of(self.target, document)
        except NoSuchPort as error:
            self.workload, self.failure = None, error
            self._fail_start(error)
        now = self.workload
        if self.target.resource == "pods":
            self._listed([] if document is None else [Pod.of(document)], False)
        elif now is None or before is None or now.selector != before.selector:
            self._follow_pods(now.selector if now is not None else "")
        self._choose()

    def _follow_pods(self, selector: str) -> None:
        if self._pods_task is not None:
            self._pods_task.cancel()
            self._pods_task = None
        if not selector:
            self.pods.clear()
            return
        path, query = f"/api/v1/namespaces/{self.target.namespace}/pods", {"labelSelector": selector}
        pods = Collection(
            self._sessions, path, query, self._listed, self._pod_changed, self._failed, read=Pod.of, most=MAX_PODS
        )
        self._pods_task = self._tasks.create_task(pods.run())

    # -- its pods ---------------------------------------------------------------------------------------------------

    def _listed(self, pods: list[Pod], more: bool) -> None:
        self.pods = {pod.name: pod for pod in pods}
        self._cut = more
        self.failure = None
        self._choose()
        self._started.set()

    def _pod_changed(self, kind: str, pod: Pod) -> None:
        if kind == "DELETED":
            self.pods.pop(pod.name, None)
            self._gone.append(pod.uid)
        elif pod.name in self.pods or len(self.pods) < MAX_PODS:
            self.pods[pod.name] = pod
        self._choose()
        if self._cut and self.chosen is None:
            raise Unreachable("all pods that were listed are gone, and there are more")  # they are listed anew

    def _choose(self) -> None:
        """Stay with the pod, or take the one that is usable and was made last: it will be there for longest."""
        workload, current = self.workload, self.chosen
        usable = [pod for pod in self.pods.values() if workload is not None and pod.usable(unready=workload.unready)]
        stays = next((pod for pod in usable if current is not None and pod.uid == current.uid), None)
        self.chosen = stays or max(usable, key=lambda pod: (pod.created, pod.name), default=None)
        self._changed()

    def alive(self, pod: Pod) -> bool:
        """Return whether a pod that had connections still exists and runs."""
        known = self.pods.get(pod.name)
        if known is None:
            return self._cut and pod.uid not in self._gone
        return known.uid == pod.uid and not known.over

    # -- failures ---------------------------------------------------------------------------------------------------

    def _failed(self, error: ArcbridgeError) -> None:
        self.failure = error
        if isinstance(error, PermissionRefused):
            self._fail_start(error)
        self._changed()

    def _fail_start(self, error: ArcbridgeError) -> None:
        if not self._started.is_set():
            self._refusal = error
            self._started.set()
