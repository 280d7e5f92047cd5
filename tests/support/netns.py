"""A small internet of network namespaces: client, relays and agent, each on a link of its own to a middle that routes.

    client ── middle ── relay0
    agent  ──┘      └── relay1 …

What is to be silent is dropped in the middle: a black hole at the sender would be an error there, not silence. All
names begin with `PREFIX` and the process id; they are removed at the end, and what a killed run left by the next run.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

from tests.support.fault_proxy import FaultProxy
from tests.support.stopping import Stopping

PREFIX = "arcbridge-test"
_CLONE_NEWNET = 0x40000000
_numbers = itertools.count()


def ip(*arguments: str, check: bool = True) -> str:
    """Run ip(8). Raises RuntimeError with what it said."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30, check=False)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@functools.cache
def missing() -> str:
    """What this machine lacks for a Network; empty when it has all. Everything is tried, in namespaces of its own."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    try:
        _remove_leftovers()
        with Network(relays=1) as network:
            network.blackhole("client", "relay0")
            network.heal()
            with network.inside("client"):
                socket.socket().close()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"network namespaces do not work here: {error}"
    return ""


class Network(Stopping):
    """The namespaces. Use as a context manager; whatever runs in them must have ended before."""

    def __init__(self, relays: int = 2) -> None:
        self._mark = f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
        self.places = ["client", "agent", *(f"relay{index}" for index in range(relays))]
        self._hosts = {place: 2 for place in self.places}
        self._rules: list[list[str]] = []
        self._bridges: list[FaultProxy] = []
        try:
            self._make()
        except BaseException:
            self.stop()
            raise

    def _make(self) -> None:
        for place in ("middle", *self.places):
            ip("netns", "add", self.name(place))
            ip("-n", self.name(place), "link", "set", "lo", "up")
        with self.inside("middle"), open("/proc/sys/net/ipv4/ip_forward", "w") as forward:
            forward.write("1")
        for place in self.places:
            inner, outer = self.name(place), self.name("middle")
            ip("-n", inner, "link", "add", "up0", "type", "veth", "peer", "name", place, "netns", outer)
            ip("-n", outer, "addr", "add", f"{self._net(place)}.1/24", "dev", place)
            ip("-n", outer, "link", "set", place, "up")
            self._configure(place)

    def _configure(self, place: str) -> None:
        """Address, link and way out of one place."""
        inner = self.name(place)
        ip("-n", inner, "addr", "replace", f"{self.address(place)}/24", "dev", "up0")
        ip("-n", inner, "link", "set", "up0", "up")
        ip("-n", inner, "route", "replace", "default", "via", f"{self._net(place)}.1")

    def _net(self, place: str) -> str:
        return f"10.213.{self.places.index(place) + 1}"

    # -- look -----------------------------------------------------------------------------------------------------

    def name(self, place: str) -> str:
        """The namespace's name."""
        return f"{self._mark}-{place}"

    def address(self, place: str) -> str:
        """Its IP address now."""
        return f"{self._net(place)}.{self._hosts[place]}"

    def prefix(self, place: str) -> tuple[str, ...]:
        """What a command line begins with to run there."""
        return ("ip", "netns", "exec", self.name(place))

    @contextlib.contextmanager
    def inside(self, place: str) -> Iterator[None]:
        """Have this thread in the namespace: a socket made here belongs to it for good."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{self.name(place)}") as there:
            if libc.setns(there.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {place}")
            try:
                yield
            finally:
                if libc.setns(home.fileno(), _CLONE_NEWNET):
                    os._exit(70)  # in a foreign namespace every further test would go wrong

    def socket(self, place: str) -> socket.socket:
        """A TCP socket of that namespace."""
        with self.inside(place):
            return socket.socket()

    def bridge(self, port: int, *, into: str = "", out_of: str = "") -> None:
        """Make 127.0.0.1:port of one namespace reachable under the same name in another; empty: the test's own."""

        def make(place: str) -> socket.socket:
            return self.socket(place) if place else socket.socket()

        self._bridges.append(
            FaultProxy(
                ("127.0.0.1", port),
                listen=("127.0.0.1", port),
                make_near=lambda: make(into),
                make_far=lambda: make(out_of),
            )
        )

    # -- break ----------------------------------------------------------------------------------------------------

    def blackhole(self, source: str, destination: str) -> None:
        """Drop without a word what goes from one place to another; the other direction stays."""
        rule = ["iif", source, "to", f"{self.address(destination)}/32", "blackhole"]
        ip("-n", self.name("middle"), "rule", "add", "pref", "100", *rule)
        self._rules.append(rule)

    def heal(self) -> None:
        """No black holes any more."""
        while self._rules:
            ip("-n", self.name("middle"), "rule", "del", "pref", "100", *self._rules.pop())

    def unplug(self, place: str) -> None:
        """Its link is down."""
        ip("-n", self.name(place), "link", "set", "up0", "down")

    def plug(self, place: str) -> None:
        """Its link is up, as it was."""
        self._configure(place)

    def move(self, place: str) -> None:
        """Another address: what it had is gone, as when a laptop changes networks."""
        inner = self.name(place)
        ip("-n", inner, "addr", "flush", "dev", "up0")
        self._hosts[place] += 1
        self._configure(place)

    # -- end ------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Remove all of it; what was not there yet is not missed."""
        for bridge in self._bridges:
            bridge.stop()
        self._bridges.clear()
        for place in ("middle", *self.places):
            ip("netns", "del", self.name(place), check=False)


def _remove_leftovers() -> None:
    """Namespaces of test runs that were killed."""
    for line in ip("netns", "list").splitlines():
        name = line.split()[0]
        if name.startswith(f"{PREFIX}-"):
            pid = name.removeprefix(f"{PREFIX}-").partition("-")[0]
            if pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
                ip("netns", "del", name, check=False)
