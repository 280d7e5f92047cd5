"""YAML that goes through unchanged: every scalar is written as it was read.

PyYAML follows YAML 1.1 and would turn `2024-01-01` into a date, `0123` into 83, `1:30` into 90 and `yes` into a
boolean, each written back differently. Here no scalar is interpreted: a plain one stays plain text of the same
spelling, a quoted one stays a string that will be quoted where it must be.
"""

from __future__ import annotations

from typing import Any

import yaml

from arcbridge.errors import StateError

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class Plain(str):
    """A scalar that stood without quotes, whatever it means."""

    __slots__ = ()


class _PlainLoader(_Loader):  # type: ignore[misc]  # the base is chosen at run time
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 PyYAML's own shape


class _PlainDumper(_Dumper):  # type: ignore[misc]  # the base is chosen at run time
    """PyYAML's own, with all its resolvers: they say which strings need quotes."""


def _construct(loader: Any, node: Any) -> str:
    return node.value if node.style else Plain(node.value)


def _represent(dumper: Any, value: Plain) -> Any:
    # The tag that a reader would find: then the emitter writes the text without quotes and without a tag.
    tag = dumper.resolve(yaml.ScalarNode, str(value), (True, False))
    return dumper.represent_scalar(tag, str(value))


_PlainLoader.add_constructor("tag:yaml.org,2002:str", _construct)
_PlainDumper.add_representer(Plain, _represent)


def parse(data: bytes, name: str) -> Any:
    """Return the document in `data`; None when it is empty. Raises StateError that names the line, never the
    content."""
    try:
        return yaml.load(data, Loader=_PlainLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        # The parser's own message quotes the file, and kubeconfigs hold keys.
        raise StateError(f"{name}{line}: not valid YAML; correct it, or choose another file with --file") from None


def dump(document: Any) -> str:
    """Write a document in block style, its order kept and long lines not folded."""
    text: str = yaml.dump(
        document, Dumper=_PlainDumper, sort_keys=False, default_flow_style=False, width=2**31 - 1, allow_unicode=True
    )
    return text


def is_empty(value: object) -> bool:
    """Return whether a value stands for nothing: absent, or any spelling of null."""
    return value is None or (isinstance(value, Plain) and value.lower() in ("", "~", "null"))
