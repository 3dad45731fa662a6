"""The units for bare metal under a real systemd, in namespaces of its own, with NICs: activation by the first job, the
rights that are left, the watchdog, the end.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
UNITS = Path("/etc/systemd/system")
PROGRAM = """#!/usr/bin/python3
import sys
sys.path.insert(0, "{root}/service")
from peermem.__main__ import main
sys.exit(main())
"""
TARGET = """[Unit]
Requires=sockets.target
Wants=peermem-job.service
"""
JOB = """[Unit]
After=sockets.target
[Service]
Type=oneshot
Environment=PYTHONPATH={root}/service PYTHONDONTWRITEBYTECODE=1
ExecStart=/usr/bin/python3 {root}/tests/lab/guest/systemd_job.py {result}
"""
ALONE = ("unshare", "--mount", "--pid", "--cgroup", "--uts", "--ipc", "--fork", "--kill-child", "--propagation=private")
BEGIN = """
set -e
mount -t proc proc /proc
mount -t tmpfs run /run
mount -t cgroup2 cgroup /sys/fs/cgroup
exec env -i container=lab PATH="$PATH" /usr/lib/systemd/systemd --unit=peermem-test.target --log-target=console
"""


@pytest.fixture
def units() -> Iterator[None]:
    """Install the units as deploy/README.md says, with the project's own program."""
    before = set(UNITS.iterdir())
    program = Path("/opt/peermem/bin/peermemd")
    program.parent.mkdir(parents=True)
    program.write_text(PROGRAM.format(root=ROOT))
    program.chmod(0o755)
    Path("/etc/peermem").mkdir()
    shutil.copy(ROOT / "deploy/peermem.toml", "/etc/peermem")
    for unit in (ROOT / "deploy/systemd").iterdir():
        shutil.copy(unit, UNITS)
    wants = UNITS / "sockets.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "peermemd.socket").symlink_to("../peermemd.socket")
    (UNITS / "peermem-test.target").write_text(TARGET)
    yield
    shutil.rmtree("/opt/peermem")
    shutil.rmtree("/etc/peermem")
    (wants / "peermemd.socket").unlink()
    for unit in set(UNITS.iterdir()) - before - {wants}:
        unit.unlink()


@pytest.mark.timeout(550)
def test_systemd_runs_it(units: None, out: Path) -> None:
    result = out / "seen"
    (UNITS / "peermem-job.service").write_text(JOB.format(root=ROOT, result=result))
    ran = subprocess.run([*ALONE, "sh", "-c", BEGIN], capture_output=True, text=True, timeout=500)
    assert result.exists(), ran.stdout + ran.stderr
    seen = json.loads(result.read_text())
    log = seen.pop("log", "")
    done = {"state": "SUCCEEDED", "read": "hello", "nics": ["rxe1/1", "rxe1b/1"], "owner": "uid:0"}
    assert seen == {
        "before": "inactive",
        "job": done,
        "active": "active",
        "status": "Node lab.",
        "rights": {"CapEff": f"{1 << 14:016x}", "Seccomp": "2"},
        "restarted": True,
        "job again": done,
        "result": "success",
        "socket": True,
    }, log
    assert "Traceback" not in log
