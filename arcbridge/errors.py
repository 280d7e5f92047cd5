"""Every error that crosses a module boundary, a leaf that all may import.

Two rules. An error names what happened *and* what to do, in one sentence that a person at kubectl or at a
command line can act on; and it never carries a secret, nor bytes that a peer sent. The parser's or the
library's own exception is chained as `__cause__` and stays in our log.
"""

from __future__ import annotations

from enum import IntEnum

from arcbridge.refusals import NO_REFUSAL, Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing is slow to import, and kubectl waits for what imports this
    from typing import Self


class ExitCode(IntEnum):
    """Exit codes of the executable, kept stable for scripts."""

    DONE = 0
    FAILURE = 1
    USAGE = 2
    LOGIN = 3
    UNREACHABLE = 4
    DENIED = 5
    RUN_FAILED = 125
    """`run` itself failed, and not its command: 125 to 127 are what env(1) and `docker run` have for that."""
    CANNOT_RUN = 126
    NOT_FOUND = 127
    INTERRUPTED = 130


EXIT_CODES: dict[ExitCode, tuple[str, str]] = {
    ExitCode.DONE: ("done", ""),
    ExitCode.FAILURE: (
        "it failed: a file of this machine, a pin that does not match, a question that was answered with no",
        "read the error",
    ),
    ExitCode.USAGE: (
        "the command line or the settings are wrong; nothing was begun",
        "correct what the error names; `--help`, `config check`",
    ),
    ExitCode.LOGIN: ("not logged in: the login is missing, has ended or is refused", "`arcbridge login`"),
    ExitCode.UNREACHABLE: (
        "issuer, relay, agent, cluster or background process is out of reach or at a limit",
        "`arcbridge doctor` says which",
    ),
    ExitCode.DENIED: ("not allowed: the login is taken, and may not do this", "ask the operator for access"),
    ExitCode.RUN_FAILED: ("`run` failed before its command, or beside it", "read the line that begins with `error:`"),
    ExitCode.CANNOT_RUN: ("the command of `run` is there and cannot be run", "look at its mode"),
    ExitCode.NOT_FOUND: ("the command of `run` is not there", "name a command that is in `PATH`"),
    ExitCode.INTERRUPTED: ("broken off by a signal before it served, or while it asked", ""),
}
"""The exit codes of all commands: what each means, and what to do. docs/broken.md has the same table."""


class ArcbridgeError(Exception):
    """Base of all errors that are meant to be read by people.

    `exit_code` is what the executable ends with when the error is not handled; `status_code` and `reason` are
    the HTTP code and the `metav1.Status` reason where the error is answered to a Kubernetes client.
    `retry_after` is in seconds and is set only where the request surely never left this process. `session` is the id
    of the session that was refused, ended or cut, as the logs of all roles have it; empty where there was none.
    `refusal` is why an end refused, as it tells the other one; `detail` is what its own log has beside that.
    """

    exit_code: ExitCode = ExitCode.FAILURE
    status_code: int = 500
    reason: str = "InternalError"
    session: str = ""
    refusal: Refusal = NO_REFUSAL
    detail: str = ""

    def __init__(self, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after

    def log_fields(self) -> dict[str, str]:
        """Return what a log has beside the message, which the peer reads too: the rule, and our own words."""
        return {name: text for name, text in (("rule", self.refusal.rule.value), ("detail", self.detail)) if text}

    def copy(self) -> Self:
        """Return an equal error without traceback and cause, for an error that is kept and raised for several callers.

        Each raise of one instance would add the frames of its caller to that instance's traceback, and so keep alive
        all that those frames hold, such as requests and tokens, for as long as the error is kept.
        """
        other = type(self).__new__(type(self), *self.args)
        other.__dict__.update(self.__dict__)
        return other

    def told(self) -> str:
        """Return the message, with the session's id behind it."""
        return f"{self.message} (session {self.session})" if self.session else self.message


class ConfigError(ArcbridgeError):
    """A setting is unknown, malformed or contradicts another; the message holds its path and file."""

    exit_code = ExitCode.USAGE


class NotInThisJob(ConfigError):
    """`setting` is for a job or a pod of a platform, and this process runs in none; elsewhere it may be right."""

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(f"{setting}: {message}")
        self.setting = setting


class StateError(ArcbridgeError):
    """Something kept on disk (credential, CA, kubeconfig, database) is missing, unreadable or not ours."""


class SealingError(ArcbridgeError):
    """A sealed file, or a key for one, is not what it should be: another format, another key, damaged, changed."""


class Truncated(SealingError):
    """A sealed file breaks off; what was read of it until then is as it was sealed."""


class LocalProtocolError(ArcbridgeError):
    """The caller used a protocol object against its contract; nothing was changed or sent."""


class RemoteProtocolError(ArcbridgeError):
    """The peer broke the protocol; the connection is over."""


class _Unavailable(ArcbridgeError):
    """Base of what may work a moment later, or elsewhere."""

    exit_code = ExitCode.UNREACHABLE
    status_code = 503
    reason = "ServiceUnavailable"


class ConnectionLost(_Unavailable):
    """The connection under a session died: closed by the network, by the peer, or found silent."""


class DishonestPath(ConnectionLost):
    """A connection did not work because of something that no honest relay, and no network by itself, does."""


class BytesAltered(DishonestPath):
    """Bytes of a connection were changed, left out, repeated or added on the way; TLS did not take them."""


class WrongAgent(DishonestPath):
    """The relay brought another agent than the one that was asked for and has the session."""


class StreamReset(ArcbridgeError):
    """The stream was reset, by the peer or by us; `code` is a `wire.frames.ResetCode`."""

    status_code = 502
    reason = "BadGateway"

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(message or f"the stream was reset (code {code})")
        self.code = code


class SessionEnded(_Unavailable):
    """The session is over; `code` is a `wire.frames.GoawayCode`."""

    def __init__(
        self, code: int, message: str, *, retry_after: int | None = None, refusal: Refusal = NO_REFUSAL
    ) -> None:
        super().__init__(message, retry_after=retry_after)
        self.code = code
        self.refusal = refusal


class Unauthenticated(ArcbridgeError):
    """A token is missing, expired, malformed, or not for this audience. The message tells a class, never claims."""

    exit_code = ExitCode.LOGIN
    status_code = 401
    reason = "Unauthorized"


class PermissionRefused(ArcbridgeError):
    """The caller is known and the policy says no."""

    exit_code = ExitCode.DENIED
    status_code = 403
    reason = "Forbidden"


class OverLimit(ArcbridgeError):
    """The caller has, or does, as much as one user may; the message says of what, and what to do."""

    exit_code = ExitCode.UNREACHABLE
    status_code = 429
    reason = "TooManyRequests"


class PinMismatch(ArcbridgeError):
    """A CA is not the one that was trusted; the message names both pins."""

    exit_code = ExitCode.FAILURE
    status_code = 502
    reason = "BadGateway"


class Unreachable(_Unavailable):
    """No relay answers, or no agent is connected for the cluster."""


class UntrustedCertificate(Unreachable):
    """A server answers, and its certificate is not of the CA that the settings name for it."""


class WrongDocument(Unreachable):
    """A server answers, and what it serves is not what the settings say of it."""


class JoinRefused(_Unavailable):
    """The relay refused a join; `code` is a `net.join.JoinCode` and says which step failed."""

    def __init__(
        self,
        code: int,
        message: str,
        *,
        retry_after: int | None = None,
        session: str = "",
        refusal: Refusal = NO_REFUSAL,
    ) -> None:
        super().__init__(message, retry_after=retry_after)
        self.code = code
        self.refusal = refusal
        self.session = session
        """The join's id, by which the relay's log has it; empty where the relay gave none."""


class EnrolmentRefused(ArcbridgeError):
    """The relay refused to enrol or to renew: the join token or the certificate request is not acceptable."""

    exit_code = ExitCode.LOGIN
    status_code = 403
    reason = "Forbidden"


class CommandNotFound(ArcbridgeError):
    """The program that `run` should start does not exist, or is no program."""

    exit_code = ExitCode.NOT_FOUND

    def __init__(self, message: str, *, exists: bool = False) -> None:
        super().__init__(message)
        if exists:
            self.exit_code = ExitCode.CANNOT_RUN
