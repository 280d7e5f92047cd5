"""A real tool server for AI agents: kubernetes-mcp-server, and as much of the protocol as a test speaks.

The program comes from npm, once, and is kept in the tests' cache. Source of the protocol: Model Context Protocol,
transport "stdio": one JSON-RPC message a line.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.cluster import Unavailable
from tests.support.npm import npm_file

VERSION = "0.0.67"
SHA256 = "2093c97977159b477bbdf946977cd00905867146f83e5a84d183cfdca06cabcb"
PACKAGE = "kubernetes-mcp-server-linux-amd64"


@functools.cache
def program() -> Path:
    """Return the program. Raises Unavailable."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Unavailable("kubernetes-mcp-server is taken for Linux on x86_64 alone")
    found = npm_file(f"mcp-{VERSION}-{SHA256[:16]}", f"{PACKAGE}@{VERSION}", SHA256, f"bin/{PACKAGE}")
    found.chmod(0o755)
    return found


class McpServer:
    """A server that a command line starts; use as a context manager."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._number = 0

    def __enter__(self) -> Self:
        self.ask("initialize", protocolVersion="2025-06-18", capabilities={}, clientInfo={"name": "t", "version": "1"})
        self._send({"jsonrpc": "2.0", "method": "notifications/initialized"})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.wait()

    def tools(self) -> set[str]:
        """Return the names of the tools that the server has."""
        return {tool["name"] for tool in self.ask("tools/list")["tools"]}

    def call(self, tool: str, **arguments: object) -> tuple[bool, str]:
        """Call a tool; return whether it failed, and its text."""
        found = self.ask("tools/call", name=tool, arguments=arguments)
        return bool(found.get("isError")), "\n".join(part.get("text", "") for part in found["content"])

    def ask(self, method: str, **parameters: object) -> dict[str, Any]:
        """Send a request and return its result; what the server sends unasked is passed over."""
        self._number += 1
        self._send({"jsonrpc": "2.0", "id": self._number, "method": method, "params": parameters})
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message: dict[str, Any] = json.loads(line)
            if message.get("id") == self._number:
                assert "error" not in message, message["error"]
                result: dict[str, Any] = message["result"]
                return result
        raise AssertionError(f"the server has ended with {self._process.wait(20)}")

    def _send(self, message: Mapping[str, object]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()


def main(binary: str, namespace: str, pod: str) -> None:
    """Do what an AI client does whose model looks at a namespace and wants a pod gone."""
    leases = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
    calls = (("pods_list_in_namespace", {}), ("resources_list", leases), ("pods_delete", {"name": pod}))
    with McpServer([binary], os.environ) as server:
        for tool, arguments in calls:
            failed, text = server.call(tool, namespace=namespace, **arguments)
            print(f"{tool}{' failed' if failed else ''}: {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
