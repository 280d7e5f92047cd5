"""Tells an API server's refusal of the agent itself from one of the caller, and says so in the agent's words.

Requests that run as a caller carry the agent's own credential and impersonate. A 401 to one of them is about that
credential, for every caller alike. A 403 is about the agent where its Status says that the *agent's* user may not
`impersonate`; every other 403 is the caller's and passes unchanged. Both kinds become 502: the caller can do nothing
about them, and a 401 would send the caller to log in again. This module reads a body and answers; it holds and sends
nothing. Invariant: what a caller chose, a name or a resource of any form, turns no 403 of the caller into one of the
agent (docs/threats.md#H41).

Source: `forbiddenMessage` of k8s.io/apiserver, endpoints/handlers/responsewriters/errors.go, and the verbs of
endpoints/filters/impersonation/mode.go. From 1.36 on an API server that finds no right names the first of the
constrained verbs that it looked for (`impersonate-on:user-info:list`), as it does for a verb that an operator has left
out on purpose; the two are distinguished by the agent's own rules (`agent.self_checks`), which say what is missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.observe.untrusted_text import clean
from arcbridge.refusals import Refusal, RefusalRule
from arcbridge.untrusted_json import read_json

MOST: Final = 16 * 1024
"""Bytes of a 403's answer that are held back until its reason is known; a Status is a tenth of that."""
KINDS: Final = ("credential", "impersonation", "verb")
"""What the API server can refuse of the agent, for the metrics."""
OF_OTHERS: Final = frozenset(("proxy",))
"""Subresources whose answers are those of a pod, a Service or a node behind the API server: their 401 and 403 pass."""

_FORBIDDEN: Final = re.compile(
    rb'(?:[a-z0-9./-]{1,512}+ (?:"(?:[^"\\]|\\.)*+" )?is )?forbidden: User "([^"\\]{1,512})" '
    rb'cannot (impersonate(-on)?(?::[a-z*-]{1,40}){0,2}) (?:resource "([a-z/.-]{1,128})|path )'
)
"""The message from its beginning, where a name is quoted (Go's `%q`), so that no quote in it ends it. A resource and a
group stand there as they came, and could hold the whole sentence; the API server's own `is forbidden` follows then."""
_API_SERVERS: Final = b"is forbidden: "
_CHUNK: Final = re.compile(rb"\r\n[0-9A-Fa-f]{1,16}\r\n")
"""What stands before and between the chunks of a body."""
_PROTOBUF: Final = re.compile(rb"\x12\x07Failure\x1a([\x80-\xff]{0,2}[\x00-\x7f])")
"""What stands before the message of a Status in protobuf, with the message's length: nothing before it is chosen by a
caller."""
SENTENCE: Final = 400
"""Bytes of the API server's sentence that are repeated."""


class OwnRefusals:
    """Counts what the API server refuses of the agent. `noticed` is called at each of them, with the
    name of the self-check that it is about."""

    __slots__ = ("counts", "lacking", "legacy", "noticed", "sentence", "user")

    def __init__(self) -> None:
        self.counts = dict.fromkeys(KINDS, 0)
        self.user = ""
        """The agent's own user name, as the API server has sent it; empty until it is known."""
        self.legacy = False
        """Whether the agent's rules have no right of constrained impersonation, as far as that is known."""
        self.lacking: tuple[str, str] | None = None
        """The first right that the agent lacks and needs for every caller, as far as is known: its resource, and what
        the API server says of it."""
        self.sentence = ""
        """What the API server said the last time, of the agent's right to impersonate; of an agent of the older mode
        what its own rules say."""
        self.noticed: Callable[[str], None] = lambda kind: None

    def credential(self) -> RequestRefusal:
        """Count a 401, and return the answer in its place."""
        self._count("credential")
        return RequestRefusal(
            502,
            "the API server refuses the credential of this cluster's agent; this is not about your login: tell the "
            "cluster's operator",
            refusal=Refusal(RefusalRule.AGENT_CREDENTIAL),
        )

    def forbidden(self, answer: bytes | bytearray) -> RequestRefusal | None:
        """Return the answer in place of a 403, which is given with its head and as it is framed; None where it is the
        caller's own."""
        message = _message(answer)
        found = _FORBIDDEN.match(message)
        if found is None or _API_SERVERS in message[found.end() :]:
            return None
        user, verb, on, resource = ((part or b"").decode("ascii", "replace") for part in found.groups())
        if self.user and user != self.user:
            return None
        source, said = "The API server", clean(message[: SENTENCE * 4].decode("utf-8", "replace"), SENTENCE)
        if self.legacy and ":" in verb:
            # It names the first right that it looked for, one of the mode that the agent's rules do not use.
            on, verb, source = "", "impersonate", "By the agent's rules"
            resource, said = self.lacking or (
                "users",
                f'User "{user}" cannot impersonate you: no rule names your user, or a group of yours, or gives your '
                "uid or an extra key of yours",
            )
        self.sentence = said
        self._count("verb" if on else "impersonation")
        return RequestRefusal(
            502,
            f'the agent of this cluster may not act as you: its account {user} lacks the right "{verb}" for '
            f"{resource or 'this path'}; tell the cluster's operator, and see `arcbridge doctor`",
            refusal=Refusal(RefusalRule.AGENT_IMPERSONATION),
            more=f"{source}: {said}",
        )

    def _count(self, kind: str) -> None:
        self.counts[kind] += 1
        self.noticed("credential" if kind == "credential" else "impersonation")


def _message(answer: bytes | bytearray) -> bytes:
    """Return the message of the Status that an answer has, in JSON or protobuf; empty where it has none."""
    body = _CHUNK.sub(b"", b"\r\n" + answer.partition(b"\r\n\r\n")[2])
    if found := _PROTOBUF.search(body):
        size = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(found[1]))
        return body[found.end() : found.end() + size]
    try:
        status = read_json(body)
    except ValueError:
        return b""
    message = status.get("message") if isinstance(status, dict) else None
    return message.encode("utf-8", "surrogatepass") if isinstance(message, str) else b""
