"""Tells an API server's refusal of the agent itself from one of the caller, and says so in the agent's words.

Requests that run as a caller carry the agent's own credential and impersonate. A 401 to one of them is about that
credential, whoever the caller is. A 403 is about the agent where its Status says that the *agent's* user may not
`impersonate`; every other 403 is the caller's and passes unchanged. Both kinds become 502: the caller can do nothing
about them, and a 401 would send the caller to log in again. This module reads a body and answers; it holds and sends
nothing.

Source: `forbiddenMessage` of k8s.io/apiserver, endpoints/handlers/responsewriters/errors.go, and the verbs of
endpoints/filters/impersonation/mode.go. A verb `impersonate-on:…` is left out on purpose: an operator who lists verbs
wants the API server to refuse the others, and its words say which.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from arcbridge.agent.kube.status import RequestRefusal

MOST: Final = 16 * 1024
"""Bytes of a 403's answer that are held back until its reason is known; a Status is a tenth of that."""
KINDS: Final = ("credential", "impersonation")
"""What the API server can refuse of the agent, for the metrics."""
DOCTOR: Final = "its log, its metrics and `arcbridge --role agent doctor` say what is wrong"

# In JSON the quotes are escaped; a Status in protobuf, which controllers ask for, has them as they are.
_IMPERSONATE: Final = re.compile(
    rb'User \\?"([^"\\]{1,512})\\?" cannot impersonate(?::[a-z-]{1,32})? resource \\?"([a-z/.-]{1,128})\\?"'
)


class OwnRefusals:
    """Counts what the API server refuses of the agent. `noticed` is called at each of them, with its kind."""

    __slots__ = ("counts", "noticed", "user")

    def __init__(self) -> None:
        self.counts = dict.fromkeys(KINDS, 0)
        self.user = ""
        """The agent's own user name, as the API server has said it; empty until it is known."""
        self.noticed: Callable[[str], None] = lambda kind: None

    def credential(self) -> RequestRefusal:
        """Count a 401, and return what the caller is told in its place."""
        self._count("credential")
        return RequestRefusal(
            502,
            "the API server refuses the credential of this cluster's agent; this is not about your login: tell the "
            f"cluster's operator (of the agent, {DOCTOR})",
        )

    def forbidden(self, body: bytes | bytearray) -> RequestRefusal | None:
        """Return what the caller is told in place of a 403 with this body; None where it is the caller's own."""
        found = _IMPERSONATE.search(body)
        if found is None:
            return None
        user, resource = (part.decode("ascii", "replace") for part in found.groups())
        if self.user and user != self.user:
            return None
        self._count("impersonation")
        return RequestRefusal(
            502,
            f"the agent of this cluster may not act as you: its account {user} lacks the right to impersonate your "
            f"{resource}; this is not about your own rights: tell the cluster's operator (of the agent, {DOCTOR})",
        )

    def _count(self, kind: str) -> None:
        self.counts[kind] += 1
        self.noticed(kind)
