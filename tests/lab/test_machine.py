from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab import machine
from tests.lab.image import Image
from tests.lab.machine import Boot, Clock

OVER = "echo '@9 ready'; echo '@9 suite a'; echo works; echo '@9 over'"


class Shell:
    """A machine that is a shell script."""

    def __init__(self, folder: Path) -> None:
        self.heard: list[str] = []
        self.console = folder / "console"

    def run(self, script: str, limit: int = 60) -> Boot:
        return machine.run(["sh", "-c", script], Clock(limit), self.console, self.heard.append)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_a_plan_that_is_over_is_no_trouble(shell: Shell) -> None:
    boot = shell.run(OVER)
    assert boot.trouble == ""
    assert boot.ready is not None
    assert boot.first_suite is not None
    assert boot.ready <= boot.first_suite <= boot.seconds
    assert shell.heard == ["@9 ready", "@9 suite a", "works", "@9 over"]


def test_a_line_in_pieces_is_heard_whole(shell: Shell) -> None:
    shell.run("printf '@9 o'; sleep 0.05; printf 'ver\\r\\nend'")
    assert shell.heard == ["@9 over"]


def test_a_guest_that_hangs_is_ended_at_its_mark(shell: Shell) -> None:
    boot = shell.run("echo '@0 suite verbs 0'; exec sleep 60")
    assert "'suite verbs 0'" in boot.trouble
    assert boot.seconds < 30


def test_a_guest_that_talks_but_gets_no_further_is_ended(shell: Shell) -> None:
    boot = shell.run("echo '@1 suite verbs'; while sleep 0.1; do echo busy; done")
    assert "had 1 s after 'suite verbs'" in boot.trouble


def test_the_limit_of_the_whole_lab_ends_a_guest(shell: Shell) -> None:
    boot = shell.run("echo '@900 ready'; exec sleep 60", limit=1)
    assert "limit of 1 s" in boot.trouble
    assert "ready" in boot.trouble


def test_a_guest_that_dies_early_is_trouble(shell: Shell) -> None:
    assert "before its plan was over" in shell.run("echo '@9 ready'").trouble


def test_a_panic_is_told(shell: Shell) -> None:
    shell.console.write_text("[ 1.0] Kernel panic - not syncing: Attempted to kill init!\r\n")
    assert "Kernel panic - not syncing: Attempted to kill init!" in shell.run("echo '@9 ready'").trouble


def test_a_guest_that_does_not_come_up_is_booted_anew(shell: Shell) -> None:
    scripts, told = ["exit 1", "exit 1", OVER, "exit 1"], list[str]()
    boot = machine.until_up(lambda: shell.run(scripts.pop(0)), Clock(900), told.append)
    assert (boot.trouble, boot.number, len(scripts)) == ("", 3, 1)
    assert told == ["The guest ended by itself before its plan was over. It had not come up: once more."] * 2


@pytest.mark.parametrize(
    ("script", "seconds", "boots"), [("exit 1", 900, 3), ("exit 1", 30, 1), ("echo '@9 ready'", 900, 1)]
)
def test_a_guest_is_not_booted_for_ever(shell: Shell, script: str, seconds: int, boots: int) -> None:
    boot = machine.until_up(lambda: shell.run(script), Clock(seconds), lambda _: None)
    assert boot.number == boots
    assert "ended by itself" in boot.trouble


def test_what_the_machine_says_instead_of_starting_is_heard(shell: Shell) -> None:
    assert shell.run("echo 'qemu: no such device' >&2; exit 1").trouble
    assert shell.heard == ["qemu: no such device"]


def test_the_command_emulates_without_kvm_and_dies_with_the_lab(tmp_path: Path) -> None:
    words = machine.command(Image(Path("/k"), Path("/i")), tmp_path, tmp_path / "console")
    line = " ".join(words)
    assert words[:3] == ["setpriv", "--pdeathsig", "KILL"]
    for part in ("-accel tcg,thread=multi", "cmb_size_mb=64", "ivshmem-plain", "-no-reboot", "-kernel /k -initrd /i"):
        assert part in line


def test_the_results_disk_is_empty(tmp_path: Path) -> None:
    disk = machine.make_disks(tmp_path)
    assert disk.stat().st_size > 0
    assert disk.stat().st_blocks == 0
