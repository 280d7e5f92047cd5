"""The agent's records, of requests and sessions (`record`), within what one user may take of the log (`budget`, `log`).

It knows nothing of HTTP and decides about no request but one thing: whether a request may go on while its record
cannot be written. How records become a log is `arcbridge.audit`'s.
"""

from arcbridge.agent.audit.log import AuditLog
from arcbridge.agent.audit.record import AuditRecord

__all__ = ["AuditLog", "AuditRecord"]
