"""What the parts of tests have in common that are begun by a `with` and ended by `stop`.

It keeps no state. An error of the block leaves it unchanged, behind the stop.
"""

from types import TracebackType
from typing import Any, Self


class Stopping:
    """A context whose end is its `stop`."""

    stop: Any
    """Ends the part; called at the end of the block too."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
