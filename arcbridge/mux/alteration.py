"""Tells an altered connection from a lost one: what TLS could not accept is not what the other end sent.

TCP and the ends themselves bring bytes whole, in order and once, so a record that fails its check, a message that may
not come at this point, or a name that was not chosen here is the work of a party between the ends: it has changed, left
out, repeated or added something. This module looks at the error of a TLS library and at nothing else. Ends without
close_notify, certificates that are not trusted, and the other end's own refusals are no alterations.
"""

from __future__ import annotations

import ssl
from typing import Final

from arcbridge.errors import BytesAltered

_ALERTS: Final = frozenset(
    {"BAD_RECORD_MAC", "DECRYPT_ERROR", "DECODE_ERROR", "UNEXPECTED_MESSAGE", "ILLEGAL_PARAMETER"}
)
"""Alerts with which the other end says that it got something else than this end sent (RFC 8446 §6.2)."""
_ENDS: Final = frozenset({"UNEXPECTED_EOF_WHILE_READING", "APPLICATION_DATA_AFTER_CLOSE_NOTIFY"})


def alteration(error: BaseException | None) -> BytesAltered | None:
    """Return what to report in place of the error of an end-to-end TLS connection; None: nothing was altered."""
    if not isinstance(error, ssl.SSLError) or isinstance(
        error, ssl.SSLCertVerificationError | ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError
    ):
        return None
    reason = getattr(error, "reason", None) or ""  # of an error that no library made there is none
    kind, _, alert = reason.partition("_ALERT_")
    if not reason or reason in _ENDS or (alert and alert not in _ALERTS):
        return None
    found = BytesAltered(
        f"bytes were altered on the way between client and agent, which TLS found out ({alert or kind}); if it happens "
        "again, another party is in between: tell the relay's operator"
    )
    found.__cause__ = error
    return found
