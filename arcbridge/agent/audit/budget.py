"""Bounds the bytes of audit records that one user may cause, and counts what is left out because of it.

Without a bound one user fills the disk, or has a log of a fixed size thrown away, and with it what others did. It
writes nothing and refuses nothing: `AuditLog` leaves out records of what only read, and counts them here;
`kube.attempt` refuses what must be recorded. Invariant: each record that was left out is counted until a record in
the chain has said so.
"""

from __future__ import annotations

from arcbridge.limiters import TokenBucket

BURST = 16
"""Seconds for which a user may write at the full rate at once: 1000 requests after a pause leave 1 MiB."""
SEALED = 128
"""Bytes that the chain adds to each line."""
PORTION = 16 * 1024
"""Bytes that are taken from the bucket at once: few records ask it, and the others cost a subtraction."""


class AuditBudget:
    """The bytes of records of one user, over all sessions."""

    __slots__ = ("_allowed", "_bucket", "bytes_left_out", "records_left_out", "user")

    def __init__(self, user: str) -> None:
        self.user = user
        """As records have it."""
        self._bucket: TokenBucket | None = None
        self._allowed = 0
        """Bytes that were taken from the bucket and are not written yet."""
        self.records_left_out = 0
        """Records that were left out and that no record counts yet."""
        self.bytes_left_out = 0
        """Bytes of those."""

    def change(self, now: float, rate: int) -> None:
        """Allow `rate` bytes a second from now on, 0 for any number; what was spent stays spent."""
        if not rate:
            self._bucket = None
        elif self._bucket is None:
            self._bucket = TokenBucket(BURST * rate, rate)
        else:
            self._bucket.change(now, BURST * rate, rate)

    def is_spent(self, now: float) -> bool:
        """Return whether the user has written more than may be: nothing that has to be recorded may begin."""
        return self._bucket is not None and not self._allowed and self._bucket.wait(now) > 0.0

    def charge(self, line: str, now: float) -> None:
        """Count a record that is written in any case."""
        if not self.admit(line, now) and self._bucket is not None:
            self._bucket.take(now, _size(line) - self._allowed)
            self._allowed = 0

    def admit(self, line: str, now: float) -> bool:
        """Count a record if there is room for it, and return whether there is."""
        left = self._allowed - SEALED - len(line)
        if left >= 0 and line.isascii():
            self._allowed = left
            return True
        return self._admit(_size(line), now)

    def _admit(self, size: int, now: float) -> bool:
        bucket = self._bucket
        if bucket is None:
            return True
        if size <= self._allowed:
            self._allowed -= size
            return True
        missing = size - self._allowed
        for portion in (max(PORTION, missing), missing):
            if bucket.reserve(now, count=portion) is not None:
                self._allowed += portion - size
                return True
        return False

    def leave_out(self, line: str) -> None:
        """Count a record that is not written."""
        self.records_left_out += 1
        self.bytes_left_out += _size(line)

    def take_left_out(self) -> tuple[int, int]:
        """Return how many records were left out, and their bytes, and forget them: a record says it."""
        found = self.records_left_out, self.bytes_left_out
        self.records_left_out = self.bytes_left_out = 0
        return found


def _size(line: str) -> int:
    return SEALED + (len(line) if line.isascii() else len(line.encode("utf-8", "replace")))
