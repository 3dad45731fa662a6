import pytest
from hypothesis import given
from hypothesis import strategies as st

from peermem.core.units import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("17", 17), ("1KiB", 1024), ("64MiB", 64 << 20), ("1.5 GiB", 3 << 29), (" 2TiB ", 2 << 40), (7, 7)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1MB", "1mib", "0.3B", "1e9", "٣", "1 MiB x", "1" * 40])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no size|whole number"):
        parse_size(text)


@given(st.integers(0, 1 << 50))
def test_a_size_in_a_whole_unit_reads_back(size: int) -> None:
    text = format_size(size)
    if "." not in text:
        assert parse_size(text) == size
    else:
        assert abs(parse_size(text.partition(".")[0] + text[-3:]) - size) <= size


@pytest.mark.parametrize(("text", "seconds"), [("250ms", 0.25), ("30s", 30), ("2min", 120), ("1.5h", 5400), (3, 3)])
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


def test_what_is_no_duration_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'soon' is no duration"):
        parse_duration("soon")


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5e-4, "250us"), (0.0123, "12.3ms"), (3, "3.0s"), (180, "3.0min"), (9000, "2.5h")]
)
def test_durations_are_shown_in_the_unit_that_reads_best(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
