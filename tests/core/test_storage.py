"""Where a range is cut for direct I/O."""

from hypothesis import given
from hypothesis import strategies as st

from peermem.core.storage import Span, cut


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 20), st.integers(0, 1 << 20), st.sampled_from([1, 512, 4096]))
def test_the_parts_make_up_the_whole_and_the_body_fits(file: int, region: int, length: int, unit: int) -> None:
    whole = Span(file, region, length)
    head, body, tail = cut(whole, unit)
    assert (head.file, body.file, tail.file) == (file, file + head.length, file + length - tail.length)
    for part in (head, body, tail):
        assert part.length >= 0
        assert part.region - region == part.file - file
    assert head.length + body.length + tail.length == length
    assert body.length % unit == 0
    if body.length:
        assert body.file % unit == 0
        assert max(head.length, tail.length) < unit
    else:
        assert tail.length == 0
        assert length < 2 * unit
