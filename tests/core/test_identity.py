from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peermem.core.identity import ANONYMOUS, ROOT, Subject

USER = Subject("uid:1000", ("gid:1000", "gid:27"))


def test_what_another_node_vouches_for_is_somebody_else() -> None:
    there = USER.vouched_for("b")
    assert str(there) == "uid:1000@b"
    assert there not in (USER, replace_groups(USER))
    assert there.vouched_for("c") == there


def replace_groups(subject: Subject) -> Subject:
    return Subject(subject.name)


@given(
    name=st.from_regex(r"[A-Za-z0-9:/._-]{1,300}", fullmatch=True),
    groups=st.lists(st.integers(0, 2**32 - 1).map("gid:{}".format), max_size=64),
    node=st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True),
)
def test_what_is_spoken_is_understood(name: str, groups: list[str], node: str) -> None:
    subject = Subject(name, tuple(groups), node)
    assert Subject.parse_spoken(subject.spoken()) == subject


@pytest.mark.parametrize(
    "text", ["", "uid:0", "@a", "uid:0@", "uid:0@A", "uid:0@a@b", "uid:0,root@a", "a b@c", "x" * 301 + "@a"]
)
def test_what_is_no_subject_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="SUBJECT"):
        Subject.parse_spoken(text)


def test_nobody_vouches_for_one_of_this_node() -> None:
    with pytest.raises(ValueError, match="vouches"):
        ROOT.spoken()


def test_nobody_in_particular() -> None:
    assert ANONYMOUS.is_anonymous
    assert ANONYMOUS.vouched_for("a").is_anonymous
    assert not USER.is_anonymous
