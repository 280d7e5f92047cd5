"""The pods behind a name where there are more than are kept, and where the watch fails."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from arcbridge.client.serving.pod_ports import pod_watch
from arcbridge.client.serving.pod_ports.pod_watch import PodWatch
from arcbridge.client.serving.pod_ports.target import parse_targets
from arcbridge.client.serving.pod_ports.workload import Pod
from arcbridge.errors import Unreachable
from arcbridge.tasks import cancel_and_wait, first_error
from tests.client.far_side import FarSide
from tests.client.serving.pod_ports.api import Api, ready
from tests.client.session.test_session_manager import make, running
from tests.support.eventually import until


async def test_d6_of_many_pods_some_are_kept_and_others_follow(
    far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_watch, "MAX_PODS", 3)
    api = Api()
    far.protocol = api.protocol
    for number in range(1, 7):
        api.put("pods", ready(f"web-{number}"))
    async with running(make(far, tmp_path)) as session:
        watch = PodWatch(session, parse_targets(["svc/web", "80"], "shop")[0], lambda: None)
        task = asyncio.create_task(watch.run())
        async with asyncio.timeout(20):
            await watch.started()
        assert (sorted(watch.pods), watch.chosen and watch.chosen.name) == (["web-1", "web-2", "web-3"], "web-3")
        assert watch.alive(Pod.of(ready("web-6"))), "of a pod that is not kept nothing is known"
        await until(lambda: len(api.watches) == 2)
        api.remove("pods", "web-1")
        await until(lambda: "web-1" not in watch.pods)
        assert not watch.alive(Pod.of(ready("web-1"))), "a pod that was deleted is known to be gone"
        for number in (2, 3):
            api.remove("pods", f"web-{number}")
        await until(lambda: watch.chosen is not None and watch.chosen.name == "web-6", 30)
        await cancel_and_wait(task)


async def test_a_watch_that_fails_leaves_what_is_known(far: FarSide, tmp_path: Path) -> None:
    api = Api()
    far.protocol = api.protocol
    api.put("pods", ready("web-1"))
    async with running(make(far, tmp_path)) as session:
        watch = PodWatch(session, parse_targets(["svc/web", "80"], "shop")[0], lambda: None)
        task = asyncio.create_task(watch.run())
        async with asyncio.timeout(20):
            await watch.started()
        await until(lambda: len(api.watches) == 2)
        api.refusals["/pods"] = (500, "etcd is away")
        api.end_watches()
        await until(lambda: watch.failure is not None, 30)
        assert watch.state() == "etcd is away"
        assert watch.chosen is not None
        api.refusals.clear()
        api.put("pods", ready("web-2"))
        await until(lambda: "web-2" in watch.pods, 30)
        assert watch.failure is None
        await cancel_and_wait(task)


async def test_a_start_that_fails_has_an_end_and_its_reason(
    far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_watch, "START_TIMEOUT", 1.0)
    api = Api()
    api.refusals["/pods"] = (429, "too many requests")
    far.protocol = api.protocol
    async with running(make(far, tmp_path)) as session:
        watch = PodWatch(session, parse_targets(["svc/web", "80"], "shop")[0], lambda: None)
        silent = PodWatch(session, parse_targets(["svc/web", "80"], "shop")[0], lambda: None)
        task = asyncio.create_task(watch.run())
        with pytest.raises(Unreachable, match="too many requests"):
            await watch.started()
        with pytest.raises(Unreachable, match="has not listed svc/web within 1 s"):
            await silent.started()
        await cancel_and_wait(task)


async def test_what_was_not_foreseen_ends_it(far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pods that are followed no more would be served for ever."""

    def fails(document: object) -> Pod:
        raise OverflowError

    monkeypatch.setattr(Pod, "of", fails)
    api = Api()
    api.put("pods", ready("web-1"))
    far.protocol = api.protocol
    async with running(make(far, tmp_path)) as session:
        watch = PodWatch(session, parse_targets(["svc/web", "80"], "shop")[0], lambda: None)
        with pytest.raises(ExceptionGroup) as raised:
            await asyncio.wait_for(watch.run(), 20)
        assert isinstance(first_error(raised.value), OverflowError)
