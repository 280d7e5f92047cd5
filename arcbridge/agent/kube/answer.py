"""What of the API server's answer is passed on: its headers without framing, if its framing leaves no doubt (H9)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from multidict import CIMultiDict

from arcbridge.agent.kube.impersonation import HOP_BY_HOP, connection_tokens
from arcbridge.agent.kube.status import Refusal

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


def answer_headers(
    method: str, status: int, inbound: Sequence[tuple[bytes, bytes]], *, framed: bool = True
) -> CIMultiDict[str]:
    """Answers the headers for the caller, repeats in their order. Raises Refusal 502.

    With `framed` the end of the body must be certain: one Content-Length or `chunked`, not both, not neither. An answer
    that ends with its connection cannot be told from one that was cut.
    """
    named = connection_tokens(inbound)
    lengths = [value for name, value in inbound if name.lower() == b"content-length"]
    encodings = [value.lower() for name, value in inbound if name.lower() == b"transfer-encoding"]
    if status < 200:
        raise _garbled("it switched protocols unasked")
    if len(lengths) > 1 or (lengths and encodings) or (lengths and not re.fullmatch(rb"[0-9]{1,18}", lengths[0])):
        raise _garbled("its length is ambiguous")
    bodiless = method == "HEAD" or status in (204, 304)
    if framed and not bodiless and not lengths and encodings != [b"chunked"]:
        raise _garbled("its body has no certain end")
    out: CIMultiDict[str] = CIMultiDict()
    for raw_name, raw_value in inbound:
        name, value = raw_name.decode("ascii", "replace"), raw_value.decode("utf-8", "replace")
        lower = name.lower()
        if lower in HOP_BY_HOP or lower in named or lower.startswith("proxy-"):
            continue
        if _CONTROL.search(value) or _CONTROL.search(name):
            raise _garbled("a header contains control characters")
        out.add(name, value)
    if "Server" not in out:
        out["Server"] = "arcbridge"  # aiohttp would name itself and its version
    return out


def _garbled(what: str) -> Refusal:
    return Refusal(502, f"the API server's answer cannot be passed on: {what}")
