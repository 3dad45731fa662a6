"""`make demo`: real bytes between daemons, on any machine, in less than a minute.

Starts the daemons of nodes a and b, and of a node c that only gives orders; puts a real file into a
region on a, has it copied to b and back by orders to c, and compares SHA-256 at each step. Then prints
bandwidth and latency by size. Exits non-zero on any difference, and leaves nothing running.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import peermem
from bench.daemons import Daemon, daemons
from peermem.core.units import format_duration, format_size

LIBRARY = find_spec("grpc._cython.cygrpc")
EVERYWHERE = [Path(origin).resolve() for origin in (sys.executable, LIBRARY and LIBRARY.origin) if origin]
"""Real files that every machine with this environment has: the largest one is moved."""
TOOL = [sys.executable, "-c", "from peermem.cli import main; main()"]


def main() -> int:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else max(EVERYWHERE, key=lambda file: file.stat().st_size)
    try:
        data = path.read_bytes()
    except OSError as error:
        print(f"{path} can't be read: {error.strerror}.", file=sys.stderr)
        return 2
    if not data:
        print(f"{path} is empty: name a file with bytes in it.", file=sys.stderr)
        return 2
    device = f'[[device]]\nname = "bar0"\nsize = "{max(1024, 4 * len(data) >> 20)}MiB"'
    with (
        tempfile.TemporaryDirectory(prefix="peermem-demo-") as folder,
        daemons(Path(folder), ("a", "b", "c"), device) as nodes,
    ):
        same = move(nodes, path, data)
        for how, destination in (("tcp, node a to node b", "nodes/b"), ("local, inside node a", "nodes/a")):
            print(f"\n{how}:", flush=True)
            table(nodes["a"], destination)
        page = nodes["a"].scrape()
        moved = sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(COUNTER))
        print(f"\nhttp://{nodes['a'].http}/metrics counted {format_size(int(moved))} moved by node a.")
    print("The daemons are stopped." if same else "The bytes DIFFER.")
    return 0 if same else 1


COUNTER = "peermem_transfer_bytes_total{"


def move(nodes: dict[str, Daemon], path: Path, data: bytes) -> bool:
    wanted = hashlib.sha256(data).hexdigest()
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    print(f"{shown}, {format_size(len(data))}, SHA-256 {wanted[:16]}…")
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


def table(node: Daemon, destination: str) -> None:
    sizes = ("--sizes", "4KiB,64KiB,1MiB,64MiB,256MiB", "--seconds", "1s")
    subprocess.run([*TOOL, "--target", node.target, "bench", "nodes/a", destination, *sizes], check=True)


if __name__ == "__main__":
    sys.exit(main())
