"""The words that a setting may take where several layers read it: the command line offers them, a role acts on them.

Each word stands here once (`tests/settings/test_choices.py`). This module imports nothing, because the command line
reads it at every start, and it checks nothing: the readers of settings refuse a wrong word.
"""

from __future__ import annotations

LOG_LEVELS = ("debug", "info", "warning", "error")
"""Values of `observe.log_level`, the most talkative one first."""
LOG_FORMATS = ("auto", "json", "console")
"""Values of `observe.log_format`; `auto`: console on a terminal and of a command that answers and ends, else JSON."""

BROWSER, DEVICE, PROGRAM = "authcode", "device-code", "client-credentials"
GRANTS = (BROWSER, DEVICE, PROGRAM)
"""The ways to tokens: RFC 6749 §4.1 in a browser, RFC 8628, and RFC 6749 §4.4 for a program without a person."""
AUDIENCE_BY = ("resource", "audience", "scope", "exchange")
"""Values of `login.cluster_audience_by` (`client.credentials.audience_parameters`)."""
GRANT_TYPES = ("auto", DEVICE, BROWSER, PROGRAM)
"""Values of a client's `login.grant_type`; `auto` is what the surroundings allow."""

FULL, READ_ONLY = "all", "read-only"
DEFAULT_RIGHTS = (FULL, READ_ONLY)
"""Values of `elevation.default`: what a user may do to whom nothing is lent."""
