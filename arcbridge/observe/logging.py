"""Logs of all roles: structlog, one JSON object per line, or a console format on a terminal.

    log = structlog.get_logger("arcbridge.relay").bind(session=join_id, cluster=cluster)
    log.info("joined", ms=4.0)

`event` names are ours and few; everything that varies is a field, and why something happened is the field `reason`.

structlog's own parts make a line: the level (changeable at run time), the time, the renderer, and the formatter that
sends the standard library's loggers down the same chain. Ours are two processors, which sample floods (`observe.flood`)
and clean what peers wrote (`observe.redaction`), and the sink that never blocks the event loop (`observe.line_sink`).
An exception of `arcbridge.errors` is a mistake of the operator or the peer and is logged without a stack trace; any
other is a defect of ours and gets one, without local variables.
"""

from __future__ import annotations

import atexit
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TextIO

import structlog
from structlog.typing import EventDict, Processor

from arcbridge.errors import ConfigError
from arcbridge.settings.choices import LOG_FORMATS, LOG_LEVELS

from .flood import Flood
from .line_sink import LineSink
from .redaction import QUOTING_PACKAGES, Redaction, error_text, quotes_peer
from .untrusted_text import clean

LEVELS: Final = {name: logging.getLevelNamesMapping()[name.upper()] for name in (*LOG_LEVELS, "critical")}
"""The numbers of `logging`. `critical` is no setting: with it, a command that prints its findings logs nothing."""

_TIMESTAMP: Final = "%Y-%m-%dT%H:%M:%S.%fZ"
_COLOURS: Final = {"debug": "\x1b[2m", "info": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m"}
_RESET: Final = "\x1b[0m"
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class _State:
    """What `configure` set; one per process, since a process has one standard error."""

    def __init__(self) -> None:
        self.level = "info"
        self.configured_level = "info"
        self.sink: LineSink | None = None
        self.flood = Flood()
        self.registered = False


_state = _State()

_chain: list[Processor] = []
"""The processors, the sampling first. `configure` changes the list in place: loggers that are bound already hold it."""

Log: Any = type("Log", (structlog.make_filtering_bound_logger(LEVELS["info"]),), {})
"""The class of all loggers: a structlog filtering logger, whose base `set_level` replaces. Bound loggers follow."""


class _Writer:
    """structlog's innermost logger: takes a rendered line. Its first argument is the name given to `get_logger`."""

    def __init__(self, name: str = "arcbridge", *_: object) -> None:
        self.name = name

    def _write(self, line: str) -> None:
        sink = _state.sink
        if sink is not None:
            sink.write(line)

    debug = info = warning = error = critical = _write


class _Handler(logging.Handler):
    """Writes the records of `asyncio`, `aiohttp`, warnings and our own lower layers to the same sink."""

    def emit(self, record: logging.LogRecord) -> None:
        sink = _state.sink
        if sink is None:
            return
        try:
            sink.write(self.format(record))
        except structlog.DropEvent:
            pass
        except (
            Exception
        ) as error:  # arguments that do not fit the text: the library's mistake must not reach its caller
            sink.write(_own_line("log.unreadable", origin=record.name, reason=type(error).__name__))


# --- Set up ---------------------------------------------------------------------------------------------------------


def configure(
    role: str,
    level: str = "info",
    format: str = "auto",
    stream: TextIO | None = None,
    *,
    worker: int | None = None,
    dated: bool = True,
) -> None:
    """Set up logging of this process for `role`; may be called again, which replaces everything.

    `level` is one of `LEVELS`, `format` one of `LOG_FORMATS`, `stream` is standard error unless given. `worker`: which
    of several processes that write to one stream this is; it is in every line then. Without `dated` a console's lines
    are as a command's own ones: `warning: …`.
    Raises ConfigError for an unknown level or format.
    """
    _number(level)
    if format not in LOG_FORMATS:
        raise ConfigError(f"log format {clean(format, 64)!r} is unknown; use one of {', '.join(LOG_FORMATS)}")
    target = sys.stderr if stream is None else stream
    terminal = _is_terminal(target)
    shutdown()
    _state.configured_level = level.lower()
    _state.flood = Flood()
    _state.sink = LineSink(target, lambda count: _own_line("log.dropped", dropped=count))
    console = format == "console" or (format == "auto" and terminal)
    _chain[:] = [
        _state.flood,
        structlog.processors.TimeStamper(fmt=_TIMESTAMP),
        Redaction(role, worker),
        *(_console(terminal, dated) if console else (structlog.processors.JSONRenderer(serializer=_encode),)),
        *((_over_waiting,) if console and terminal and role == "client" else ()),
    ]
    structlog.configure(
        processors=_chain,
        wrapper_class=Log,
        logger_factory=_Writer,
        cache_logger_on_first_use=False,  # a later configure() must reach loggers that exist already
    )
    _route_standard_loggers()
    set_level(level)
    if not _state.registered:
        atexit.register(shutdown)
        _state.registered = True


def set_level(level: str) -> None:
    """Change the level at once, for loggers that exist too. Raises ConfigError for an unknown level."""
    number = _number(level)
    _state.level = level.lower()
    Log.__bases__ = (structlog.make_filtering_bound_logger(number),)
    logging.getLogger().setLevel(max(number, logging.WARNING))
    logging.getLogger("arcbridge").setLevel(number)


def reconfigure_level(level: str) -> None:
    """Make `level` the configured one (after a reload); it holds at once, unless debug was switched on meanwhile.

    Raises ConfigError for an unknown level.
    """
    _number(level)
    toggled = _state.level == "debug" and _state.configured_level != "debug"
    _state.configured_level = level.lower()
    if not toggled:
        set_level(level)


def toggle_debug() -> str:
    """Switch between debug and the configured level (for SIGUSR1); return the level that holds now."""
    set_level(_state.configured_level if _state.level == "debug" else "debug")
    structlog.get_logger("arcbridge").warning("log.level_changed", log_level=_state.level)
    return _state.level


def level() -> str:
    """Return the level that holds now."""
    return _state.level


def omitted() -> int:
    """Return how many events the sampling of floods has omitted; for the metrics."""
    return _state.flood.omitted


def dropped() -> int:
    """Return how many lines a stream that stalled or failed has cost; for the metrics."""
    return 0 if _state.sink is None else _state.sink.dropped


@contextmanager
def paused() -> Iterator[None]:
    """Let lines wait while the user is asked something on the same terminal."""
    sink = _state.sink
    if sink is None:
        yield
        return
    sink.flush()
    sink.pause(True)
    try:
        yield
    finally:
        sink.pause(False)


def shutdown() -> None:
    """Report what was omitted, write what is queued and give the stream back. Called at the end of the process."""
    sink = _state.sink
    if sink is None:
        return
    for event, count in _state.flood.outstanding().items():
        sink.write(_own_line("log.omitted", omitted_event=event, omitted=count))
    _state.sink = None
    sink.close()
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(handler)


# --- Lines ----------------------------------------------------------------------------------------------------------


def _encode(fields: EventDict, **_: object) -> str:
    return _ENCODER.encode(fields)


def _console(colour: bool, dated: bool) -> tuple[Processor, Processor]:
    """Return the processors that render a line for people: date and time in UTC, level, role and event, then the
    fields, then the trace."""
    from structlog.dev import Column, ConsoleRenderer

    colours, reset = (_COLOURS, _RESET) if colour else ({}, "")
    columns = [
        Column("timestamp", lambda _, moment: f"{str(moment)[:10]} {str(moment)[11:23]}Z" * dated),
        Column("level", lambda _, name: f"{colours.get(str(name), '')}{f'{name:<7}' if dated else f'{name}:'}{reset}"),
        Column("role", lambda _, role: f"{role}:" * dated),
        Column("event", lambda _, event: str(event)),
        Column("logger", lambda *_: ""),
        Column("", lambda name, value: f"{name}={_console_value(value)}"),
    ]
    return _trace_for_console, ConsoleRenderer(columns=columns, sort_keys=False)


def _over_waiting(logger: Any, method: str, line: str) -> str:
    """Erase the line of a terminal on which a command of the client shows that it waits (`cli.screen`)."""
    return f"\r\x1b[K{line}"


def _trace_for_console(logger: Any, method: str, fields: EventDict) -> EventDict:
    # The renderer writes these two below the line as they are: a field that happens to have such a name must not.
    for name in ("stack", "exception"):
        if name in fields:
            fields[f"{name}_"] = fields.pop(name)
    if trace := fields.pop("trace", None):
        fields["exception"] = "\n".join(f"    | {line}" for line in trace)
    return fields


def _console_value(value: object) -> str:
    if isinstance(value, str) and value and not set(value) & set(' "='):
        return value
    return json.dumps(value, ensure_ascii=False)


def _own_line(event: str, **fields: object) -> str:
    """Return a line that the logging itself writes, past the sampling."""
    told: Any = {"event": event, **fields}
    for processor in _chain[1:]:
        told = processor(None, "warning", told)
    return str(told)


def _number(level: str) -> int:
    number = LEVELS.get(level.lower())
    if number is None:
        raise ConfigError(f"log level {clean(level, 64)!r} is unknown; use one of {', '.join(LEVELS)}")
    return number


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


# --- The standard library's loggers ---------------------------------------------------------------------------------


def _route_standard_loggers() -> None:
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, (_Handler, logging.StreamHandler)) and not _belongs_to_test_runner(handler):
            root.removeHandler(handler)
    handler = _Handler()
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=[_of_record], processors=_chain))
    root.addHandler(handler)
    logging.captureWarnings(True)
    # A request line per request is the audit record's business, and it would hold paths.
    logging.getLogger("aiohttp.access").setLevel(logging.CRITICAL)


def _of_record(logger: Any, method: str, fields: EventDict) -> EventDict:
    """Return the fields of a standard record. The event names the source: the text varies and would defeat the
    sampling."""
    record: logging.LogRecord = fields["_record"]
    package, template = record.name.partition(".")[0], str(record.msg)
    told = {"event": f"{package}.log", "message": fields["event"], "reason": template[:64], "origin": record.name}
    error = record.exc_info[1] if record.exc_info else None
    if package in QUOTING_PACKAGES:
        # The arguments may be request bytes and the trace may quote them: keep the template and the type.
        told["message"] = template
        if error is not None and quotes_peer(error):
            told["error"], error = error_text(error), None
    return told if error is None else {**told, "exc_info": error}


def _belongs_to_test_runner(handler: logging.Handler) -> bool:
    return type(handler).__module__.startswith("_pytest")
