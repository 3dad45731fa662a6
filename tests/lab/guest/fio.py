"""fio, the reference for storage: direct I/O of 1 MiB, eight at a time, on memory of the same kind as a region's."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

BLOCK, DEPTH = 1 << 20, 8


def bandwidth(operation: str, path: Path, size: int, pool: Path | None = None) -> float:
    """Return the bytes per second of `read` or `write` between a file's first `size` bytes and shared memory, or memory
    of a p2pmem pool, which the processor leaves as it is."""
    memory = "mmapshared" if pool is None else f"mmapshared:{pool}/allocate"
    command = ["fio", "--name=x", f"--filename={path}", f"--rw={operation}", f"--size={size}", f"--mem={memory}"]
    command += ["--ioengine=libaio", "--direct=1", f"--bs={BLOCK}", f"--iodepth={DEPTH}", "--thread"]
    command += ["--scramble_buffers=0", "--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    return float(job[operation]["bw_bytes"])
