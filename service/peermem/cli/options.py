"""The options that every command has.

Rules of this file:

* They may stand before or after any command's name; the last one wins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from peermem.cli import parsing
from peermem.cli.settings import Settings
from peermem.client import targets

Command = TypeVar("Command", bound=Callable[..., Any])


def pass_settings(command: Command) -> Command:
    """Give a command the run's settings as its first argument, and the common options."""

    def store(ctx: click.Context, parameter: click.Parameter, value: object) -> None:
        source = ctx.get_parameter_source(parameter.name or "")
        if value is not None and source is not ParameterSource.DEFAULT:
            setattr(ctx.ensure_object(Settings), parameter.name or "", value)

    for option in (
        click.option("--json", is_flag=True, expose_value=False, callback=store, help="Print JSON."),
        click.option(
            "--timeout",
            type=parsing.DURATION,
            expose_value=False,
            callback=store,
            help="Time that each call may take, such as 30s.",
        ),
        click.option(
            "--target",
            metavar="TARGET",
            expose_value=False,
            callback=store,
            help=f"The daemon: unix:///PATH or HOST:PORT; else {targets.VARIABLE}, else {targets.DEFAULT}.",
        ),
    ):
        command = option(command)
    return click.make_pass_decorator(Settings, ensure=True)(command)  # type: ignore[return-value]
