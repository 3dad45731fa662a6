"""fio, the reference for storage: direct I/O of 1 MiB, eight at a time."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

BLOCK, DEPTH = 1 << 20, 8
ENGINES = ("libaio", "io_uring")


def bandwidth(operation: str, path: Path, size: int, engine: str, pool: Path | None = None) -> float:
    """Return the bytes per second of `read` or `write` between a file's first `size` bytes and memory: ordinary one, or
    that of a p2pmem pool."""
    command = ["fio", "--name=x", f"--filename={path}", f"--rw={operation}", f"--size={size}", f"--ioengine={engine}"]
    command += ["--direct=1", f"--bs={BLOCK}", f"--iodepth={DEPTH}", "--thread", "--output-format=json"]
    if pool is not None:
        command += [f"--mem=mmapshared:{pool}/allocate"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    return float(job[operation]["bw_bytes"])
