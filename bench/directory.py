"""A cluster's directory at its full size: `python -m bench.directory [--nodes N] [--watching W] ...`.

Rules of this file:

* One real etcd with its data on this disk, and one real daemon that joins it; all other nodes are clients of the
  directory, the daemon's own code, many to a process. All of it shares this machine.
* A time is from an order to the moment at which the last of all nodes has or knows what was ordered.
* Idle means that nothing happens but what keeps the cluster known.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import ProxyHandler, build_opener

import peermem
from bench import directory_nodes
from bench.daemons import Daemon, daemons
from bench.etcd import EtcdServer, etcd_server
from bench.machine import machine
from bench.progress import say
from bench.scale import own_memory
from bench.sections import with_section
from peermem.core.units import format_size
from peermem.directory.etcd import Settings

HEADING = "## Measured"
_RESULTS = Path(__file__).parents[1] / "docs/scale.md"
_IDLE = 15.0
"""Seconds for which nothing happens."""
_ROUNDS = 20
_ETCD = ("--heartbeat-interval=100", "--election-timeout=1000", "--quota-backend-bytes=8589934592")
_TICKS = os.sysconf("SC_CLK_TCK")
Row = tuple[str, str]


class Cluster:
    """The simulated nodes."""

    def __init__(self, settings: Settings, arguments: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
        self._ends = []
        self._processes = []
        sizes = arguments.nodes, arguments.regions, arguments.watching, arguments.processes
        for share in directory_nodes.shares(settings, *sizes):
            mine, theirs = context.Pipe()
            process = context.Process(target=directory_nodes.run, args=(theirs, share), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(mine)
            self._processes.append(process)

    def all(self, order: str, *arguments: object) -> list[Any]:
        """Give all processes an order, and return their answers."""
        for end in self._ends:
            end.send((order, *arguments))
        return [end.recv() for end in self._ends]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


@contextmanager
def _cluster(settings: Settings, arguments: argparse.Namespace) -> Iterator[Cluster]:
    made = Cluster(settings, arguments)
    try:
        yield made
    finally:
        made.close()


def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Yield rows of a table."""
    with etcd_server(folder / "etcd", _ETCD) as etcd:
        chosen = Settings([etcd.endpoint], "/peermem/v1", "default", lease=15, max_published=arguments.regions)
        environ = {
            "PEERMEM_DIRECTORY_KIND": "etcd",
            "PEERMEM_DIRECTORY_NODES": "{}",
            "PEERMEM_DIRECTORY_ETCD_ENDPOINTS": f'["{etcd.endpoint}"]',
        }
        with (
            daemons(folder, ("alone",)) as alone,
            daemons(folder, ("real",), environ=environ) as real,
            _cluster(chosen, arguments) as cluster,
        ):
            yield from _rows(arguments, etcd, cluster, alone["alone"], real["real"])


def _rows(
    arguments: argparse.Namespace, etcd: EtcdServer, cluster: Cluster, alone: Daemon, real: Daemon
) -> Iterator[Row]:
    nodes, regions = arguments.nodes, arguments.regions
    say(f"connecting {nodes} nodes")
    cluster.all("open")
    began, spent = time.monotonic(), _cpu(etcd.pid)
    joins = cluster.all("join", nodes + 1)
    yield f"{nodes} nodes join at once: all have joined", _seconds(max(joined for joined, _ in joins) - began)
    yield f"and all {arguments.watching} that follow know all", _seconds(max(known for _, known in joins) - began)
    yield "etcd's CPU for these joins", _seconds(_cpu(etcd.pid) - spent)
    say("regions")
    began, spent = time.monotonic(), _cpu(etcd.pid)
    written = max(cluster.all("publish")) - began
    yield f"{nodes * regions} regions with 2 labels each are published: all are written", _seconds(written)
    yield "etcd's CPU for these regions", _seconds(_cpu(etcd.pid) - spent)
    yield "keys in etcd", str(_count(etcd))
    yield "etcd's data, in use", format_size(int(_metric(etcd, "etcd_mvcc_db_total_size_in_use_in_bytes")))
    yield "etcd's memory", format_size(own_memory(etcd.pid))
    yield from _found(real, regions * nodes)
    yield from _idle(etcd, alone, real, nodes)
    leaving = max(1, nodes // 10 // arguments.processes)  # of each process
    began = time.monotonic()
    cluster.all("leave", leaving)
    left = nodes + 1 - leaving * arguments.processes
    known = max(cluster.all("knows", left)) - began
    yield f"{leaving * arguments.processes} nodes leave with their regions: all that follow know", _seconds(known)
    counts = [sum(each[name] for each in cluster.all("counts")) for name in ("failed_renewals", "lost_leases")]
    yield "renewals that failed, leases lost, in all of this", f"{counts[0]}, {counts[1]}"


def _found(real: Daemon, whole: int) -> Iterator[Row]:
    """Look for regions through the real daemon."""
    with peermem.connect(real.target) as node:
        for what, labels in (
            ("of a label that a thousandth has", {"model": "m7"}),
            ("of two labels, the rarer of which a thousandth has", {"model": "m7", "step": "7"}),
            ("of a label that nobody has", {"model": "none"}),
        ):
            times = [_timed(lambda labels=labels: len(list(node.find_regions(labels)))) for _ in range(_ROUNDS)]  # type: ignore[misc]
            count = times[0][1]
            yield f"find the {count} regions {what}", f"{median(seconds for seconds, _ in times) * 1e3:.1f} ms"
        seconds, count = _timed(lambda: len(list(node.find_regions())))
        assert count == whole
        yield f"read all {count} regions, as a search without an index would", _seconds(seconds)


def _idle(etcd: EtcdServer, alone: Daemon, real: Daemon, nodes: int) -> Iterator[Row]:
    """See what it takes to keep the cluster known."""
    say(f"idle for {_IDLE:g} s")
    before = [_cpu(pid) for pid in (etcd.pid, real.pid, alone.pid)], _renewals(etcd)
    time.sleep(_IDLE)
    after = [_cpu(pid) for pid in (etcd.pid, real.pid, alone.pid)], _renewals(etcd)
    of_etcd, of_real, of_alone = ((now - then) / _IDLE for now, then in zip(after[0], before[0], strict=True))
    yield "idle: renewals that etcd answers", f"{(after[1] - before[1]) / _IDLE:.0f}/s"
    yield "idle: etcd's CPU", f"{of_etcd:.1%} of a core"
    yield "idle: the real daemon's CPU, and of one without etcd", f"{of_real:.2%} and {of_alone:.2%} of a core"
    grown = own_memory(real.pid) - own_memory(alone.pid)
    yield f"the real daemon's memory, above one that knows no nodes, for {nodes} nodes", format_size(max(0, grown))
    yield "its open descriptors, and those of one that knows no nodes", f"{_files(real)} and {_files(alone)}"
    with peermem.connect(real.target) as node:
        info = node.info()
        yield "its links, with nothing moving", str(info.link_count)
        times = [_timed(node.nodes)[0] for _ in range(_ROUNDS)]
        yield f"ListNodes with {len(node.nodes())} nodes", f"{median(times) * 1e3:.1f} ms"


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def _seconds(value: float) -> str:
    return f"{value:.1f} s"


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _files(daemon: Daemon) -> int:
    return len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))


def _page(etcd: EtcdServer) -> str:
    with build_opener(ProxyHandler({})).open(f"http://{etcd.endpoint}/metrics", timeout=30) as page:
        text: str = page.read().decode()
        return text


def _metric(etcd: EtcdServer, start: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in _page(etcd).splitlines() if line.startswith(start))


def _renewals(etcd: EtcdServer) -> float:
    return _metric(etcd, 'grpc_server_msg_sent_total{grpc_method="LeaseKeepAlive"')


def _count(etcd: EtcdServer) -> int:
    return int(etcd.ask("kv/range", key=b"/", range_end=b"0", count_only=True)["count"])


def section(rows: Sequence[Row], arguments: argparse.Namespace) -> str:
    """Return the section of docs/scale.md."""
    sizes = f"--nodes {arguments.nodes} --regions {arguments.regions} --watching {arguments.watching}"
    command = f"python -m bench.directory {sizes}"
    lines = [
        HEADING,
        "",
        f"`{command} --processes {arguments.processes}`, on {machine()}.",
        "etcd, the real daemon and all simulated nodes share that machine and its two cores, so that times are upper",
        f"bounds of what as many hosts need. {arguments.watching} nodes follow the others, as all do in a cluster;",
        "the rest is known, renews its lease and publishes.",
        "",
        "| what | figure |",
        "|---|---|",
        *(f"| {what} | {figure} |" for what, figure in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, and write the section."""
    parser = argparse.ArgumentParser(prog="bench.directory", description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--regions", type=int, default=100, help="of each node")
    parser.add_argument(
        "--watching", type=int, default=1000, help="nodes that follow the others, as all do in a cluster"
    )
    parser.add_argument("--processes", type=int, default=4, help="that simulate the nodes")
    parser.add_argument("--write", action="store_true", help=f"write the section into {_RESULTS.name}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for row in measure(arguments, Path(folder)):
            rows.append(row)
            print(f"{row[0]}: {row[1]}", flush=True)
    if arguments.write:
        _RESULTS.write_text(with_section(_RESULTS.read_text(), HEADING, section(rows, arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
