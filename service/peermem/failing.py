"""What happens at failpoints of a daemon that is configured to break on purpose.

Rules of this file:

* Each passage at which something happens is logged first, so that whoever counts faults finds those that ended the
  process as well.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Awaitable, Callable, Sequence

import structlog

from peermem.core import failpoints
from peermem.core.errors import PeermemError
from peermem.core.failpoints import Deed, FailOrder, Kind
from peermem.core.units import parse_duration

log = structlog.get_logger(__name__)

EXIT_CODE = 86
"""Of a process that ended at a failpoint."""


def turn_on(orders: Sequence[FailOrder]) -> None:
    """Have the deeds of these orders happen from now on. Raises ValueError for an errno that there is not."""
    for order in orders:
        failpoints.turn_on(order.name, _logged(order, _act(order)), skip=order.skip, times=order.times)


def turn_off(orders: Sequence[FailOrder]) -> None:
    """Have nothing happen at the points of these orders any more."""
    for order in orders:
        failpoints.turn_off(order.name)


def _logged(order: FailOrder, act: failpoints.Act) -> failpoints.Act:
    def logged() -> Awaitable[None] | None:
        log.warning("failpoint", point=order.name, deed=order.deed.value, argument=order.argument)
        return act()

    return logged


def _act(order: FailOrder) -> failpoints.Act:
    if order.deed is Deed.RAISE:
        kind = PeermemError.by_reason[order.argument]
        return _raising(lambda: kind(f"Failpoint {order.name} was told to fail so. Turn it off to be served."))
    if order.deed is Deed.OSERROR:
        number = getattr(errno, order.argument, None)
        if not isinstance(number, int):
            raise ValueError(f"there is no errno {order.argument}")
        return _raising(lambda: OSError(number, os.strerror(number)))
    if order.deed is Deed.EXIT:
        return lambda: os._exit(EXIT_CODE)
    if order.deed is Deed.STOP:
        seconds = parse_duration(order.argument)
        alone = failpoints.POINTS[order.name].kind is Kind.WAIT
        return (lambda: asyncio.sleep(seconds)) if alone else (lambda: time.sleep(seconds))
    return failpoints.go_on


def _raising(error: Callable[[], Exception]) -> failpoints.Act:
    def act() -> None:
        raise error()

    return act
