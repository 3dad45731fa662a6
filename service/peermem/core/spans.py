"""What a trace is made of, without knowing who keeps it: work with a beginning, an end and a parent.

Rules of this file:

* Nothing is kept unless somebody is told to keep it (`keep_with`): until then a span is one that only passes on what it
  was given, so that a trace that began elsewhere goes on beyond this process.
* What comes from a socket as a traceparent is a traceparent, or nothing.
* A span holds names, sizes and reasons: never a key, a token or a secret.

The form of a traceparent: https://www.w3.org/TR/trace-context-1/#traceparent-header
"""

from __future__ import annotations

import re
from typing import Protocol, Self

Value = str | int | float | bool
HEADER = "traceparent"
"""Names it in the metadata of a call."""
_FORM = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)


class Span(Protocol):
    """Work that is traced; as a context manager it ends with its block, by the error that leaves it."""

    @property
    def traceparent(self) -> str:
        """What makes other work, wherever it is done, this one's child; empty where there is no trace."""

    @property
    def trace_id(self) -> str:
        """32 digits of the trace that this is kept in; empty where it is not kept."""

    def child(self, name: str, **attributes: Value) -> Span:
        """Begin work that is a part of this."""

    def note(self, **attributes: Value) -> None:
        """Say more of it."""

    def end(self, error: BaseException | None = None) -> None:
        """It is over; a second time is no error."""

    def __enter__(self) -> Self: ...
    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None: ...


class Keeper(Protocol):
    """Keeps spans."""

    def begin(self, name: str, parent: str, attributes: dict[str, Value]) -> Span:
        """Begin work; `parent` is a traceparent, or empty where it begins a trace."""


class Unkept:
    """A span that nobody keeps."""

    __slots__ = ("_parent",)
    trace_id = ""

    def __init__(self, parent: str = "") -> None:
        self._parent = parent

    @property
    def traceparent(self) -> str:
        """See Span."""
        return self._parent

    def child(self, name: str, **attributes: Value) -> Span:
        """See Span."""
        return self

    def note(self, **attributes: Value) -> None:
        """See Span."""

    def end(self, error: BaseException | None = None) -> None:
        """See Span."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        pass


UNKEPT = Unkept()
"""No trace at all."""
_keeper: Keeper | None = None


def keep_with(keeper: Keeper | None) -> None:
    """Have spans of this process kept by `keeper` from now on, or by nobody."""
    global _keeper
    _keeper = keeper


def traceparent(text: str) -> str:
    """Return what a caller says is a traceparent; nothing where it is none."""
    return text if _FORM.fullmatch(text) else ""


def join(name: str, parent: str, **attributes: Value) -> Span:
    """Begin work that is a child of what `parent` stands for; where that is nothing, no trace begins."""
    return begin(name, parent, **attributes) if parent else UNKEPT


def begin(name: str, parent: str = "", **attributes: Value) -> Span:
    """Begin work that is a child of what `parent`, a traceparent, stands for; empty: of nothing."""
    if _keeper is not None:
        return _keeper.begin(name, parent, attributes)
    return Unkept(parent) if parent else UNKEPT
