"""`make demo`: real bytes between daemons, on any machine, in less than a minute.

Starts the daemons of nodes a and b, and of a node c that only gives orders; puts a real file into a
region on a, has it copied to b and back by orders to c, and compares SHA-256 at each step. Then prints
bandwidth and latency by size. Exits non-zero on any difference, and leaves nothing running.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

import peermem
from bench.daemons import Daemon, daemons
from peermem.core.units import format_duration, format_size

CASES = ((4096, 1, 300), (65536, 1, 200), (1 << 20, 1, 60), (64 << 20, 1, 6), (256 << 20, 1, 3), (65536, 256, 20))
"""Bytes per segment, segments, repetitions."""


def main() -> int:
    path = Path(sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] else sys.executable).resolve()
    data = path.read_bytes()
    if not data:
        print(f"{path} is empty: name a file with bytes in it.", file=sys.stderr)
        return 2
    device = f'[[device]]\nname = "bar0"\nsize = "{format_size(max(2 << 30, 4 * len(data)) >> 20 << 20)}"'
    with tempfile.TemporaryDirectory(prefix="peermem-demo-") as folder:
        with daemons(Path(folder), ("a", "b", "c"), device) as nodes:
            same = move(nodes, path, data)
            table(nodes)
            print(f"\nMetrics: http://{nodes['a'].http}/metrics while the daemons ran; they are stopped now.")
    return 0 if same else 1


def move(nodes: dict[str, Daemon], path: Path, data: bytes) -> bool:
    wanted = hashlib.sha256(data).hexdigest()
    print(f"{path}, {format_size(len(data))}, SHA-256 {wanted[:16]}…")
    with (
        peermem.connect(nodes["a"].target) as a,
        peermem.connect(nodes["b"].target) as b,
        peermem.connect(nodes["c"].target) as c,
    ):
        source = a.create_region(device="bar0", length=len(data), name="source")
        middle = b.create_region(device="bar0", length=len(data), name="middle")
        back = a.create_region(device="bar0", length=len(data), name="back")
        source.write(data)
        there = c.transfer(source, middle, checksum=True).wait()
        home = c.transfer(middle, back, checksum=True).wait()
        same = True
        for region, how in ((source, None), (middle, there), (back, home)):
            got = hashlib.sha256(region.read()).hexdigest()
            same &= got == wanted
            moved = f"in {format_duration(how.duration or 0)} over {how.fabric.value}" if how and how.fabric else "put"
            print(f"  {region.name:<24} {got[:16]}…  {'same' if got == wanted else 'DIFFERENT'}  {moved}")
    return same
