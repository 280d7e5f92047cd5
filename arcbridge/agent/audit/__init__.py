"""The audit log: what it records (`record`), how records are chained (`chain`), written (`writer`, `log`) and checked
(`verify`).

It knows nothing of HTTP and decides about no request but one thing: whether a request may go on while its record
cannot be written. Invariant: each line that leaves is one JSON object, sealed into the chain of its file.
"""

from arcbridge.agent.audit.log import AuditLog
from arcbridge.agent.audit.record import AuditRecord

__all__ = ["AuditLog", "AuditRecord"]
