"""Honest users beside a herd: one join after the other at each of some relays, and how long each takes.

`python -m bench.herd.joins` reads its orders as one JSON line (`bench.herd.sessions.Orders`) whose ports are those of
its second line, a list; then it writes a JSON line for each join: when it began, the seconds it took, and why it was
refused (empty: it was not). Both ends are here. It ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from dataclasses import replace

from arcbridge.cli.loop import loop_factory
from arcbridge.errors import ArcbridgeError
from arcbridge.wire.records import JoinRequest
from bench.herd.sessions import Ends, orders_of

EVERY = 0.2
"""Seconds between two joins at one relay."""


class Joining(Ends):
    """The joins at one relay; the agent's ends close when the clients' have gone."""

    def _is_raw(self, sock: socket.socket, *, pings: bool) -> None:
        if pings:
            sock.close()
        else:
            super()._is_raw(sock, pings=False)

    async def join_again_and_again(self) -> None:
        orders = self.orders
        control = await self.come()
        request = JoinRequest(role="client", cluster=orders.cluster, token=orders.token, instance=self._instance)
        while not control.closed:
            began, refused = time.monotonic(), ""
            try:
                self._is_raw(await self._join(self._client, request), pings=True)
            except (ArcbridgeError, OSError) as error:
                refused = str(error) or type(error).__name__
            took = time.monotonic() - began
            print(json.dumps({"at": began, "s": round(took, 4), "refused": refused}), flush=True)
            await asyncio.sleep(max(EVERY - took, 0.0))


def main() -> None:
    orders, ports = orders_of(sys.stdin.readline()), json.loads(sys.stdin.readline())

    async def run() -> None:
        over = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        joins = [
            asyncio.ensure_future(Joining(replace(orders, port=port, net=orders.net + number)).join_again_and_again())
            for number, port in enumerate(ports)
        ]
        await asyncio.wait([over, *joins], return_when=asyncio.FIRST_COMPLETED)
        for join in joins:
            join.cancel()
        for error in await asyncio.gather(*joins, return_exceptions=True):
            if isinstance(error, Exception):
                raise error

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(run())


if __name__ == "__main__":
    main()
