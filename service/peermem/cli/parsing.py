"""Words of the command line: sizes, durations, labels, ranges of regions, and their completion.

Rules of this file:

* What can't be understood is a usage error that says what was expected.
* Completion asks the daemon with a short timeout, and offers nothing where it can't be reached.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click
from click.shell_completion import CompletionItem

import peermem
from peermem.cli.settings import Settings
from peermem.client.segments import Operand
from peermem.core.units import parse_duration, parse_size

_RANGE = re.compile(r"([a-z0-9/-]+)(?::([^+:]+)\+([^+:]+))?", re.ASCII)


class _Unit(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on only
    """A number with a unit."""

    def __init__(self, name: str, parse: Callable[[Any], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


SIZE = _Unit("size", parse_size)
DURATION = _Unit("duration", parse_duration)


class _Sizes(click.ParamType):  # type: ignore[type-arg]
    """Sizes with commas between them."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Return the numbers."""
        return value if isinstance(value, list) else [SIZE.convert(item, param, ctx) for item in value.split(",")]


SIZES = _Sizes()


class _Range(click.ParamType):  # type: ignore[type-arg]
    """A region, or REGION:OFFSET+LENGTH."""

    name = "region"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Operand:
        """Return the region's name or the slice."""
        match = _RANGE.fullmatch(value)
        if not match:
            self.fail(f"{value!r} is not REGION or REGION:OFFSET+LENGTH, such as x:0+64MiB.", param, ctx)
        if match[2] is None:
            return match[1]
        return peermem.Slice(match[1], SIZE.convert(match[2], param, ctx), SIZE.convert(match[3], param, ctx))


RANGE = _Range()


def labels(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Return KEY=VALUE options as a mapping."""
    pairs = dict(value.partition("=")[::2] for value in values if "=" in value)
    if len(pairs) != len(values):
        raise click.BadParameter("must be KEY=VALUE, each key once.", ctx, parameter)
    return pairs


def complete_regions(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the regions of the node."""
    return _complete(ctx, incomplete, lambda node: [region.name for region in node.regions()])


def complete_devices(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the devices of the node."""
    return _complete(ctx, incomplete, lambda node: [device.name for device in node.devices()])


def complete_transfers(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the running transfers of the node."""
    return _complete(ctx, incomplete, lambda node: [transfer.name for transfer in node.transfers(running=True)])


def _complete(ctx: click.Context, incomplete: str, names: Callable[[peermem.Node], list[str]]) -> list[CompletionItem]:
    settings = ctx.find_object(Settings)
    try:
        with peermem.connect(settings.target if settings else None, attach=False, timeout=1.0) as node:
            return [CompletionItem(name) for name in names(node) if name.startswith(incomplete)]
    except peermem.PeermemError:
        return []
