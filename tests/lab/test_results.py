from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from tests.lab import results
from tests.lab.results import Case, SuiteResult

JUNIT = """<testsuites><testsuite>
<testcase name="good" time="0.5"/>
<testcase name="bad" time="1"><failure message="assert 0"/></testcase>
<testcase name="broken" time="0"><error/></testcase>
<testcase name="left_out" time="0"><skipped/></testcase>
</testsuite></testsuites>"""


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def console(tmp_path: Path) -> Path:
    return tmp_path / "console"


def test_a_suite_is_read_with_its_tests_and_figures(tmp_path: Path, console: Path) -> None:
    files = {"status": "1\n", "milliseconds": "2500\n", "junit__xml": JUNIT, "log": "one\nlast\n\n"}
    write(tmp_path / "out" / "verbs", **files, write__json='{"mib_per_s": 71.5}', half__json="{")
    (tmp_path / "out" / "facts").write_text("kernel=7.3.4\npython=3.13.5\n")
    guest = results.read(tmp_path / "out", console)
    assert guest.facts == {"kernel": "7.3.4", "python": "3.13.5"}
    outcomes = {"good": ("passed", 0.5), "bad": ("failed", 1.0), "broken": ("error", 0.0), "left_out": ("skipped", 0.0)}
    tests = tuple(Case(name, *outcome) for name, outcome in outcomes.items())
    assert guest.suites == {"verbs": SuiteResult("verbs", 1, 2.5, "last", tests, {"write": {"mib_per_s": 71.5}})}


def test_a_suite_that_was_cut_off_has_no_status(tmp_path: Path, console: Path) -> None:
    write(tmp_path / "out" / "verbs", junit__xml="<testsuites><tes", log="collecting")
    assert results.read(tmp_path / "out", console).suites == {"verbs": SuiteResult("verbs", last_line="collecting")}


def test_nothing_at_all_is_read_as_nothing(tmp_path: Path, console: Path) -> None:
    guest = results.read(tmp_path / "out", console)
    assert (guest.facts, guest.suites, guest.fatal_lines) == ({}, {}, ())


@pytest.mark.parametrize(
    "line",
    [
        "[ 1.0] BUG: kernel NULL pointer dereference, address: 0",
        "[ 1.0] Oops: general protection fault, probably for non-canonical address",
        "[ 1.0] rdma_rxe: cleanup failed",
        "[ 1.0] Out of memory: Killed process 91 (python3)",
    ],
)
def test_lines_of_the_kernel_that_fail_the_lab(line: str) -> None:
    assert results.kernel_lines(["[ 0.5] all is well", line, f"{line}\r"]) == ((line,), ())


def test_lines_of_the_kernel_that_are_only_told() -> None:
    lines = ("[ 1.0] WARNING: CPU: 0 at rxe_comp.c:1", "[ 2.0] watchdog: BUG: soft lockup - CPU#0 stuck for 22s!")
    assert results.kernel_lines(lines) == ((), lines)


def test_what_rxe_says_of_its_missing_qp1_is_harmless() -> None:
    assert results.kernel_lines(["[ 1.0] infiniband rxe1: Couldn't create ib_mad QP1"]) == ((), ())


def archive(**files: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    return buffer.getvalue()


def test_a_disk_is_unpacked_over_nothing_old(tmp_path: Path) -> None:
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.write_bytes(archive(facts="a=b") + bytes(1 << 20))
    write(out, old="x")
    results.unpack(disk, out)
    assert [path.name for path in out.iterdir()] == ["facts"]


def test_an_empty_disk_and_a_cut_one_are_unpacked_as_far_as_they_go(tmp_path: Path) -> None:
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.write_bytes(bytes(1 << 20))
    results.unpack(disk, out)
    assert list(out.iterdir()) == []
    disk.write_bytes(archive(facts="a=b", dmesg="x" * 5000)[:2000])
    results.unpack(disk, out)
    assert (out / "facts").read_text() == "a=b"


@pytest.mark.parametrize("name", ["../outside", "{tmp_path}/outside", "link/outside"])
def test_nothing_is_written_outside_the_folder(tmp_path: Path, name: str) -> None:
    disk, out = tmp_path / "disk", tmp_path / "out"
    link = tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, ".."
    disk.write_bytes(link.tobuf() + archive(**{name.format(tmp_path=tmp_path): "x", "facts": "a=b"}))
    results.unpack(disk, out)
    assert not (tmp_path / "outside").exists()
    assert (out / "facts").read_text() == "a=b"
