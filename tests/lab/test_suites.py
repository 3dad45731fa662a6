from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.lab import suites
from tests.lab.image import GUEST_TESTS
from tests.lab.suites import TABLE, WHOLE_SOAK, Choice, Settings, Suite

BOTH = Settings(releases=("trixie", "bookworm"), seconds=30, soak_seconds=900)
LAB = [Suite("lab", "trixie", BOTH), Suite("lab", "bookworm", BOTH), Suite("soak", "trixie", Settings())]


def test_every_file_of_tests_is_a_suite_and_the_table_names_no_other() -> None:
    names = {suite.name for suite in suites.found(GUEST_TESTS)}
    assert names == {path.stem.removeprefix("test_") for path in GUEST_TESTS.glob("test_*.py")}
    assert TABLE.keys() <= names


def test_a_file_without_settings_runs_on_trixie(tmp_path: Path) -> None:
    (tmp_path / "test_new.py").touch()
    (tmp_path / "support.py").touch()
    assert suites.found(tmp_path) == [Suite("new", "trixie", Settings())]


@pytest.mark.parametrize(
    ("choice", "left"),
    [
        (Choice(), LAB),
        (Choice(names=("soak",)), LAB[2:]),
        (Choice(releases=("bookworm",)), LAB[1:2]),
        (Choice(names=("lab",), releases=("trixie",)), LAB[:1]),
    ],
)
def test_suites_are_chosen_by_name_and_release(choice: Choice, left: list[Suite]) -> None:
    assert suites.chosen(LAB, choice) == left


def test_a_suite_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="no suite 'lap': its suites are lab, soak"):
        suites.chosen(LAB, Choice(names=("lap",)))


def test_the_plan_quotes_what_the_guest_s_shell_would_read() -> None:
    [line] = suites.plan(LAB[:1], Choice(pytest=("-k", "a and not $(b)"))).splitlines()
    words = shlex.split(line)
    assert words[:4] == ["suite", "lab", "", "30"]
    assert words[-3:] == ["-k", "a and not $(b)", "tests/lab/guest/test_lab.py"]
    assert "PEERMEM_LAB_SOAK=0.1" in words


def test_a_whole_soak_has_its_own_limit() -> None:
    words = shlex.split(suites.plan(LAB[:1], Choice(soak=WHOLE_SOAK)))
    assert words[3] == "900"
    assert suites.limit(LAB[2], Choice(soak=WHOLE_SOAK)) == LAB[2].settings.seconds
    assert "PEERMEM_LAB_SOAK=1.0" in words


def test_a_shell_command_stays_one_word() -> None:
    assert shlex.split(suites.shell_plan("ls; echo 'a b'", 9)) == [
        "suite",
        "shell",
        "",
        "9",
        "bash",
        "-c",
        "ls; echo 'a b'",
    ]
