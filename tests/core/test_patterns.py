from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peermem.core.identity import ANONYMOUS, Subject
from peermem.core.patterns import DevicePattern, Folder, OwnerPattern, SubjectPattern

USER = Subject("uid:1000", ("gid:100", "gid:27"))
JOB = Subject("spiffe://example.org/team-a/job/7")
POD = Subject("kubernetes:team-a/trainer")


@pytest.mark.parametrize(
    ("pattern", "subject", "matches"),
    [
        ("uid:1000", USER, True),
        ("uid:100", USER, False),
        ("uid:*", USER, True),
        ("uid:*", JOB, False),
        ("gid:100", USER, True),
        ("gid:10", USER, False),
        ("uid:1000", USER.vouched_for("b"), False),
        ("uid:1000@*", USER.vouched_for("b"), True),
        ("uid:1000@b", USER.vouched_for("b"), True),
        ("uid:1000@b", USER.vouched_for("c"), False),
        ("uid:1000@*", USER, False),
        ("gid:27@b", USER.vouched_for("b"), True),
        ("anonymous", ANONYMOUS, True),
        ("anonymous", USER, False),
        ("anonymous", ANONYMOUS.vouched_for("b"), False),
        ("anonymous@*", ANONYMOUS.vouched_for("b"), True),
        ("anyone", ANONYMOUS, True),
        ("anyone", JOB, True),
        ("anyone", JOB.vouched_for("b"), False),
        ("identified", ANONYMOUS, False),
        ("identified", POD, True),
        ("identified@b", ANONYMOUS.vouched_for("b"), False),
        ("spiffe://example.org/team-a/job/7", JOB, True),
        ("spiffe://example.org/team-a/job/*", JOB, True),
        ("spiffe://example.org/team-a/*", JOB, False),
        ("spiffe://example.org/team-a/**", JOB, True),
        ("spiffe://example.org/*/job/**", JOB, True),
        ("spiffe://example.org/team-*/job/7", JOB, True),
        ("spiffe://example.org/team-b/**", JOB, False),
        ("spiffe://example-org/team-a/**", JOB, False),
        ("spiffe://e.ample.org/team-a/**", JOB, False),
        ("kubernetes:team-a/trainer", POD, True),
        ("kubernetes:team-a/*", POD, True),
        ("kubernetes:*/trainer", POD, True),
        ("kubernetes:team-b/*", POD, False),
    ],
)
def test_whom_a_pattern_stands_for(pattern: str, subject: Subject, matches: bool) -> None:
    assert SubjectPattern(pattern).matches(subject) is matches


@pytest.mark.parametrize(
    "text",
    [
        "",
        "*",
        "root",
        "uid:",
        "uid:abc",
        "uid:-1",
        "uid:01",
        "uid:1*",
        "gid:*",
        "anonymou*",
        "uid:1@",
        "uid:1@B",
        "uid:1@b@c",
        "uid:1@b*",
        "spiffe://",
        "spiffe://example.org",
        "spiffe:///job",
        "spiffe://*/job",
        "spiffe://EXAMPLE.org/job",
        "spiffe://example.org/a//b",
        "spiffe://example.org/a/../b",
        "spiffe://example.org/**/b",
        "spiffe://example.org/a**",
        "spiffe://example.org/job?",
        "kubernetes:team-a",
        "kubernetes:team_a/x",
        "kubernetes:/x",
        "uid:1000\n",
        "anyone, gid:1",
        7,
        None,
    ],
)
def test_a_pattern_that_could_match_nothing_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="a subject"):
        SubjectPattern(text)


@pytest.mark.parametrize("text", ["uid:7", "anonymous", "spiffe://example.org/a", "kubernetes:a/b", "uid:7@*"])
def test_a_name_is_one_subject(text: str) -> None:
    assert SubjectPattern(text).is_one is ("*" not in text)


@pytest.mark.parametrize("text", ["anyone", "identified", "gid:7", "uid:*", "kubernetes:a/*"])
def test_a_pattern_is_many(text: str) -> None:
    assert not SubjectPattern(text).is_one


def test_whose_regions() -> None:
    there = USER.vouched_for("b")
    assert OwnerPattern("mine").matches("uid:1000", USER)
    assert not OwnerPattern("mine").matches("uid:1000", there)
    assert OwnerPattern("mine").matches("uid:1000@b", there)
    assert OwnerPattern("namesake").matches("uid:1000", there)
    assert OwnerPattern("namesake").matches("uid:1000@c", there)
    assert not OwnerPattern("namesake").matches("uid:10001", there)
    assert OwnerPattern("uid:7@*").matches("uid:7@b", USER)
    assert not OwnerPattern("uid:7").matches("uid:7@b", USER)
    assert OwnerPattern("anonymous").matches("anonymous", USER)


def test_nobody_in_particular_owns_nothing() -> None:
    assert not OwnerPattern("mine").matches("anonymous", ANONYMOUS)
    assert not OwnerPattern("namesake").matches("anonymous@b", ANONYMOUS)


@pytest.mark.parametrize("text", ["gid:100", "gid:1@b", "Mine", "", 7])
def test_an_owner_that_could_match_nothing_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="an owner has no gid"):
        OwnerPattern(text)


def test_devices() -> None:
    assert DevicePattern("gpu*").matches("gpu0")
    assert DevicePattern("*").matches("memfd0")
    assert not DevicePattern("gpu").matches("gpu0")
    for text in ("", "GPU", "gpu/0", "-x", "a**", 7):
        with pytest.raises(ValueError, match=r"device|a subject"):
            DevicePattern(text)


def test_a_folder_holds_what_is_below_it_by_its_words() -> None:
    folder = Folder("/data/models/")
    assert folder.holds("/data/models")
    assert folder.holds("/data//./models/a/b")
    assert not folder.holds("/data/models2")
    assert not folder.holds("/data")
    assert not folder.holds("/data/models/../secret")
    assert not folder.holds("data/models/a")
    assert Folder("/").holds("/anything")
    for text in ("", "data", "/a/../b", "/data/*", "/a\0", 7):
        with pytest.raises(ValueError, match="absolute path"):
            Folder(text)


@given(name=st.text(max_size=40), node=st.sampled_from(["", "b"]))
def test_only_whole_names_match(name: str, node: str) -> None:
    matched = [text for text in ("uid:7", "uid:7@*", "gid:7") if SubjectPattern(text).matches(Subject(name, (), node))]
    assert not matched or name == "uid:7"


def test_patterns_show_their_text() -> None:
    assert [
        repr(each) for each in (SubjectPattern("uid:7"), OwnerPattern("mine"), DevicePattern("a"), Folder("/a"))
    ] == [
        "SubjectPattern('uid:7')",
        "OwnerPattern('mine')",
        "DevicePattern('a')",
        "Folder('/a')",
    ]
