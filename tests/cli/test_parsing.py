from __future__ import annotations

from typing import Any

import click
import pytest

import peermem
from peermem.cli import parsing


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x", "x"),
        ("nodes/a/regions/x", "nodes/a/regions/x"),
        ("nodes/a/regions/x:0+64MiB", peermem.Slice("nodes/a/regions/x", 0, 64 << 20)),
        ("x:4KiB+1", peermem.Slice("x", 4096, 1)),
    ],
)
def test_ranges(text: str, expected: Any) -> None:
    assert parsing.RANGE.convert(text, None, None) == expected


@pytest.mark.parametrize("text", ["", "x:", "x:5", "x:5+", "x:+5", "x:0+1:2+3", "X", "x:0+1MB", "x:-1+2", "x y"])
def test_wrong_ranges_are_usage_errors(text: str) -> None:
    with pytest.raises(click.BadParameter):
        parsing.RANGE.convert(text, None, None)


def test_sizes() -> None:
    assert parsing.SIZES.convert("4KiB,1MiB,7", None, None) == [4096, 1 << 20, 7]
    with pytest.raises(click.BadParameter, match="such as 64MiB"):
        parsing.SIZES.convert("4KiB,,7", None, None)


def test_durations() -> None:
    assert parsing.DURATION.convert("10min", None, None) == 600.0
    with pytest.raises(click.BadParameter, match="such as 30s"):
        parsing.DURATION.convert("soon", None, None)
