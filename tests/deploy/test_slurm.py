"""The example scripts for Slurm, with a simulated job: a process in a control group such as slurmstepd makes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.daemons import Daemon, daemons

import peermem
from tests.deploy.cgroups import cgroup2, knows_processes

SCRIPTS = Path(__file__).resolve().parents[2] / "deploy" / "slurm"
PEERMEMCTL = str(Path(sys.executable).with_name("peermemctl"))
JOB, OTHER_JOB = "990042", "990043"

in_jobs = pytest.mark.skipif(
    os.geteuid() != 0 or cgroup2() is None or not knows_processes(),
    reason="simulating a Slurm job needs root, a control group file system (cgroup2) and Linux 6.5",
)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with daemons(tmp_path, ("a",), '[[device]]\nname = "bar0"\nsize = "64MiB"\n') as nodes:
        yield nodes["a"]


@pytest.fixture
def jobs() -> Iterator[Path]:
    """Give slurmstepd's control group; the jobs in it have ended at the end."""
    mount = cgroup2()
    assert mount is not None
    scope = mount / "system.slice" / "slurmstepd.scope"
    made = [place for place in (scope, scope.parent) if not place.exists()]
    steps = [scope / f"job_{job}" / "step_0" for job in (JOB, OTHER_JOB)]
    for step in steps:
        step.mkdir(parents=True)
    yield scope
    for step in steps:
        step.rmdir()
        step.parent.rmdir()
    for place in made:
        place.rmdir()


def script(name: str, daemon: Daemon, job: str = JOB) -> subprocess.CompletedProcess[str]:
    environ = {
        "PATH": os.environ["PATH"],
        "PEERMEMCTL": PEERMEMCTL,
        "PEERMEM_TARGET": daemon.target,
        "SLURM_JOB_ID": job,
    }
    return subprocess.run([SCRIPTS / name], env=environ, capture_output=True, text=True, timeout=60)


def in_job(scope: Path, job: str, daemon: Daemon, *words: str) -> None:
    step = scope / f"job_{job}" / "step_0"
    done = subprocess.run(
        ["sh", "-c", f'echo $$ > {step}/cgroup.procs; exec "$@"', "sh", PEERMEMCTL, "--target", daemon.target, *words],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def names(daemon: Daemon) -> list[str]:
    with peermem.connect(daemon.target) as node:
        return [region.name.rpartition("/")[2] for region in node.regions()]


@in_jobs
def test_the_epilog_frees_what_its_job_has_left_and_nothing_else(daemon: Daemon, jobs: Path) -> None:
    create = ("regions", "create", "--device", "bar0", "--length", "4KiB", "--name")
    in_job(jobs, JOB, daemon, *create, "kept")
    in_job(jobs, JOB, daemon, *create, "timed", "--lease", "1h")
    in_job(jobs, OTHER_JOB, daemon, *create, "others")
    with peermem.connect(daemon.target) as node:
        node.create_region(device="bar0", length=4096, name="nobodys", lease="none")
        assert {region.name.rpartition("/")[2]: region.slurm_job for region in node.regions()} == {
            "kept": JOB,
            "nobodys": "",
            "others": OTHER_JOB,
            "timed": JOB,
        }
        done = script("epilog.sh", daemon)
        assert (done.returncode, done.stderr) == (0, "")
        assert names(daemon) == ["nobodys", "others"]


def test_a_node_without_its_daemon_takes_no_job_and_has_nothing_to_free(daemon: Daemon) -> None:
    assert script("prolog.sh", daemon).returncode == 0
    assert script("epilog.sh", daemon).returncode == 0
    daemon.kill()
    prolog = script("prolog.sh", daemon)
    assert prolog.returncode == 1
    assert "peermem does not take work on this node: error: " in prolog.stderr
    assert script("epilog.sh", daemon).returncode == 0


def test_tasks_are_told_where_the_daemon_is() -> None:
    said = subprocess.run([SCRIPTS / "task_prolog.sh"], capture_output=True, text=True, timeout=60).stdout
    assert said == "export PEERMEM_TARGET=unix:///run/peermem/peermem.sock\n"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="Debian's package shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    found = subprocess.run(
        ["shellcheck", *sorted(SCRIPTS.iterdir())],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.stdout == ""
