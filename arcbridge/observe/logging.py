"""Logs of all roles: structlog, one JSON object per line, or a console format on a terminal.

    log = structlog.get_logger("arcbridge.relay").bind(session=join_id, cluster=cluster)
    log.info("join.paired", seconds=0.004)

`event` names are ours and few, `word.word`; everything that varies is a field. The prefix fields come first and
in the order of `PREFIX`, so that one text search yields the life of one stream.

What every line goes through, in this order: the level (changeable at run time), the sampling of floods
(`flood.py`), the cleaning of foreign text (`foreign_text.py`), the rendering, a queue that never blocks the event
loop (`line_sink.py`). Exceptions of `arcbridge.errors` are somebody's mistake and are logged without a stack trace;
all others are ours and get one, without local variables.

The standard library's loggers are routed through the same path. aiohttp's errors quote what a peer sent; of those
only the type is kept.
"""

from __future__ import annotations

import atexit
import enum
import json
import logging
import math
import sys
import threading
import time
import traceback
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import structlog

from arcbridge.errors import ArcbridgeError, ConfigError

from .flood import Flood
from .foreign_text import FIELD_LIMIT, REDACTED, clean, clean_trace, names_secret
from .line_sink import LineSink

PREFIX: Final = ("role", "connection", "session", "stream", "cluster")
LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
FORMATS: Final = ("auto", "json", "console")

MAX_FIELDS: Final = 40
MAX_ITEMS: Final = 20
MAX_DEPTH: Final = 3

_COLOURS: Final = {"debug": "\x1b[2m", "info": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m"}
_RESET: Final = "\x1b[0m"

# Loggers whose exceptions and arguments may hold bytes of a request.
_QUOTING_LOGGERS: Final = ("aiohttp", "h11", "http")


class _State:
    """What `configure` set; one per process, since a process has one standard error."""

    def __init__(self) -> None:
        self.role = ""
        self.worker: int | None = None
        self.threshold = LEVELS["info"]
        self.configured_level = "info"
        self.console = False
        self.colour = False
        self.sink: LineSink | None = None
        self.flood = Flood()
        self.lock = threading.Lock()
        self.registered = False


_state = _State()


class Log(structlog.BoundLoggerBase):
    """The bound logger: fields by `bind`, levels as methods. A disabled level costs one comparison."""

    def debug(self, event: str, *args: object, **fields: object) -> None:
        if _state.threshold <= 10:
            self._proxy_to_logger("debug", _merged(event, args), **fields)

    def info(self, event: str, *args: object, **fields: object) -> None:
        if _state.threshold <= 20:
            self._proxy_to_logger("info", _merged(event, args), **fields)

    def warning(self, event: str, *args: object, **fields: object) -> None:
        if _state.threshold <= 30:
            self._proxy_to_logger("warning", _merged(event, args), **fields)

    warn = warning

    def error(self, event: str, *args: object, **fields: object) -> None:
        if _state.threshold <= 40:
            self._proxy_to_logger("error", _merged(event, args), **fields)

    def exception(self, event: str, *args: object, **fields: object) -> None:
        """Like `error`, with the exception being handled; for what is ours (a peer's mistake has no stack trace)."""
        fields.setdefault("exc_info", True)
        self.error(event, *args, **fields)

    def critical(self, event: str, *args: object, **fields: object) -> None:
        self._proxy_to_logger("critical", _merged(event, args), **fields)

    fatal = critical

    def log(self, level: int, event: str, *args: object, **fields: object) -> None:
        """Log at a level of the standard library's numbers."""
        if _state.threshold <= level:
            self._proxy_to_logger(_level_name(level), _merged(event, args), **fields)

    def is_enabled_for(self, level: int) -> bool:
        """Say whether the level would be written; for fields that are costly to make."""
        return _state.threshold <= level

    isEnabledFor = is_enabled_for


# --- Set up ---------------------------------------------------------------------------------------------------------


def configure(
    role: str, level: str = "info", format: str = "auto", stream: TextIO | None = None, *, worker: int | None = None
) -> None:
    """Set up logging of this process for `role`; may be called again, which replaces everything.

    `level` is one of `LEVELS`, `format` one of `FORMATS`, `stream` is standard error unless given. `worker`: which of
    several processes that write to one stream this is; it is in every line then.
    Raises ConfigError for an unknown level or format.
    """
    number = _level_number(level)
    if format not in FORMATS:
        raise ConfigError(f"log format {clean(format, 64)!r} is unknown; use one of {', '.join(FORMATS)}")
    target = sys.stderr if stream is None else stream
    terminal = _is_terminal(target)
    shutdown()
    _state.role = role
    _state.worker = worker
    _state.threshold = number
    _state.configured_level = level.lower()
    _state.console = format == "console" or (format == "auto" and terminal)
    _state.colour = terminal
    _state.flood = Flood()
    _state.sink = LineSink(target, _dropped_notice)
    structlog.configure(
        processors=[_admit, _shape, _render],
        wrapper_class=Log,
        logger_factory=_Writer,
        cache_logger_on_first_use=False,  # a later configure() must reach loggers that exist already
    )
    _route_standard_loggers(number)
    if not _state.registered:
        atexit.register(shutdown)
        _state.registered = True


def set_level(level: str) -> None:
    """Change the level at once, for loggers that exist too. Raises ConfigError for an unknown level."""
    _state.threshold = _level_number(level)
    _route_level(_state.threshold)


def toggle_debug() -> str:
    """Switch between debug and the configured level (for SIGUSR1); return the level that holds now."""
    level = _state.configured_level if _state.threshold <= LEVELS["debug"] else "debug"
    set_level(level)
    structlog.get_logger("arcbridge").warning("log.level_changed", log_level=level)
    return level


def level() -> str:
    """Return the level that holds now."""
    return _level_name(_state.threshold)


def omitted() -> int:
    """Return how many events the sampling of floods has omitted; for the metrics."""
    return _state.flood.omitted


def dropped() -> int:
    """Return how many lines a stream that stalled or failed has cost; for the metrics."""
    return 0 if _state.sink is None else _state.sink.dropped


def flush() -> None:
    """Wait until what was logged is written, at most two seconds."""
    if _state.sink is not None:
        _state.sink.flush()


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
    for handler in [handler for handler in root.handlers if isinstance(handler, _StandardHandler)]:
        root.removeHandler(handler)


# --- The chain ------------------------------------------------------------------------------------------------------


class _Writer:
    """structlog's innermost logger: takes a rendered line. Its first argument is the name given to `get_logger`."""

    def __init__(self, name: str = "arcbridge", *_: object) -> None:
        self.name = name

    def _write(self, line: str) -> None:
        sink = _state.sink
        if sink is not None:
            sink.write(line)

    debug = info = warning = error = critical = _write


def _admit(logger: Any, method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    reason = fields.get("reason") or fields.get("cause")
    with _state.lock:  # the standard library's loggers also log from threads
        before = _state.flood.admit(
            str(fields.get("event", ""))[:64], method, reason[:64] if isinstance(reason, str) else "", time.monotonic()
        )
    if before is None:
        raise structlog.DropEvent
    if before:
        fields["omitted"] = before
    return fields


def _shape(logger: Any, method: str, fields: MutableMapping[str, Any]) -> dict[str, Any]:
    """Order, clean and bound the fields."""
    trace = _exception_fields(fields)
    shaped: dict[str, Any] = {
        "timestamp": _timestamp(),
        "level": method,
        "event": clean(_text(fields.pop("event", ""))),
        "logger": getattr(logger, "name", "arcbridge"),
        "role": _state.role,
    }
    if _state.worker is not None:
        shaped["worker"] = _state.worker
    for name in PREFIX:
        if name in fields:
            shaped[name] = _value(name, fields.pop(name))
    for count, (name, value) in enumerate(fields.items()):
        if count >= MAX_FIELDS:
            shaped["fields_omitted"] = len(fields) - MAX_FIELDS
            break
        shaped.setdefault(clean(str(name), 64), _value(str(name), value))
    shaped.update(trace)
    return shaped


def _exception_fields(fields: MutableMapping[str, Any]) -> dict[str, Any]:
    """Take `exc_info` out of the fields and return what replaces it: `error`, and `trace` where it is our fault."""
    info = fields.pop("exc_info", None)
    fields.pop("stack_info", None)
    if info is True:
        info = sys.exc_info()[1]
    elif isinstance(info, tuple):
        info = info[1]
    if not isinstance(info, BaseException):
        return {}
    found: dict[str, Any] = {"error": clean(_error_text(info))}
    if not isinstance(info, ArcbridgeError):
        found["trace"] = clean_trace(_trace(info))
    return found


def _render(logger: Any, method: str, fields: MutableMapping[str, Any]) -> str:
    return _console_line(fields) if _state.console else _json_line(fields)


def _json_line(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


def _console_line(fields: Mapping[str, Any]) -> str:
    rest = dict(fields)
    moment = rest.pop("timestamp")[11:23]
    level_name = rest.pop("level")
    event = rest.pop("event")
    rest.pop("logger", None)
    role = rest.pop("role", "")
    trace = rest.pop("trace", [])
    colour, reset = (_COLOURS.get(level_name, ""), _RESET) if _state.colour else ("", "")
    pairs = " ".join(f"{name}={_console_value(value)}" for name, value in rest.items())
    line = f"{moment} {colour}{level_name:<8}{reset}{role}: {event}{' ' if pairs else ''}{pairs}"
    return "\n    | ".join([line, *trace])


def _console_value(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if not value or set(value) & set(' "=') else value
    return json.dumps(value, ensure_ascii=False)


# --- Values ---------------------------------------------------------------------------------------------------------


def _value(name: str, value: Any, depth: int = 0) -> Any:
    """Return `value` as something JSON has, clean and bounded. A field named after a secret loses its value."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return value.name.lower()
    if isinstance(value, int):
        return value if value.bit_length() <= 64 else f"integer of {value.bit_length()} bits"
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else str(value)
    if names_secret(name):
        return REDACTED
    if isinstance(value, Mapping) and depth < MAX_DEPTH:
        pairs = list(value.items())[:MAX_ITEMS]
        return _bounded({clean(_text(key), 64): _value(_text(key), item, depth + 1) for key, item in pairs})
    if isinstance(value, (list, tuple, set, frozenset)) and depth < MAX_DEPTH:
        return _bounded([_value("", item, depth + 1) for item in list(value)[:MAX_ITEMS]])
    return clean(_text(value))


def _bounded(value: Any) -> Any:
    text = json.dumps(value, ensure_ascii=False)
    return value if len(text) <= FIELD_LIMIT else clean(text)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value[: FIELD_LIMIT * 4]).decode("utf-8", "backslashreplace")
    if isinstance(value, BaseException):
        return _error_text(value)
    try:
        return str(value)
    except Exception as error:  # an object whose own __str__ fails must not cost the event it belongs to
        return f"<{type(value).__name__} that cannot be written: {type(error).__name__}>"


def _error_text(error: BaseException) -> str:
    if _quotes_peer(type(error)):
        return type(error).__name__
    try:
        text = str(error)
    except Exception:  # as above
        text = ""
    if isinstance(error, ArcbridgeError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _trace(error: BaseException) -> str:
    """The stack trace with the chain of causes; without any text where one of them quotes a peer."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(_quotes_peer(type(link)) for link in chain):
        return "".join(traceback.format_tb(error.__traceback__, limit=-40)) + type(error).__name__
    return "".join(traceback.format_exception(error, limit=-40))


def _quotes_peer(kind: type) -> bool:
    """Say whether errors of this type quote bytes that a peer sent: those of the HTTP parsers do."""
    return kind.__module__.partition(".")[0] in _QUOTING_LOGGERS


def _merged(event: str, args: tuple[object, ...]) -> str:
    return event % args if args else event


def _timestamp() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _level_number(name: str) -> int:
    number = LEVELS.get(name.lower())
    if number is None:
        raise ConfigError(f"log level {clean(name, 64)!r} is unknown; use one of {', '.join(LEVELS)}")
    return number


def _level_name(number: int) -> str:
    return next((name for name, value in LEVELS.items() if number <= value), "critical")


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def _own_line(event: str, **fields: object) -> str:
    """A line that the logging itself writes, past sampling."""
    return _render(None, "warning", _shape(None, "warning", {"event": event, **fields}))


def _dropped_notice(count: int) -> str:
    return _own_line("log.dropped", dropped=count)


# --- The standard library's loggers ---------------------------------------------------------------------------------


class _StandardHandler(logging.Handler):
    """Takes the records of `asyncio`, `aiohttp`, warnings and our own lower layers into the same chain."""

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"origin": record.name}
        error = record.exc_info[1] if record.exc_info else None
        if record.name.partition(".")[0] in _QUOTING_LOGGERS:
            # The arguments may be request bytes and the trace may quote them: keep the template and the type.
            event = str(record.msg)
            if error is not None:
                fields["error"] = _error_text(error) if isinstance(error, ArcbridgeError) else type(error).__name__
                if not _quotes_peer(type(error)) and not isinstance(error, ArcbridgeError):
                    fields["exc_info"] = error
        else:
            event = record.getMessage()
            if error is not None:
                fields["exc_info"] = error
        # The event names the source: the text varies and would defeat the sampling by event.
        structlog.get_logger("arcbridge").log(
            record.levelno, f"{record.name.partition('.')[0]}.log", message=event, reason=str(record.msg)[:64], **fields
        )


def _route_standard_loggers(threshold: int) -> None:
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, (_StandardHandler, logging.StreamHandler)) and not _belongs_to_test_runner(handler):
            root.removeHandler(handler)
    root.addHandler(_StandardHandler())
    logging.captureWarnings(True)
    # A request line per request is the audit record's business, and it would hold paths.
    logging.getLogger("aiohttp.access").setLevel(logging.CRITICAL)
    _route_level(threshold)


def _belongs_to_test_runner(handler: logging.Handler) -> bool:
    return type(handler).__module__.startswith("_pytest")


def _route_level(threshold: int) -> None:
    logging.getLogger().setLevel(max(threshold, logging.WARNING))
    logging.getLogger("arcbridge").setLevel(threshold)
