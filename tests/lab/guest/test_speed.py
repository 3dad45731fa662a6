"""How fast the fabric and the daemons are, beside perftest and bare pyverbs on the same NICs in the same boot.

Rules of this file:

* What is compared takes turns, round by round; the median of the rounds decides. Absolute figures say nothing.
* A bar that is not met is written down as not met (`bench/RESULTS.md` tells it). It fails the test when even the best
  round misses it by FAR: the guest's processors are threads of a host that may do something else in any round.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median

import grpc
import pytest
from bench import echo
from bench.bars import Bar
from bench.figures import percentile

from peermem import Region
from peermem.device.word_copier import Words
from peermem.fabric.base import Opcode
from peermem.memory import HostMemory
from tests.lab.guest import nodes, perftest
from tests.lab.guest.conftest import Figures
from tests.lab.guest.ends import End
from tests.lab.guest.nodes import MIB, PATIENCE, Lab
from tests.lab.guest.speed_memory import SLICE

pytestmark = pytest.mark.timeout(400)

ROUNDS = 3
FAR, FAR_SMALL = 2.0, 4.0
SLICES = 64
"""Of 1 MiB, in one measurement."""
LARGE, SEGMENT, SEGMENTS = 256 * MIB, 64 << 10, 512
STAGED = nodes.BAR_BYTES
REGISTERED = 1 << 30
PORTS = {"a": "rxe1/1", "b": "rxe2/1"}

Bars = Callable[..., None]


@pytest.fixture(scope="module")
def bars(figures: Figures) -> Bars:
    """Return what writes a bar down: its file, what a Bar has, and what was measured round by round."""

    def write(name: str, what: str, ours: list[float], theirs: list[float], **fields: object) -> None:
        ratios = sorted(each / other for each, other in zip(ours, theirs, strict=True))
        fields = {"unit": "bytes/s", "at_least": True, "rounds": (ratios[0], ratios[-1])} | fields
        bar = Bar(what, figure=median(ours), reference_figure=median(theirs), **fields)  # type: ignore[arg-type]
        figures(name, asdict(bar) | {"ratio": bar.ratio, "met": bar.met, "ours": ours, "theirs": theirs})
        assert not bar.at_least or ratios[-1] >= bar.bound / FAR

    return write


@pytest.fixture
def processors_awake() -> Iterator[None]:
    """Keep the processors busy with what gives way to everything: an emulated one that halts between two packets is
    woken by the host, which takes longer than the packet. Both sides of a comparison are measured so."""
    loop = ("chrt", "--idle", "0", "sh", "-c", "while :; do :; done")
    idlers = [subprocess.Popen(["taskset", "--cpu-list", str(cpu), *loop]) for cpu in sorted(os.sched_getaffinity(0))]
    yield
    for idler in idlers:
        idler.kill()
        idler.wait()


@pytest.fixture(scope="module")
def lab(out: Path) -> Iterator[Lab]:
    large = f'[[device]]\nname = "large"\nsize = "{REGISTERED >> 20}MiB"\n'
    places = {node: nodes.place(node, f'[verbs]\nnics = ["{port}"]\n{large}') for node, port in PORTS.items()}
    folder = out / "nodes"  # their logs come out
    folder.mkdir(exist_ok=True)
    with nodes.lab(folder, places=places) as lab:
        yield lab


# The fabric itself


@pytest.fixture(scope="module")
def fabric(lab: Lab) -> Iterator[tuple[End, End]]:
    """Return a link's near and far end, which are gone when the nodes are seen to hold nothing any more."""
    with End("n1", "speed_fabric", PORTS["a"]) as near, End("n2", "speed_fabric", PORTS["b"]) as far:
        near("start")
        far("start")
        near("connect", far("accept", near("offer")))
        yield near, far


@contextmanager
def bare_ends() -> Iterator[tuple[End, End]]:
    with End("n1", "speed_bare", "rxe1") as near, End("n2", "speed_bare", "rxe2") as far:
        here, there = near("end"), far("end")
        near("connect", *there)
        far("connect", *here)
        yield near, far


def moved(ends: tuple[End, End], kind: str, key: object, opcode: Opcode, segment: int = SLICE) -> float:
    """Move slices between host memory of the near end and memory of the far one; return bytes per second."""
    near, far = ends
    if opcode is Opcode.WRITE:
        near("mark", "host", segment)
    else:
        far("mark", kind, segment)
    seconds: float = near("move", opcode, key, segment, SLICES)
    assert near("marks", "host", segment) == far("marks", kind, segment)
    return SLICES * SLICE / seconds


def test_small_writes(fabric: tuple[End, End], bars: Bars) -> None:
    """Being passed over once by the host takes longer than a write: the quickest tenth tells whether it is far off."""
    ours, quickest, reference = [], [], []
    near, key = fabric[0], fabric[1]("grant", "host")
    near("latencies", Opcode.WRITE, key, 64, 200)
    for _ in range(ROUNDS):
        reference.append(2 * perftest.typical_latency("ib_write_lat", 64, 1000))
        times = near("latencies", Opcode.WRITE, key, 64, 1000)
        ours.append(median(times))
        quickest.append(percentile(times, 0.1))
    what, bound = "verbs, WRITE of 64 bytes, post to completion, p50", 2.5
    bars("small_write", what, ours, reference, unit="s", at_least=False, bound=bound, reference="2 x ib_write_lat")
    assert min(quickest) <= bound * FAR_SMALL * median(reference)


@pytest.mark.usefixtures("processors_awake")
def test_bar_memory(fabric: tuple[End, End], bars: Bars) -> None:
    found: dict[Opcode, tuple[list[float], list[float]]] = {opcode: ([], []) for opcode in Opcode}
    with bare_ends() as bare:
        fabric_key, bare_key = fabric[1]("grant", "bar"), bare[1]("key", "bar")
        for _ in range(ROUNDS):
            for opcode, (ours, reference) in found.items():
                reference.append(moved(bare, "bar", bare_key, opcode))
                ours.append(moved(fabric, "bar", fabric_key, opcode))
    for opcode, measured in found.items():
        what = f"verbs, {'WRITE into' if opcode is Opcode.WRITE else 'READ from'} a BAR, 1 MiB each"
        bars(f"bar_{opcode.name.lower()}", what, *measured, bound=0.9, reference="bare pyverbs")


# The fabric and the daemons, beside perftest


@contextmanager
def regions(lab: Lab, source: str, sink: str, length: int) -> Iterator[tuple[Region, Region]]:
    a, b = lab.nodes["a"], lab.nodes["b"]
    with (
        a.create_region(device=lab.kinds[source].device, length=length) as x,
        b.create_region(device=lab.kinds[sink].device, length=length) as y,
    ):
        yield x, y


def transferred(lab: Lab, columns: tuple[Region, range, Region, range, int]) -> float:
    """Carry out one transfer; return bytes per second, from the request to the outcome."""
    began = time.perf_counter()
    info = lab.nodes["a"].transfer(segments=[columns], fabric="verbs").wait(PATIENCE)
    return info.bytes_total / (time.perf_counter() - began)


STREAMS = {
    "write": ("ib_write_bw", Opcode.WRITE, SLICE, 0.9),
    "read": ("ib_read_bw", Opcode.READ, SLICE, 0.9),
    "write_64k": ("ib_write_bw", Opcode.WRITE, SEGMENT, 0.8),
}


@pytest.mark.usefixtures("processors_awake")
@pytest.mark.parametrize("stream", STREAMS)
def test_streams(fabric: tuple[End, End], lab: Lab, bars: Bars, stream: str) -> None:
    tool, opcode, size, bound = STREAMS[stream]
    rounds: dict[str, list[float]] = {"perftest": [], "fabric": [], "daemons": []}
    key = fabric[1]("grant", "host")
    with regions(lab, "memfd", "memfd", LARGE) as (x, y):
        source, sink = (x, y) if opcode is Opcode.WRITE else (y, x)
        offsets = range(0, 1) if size == SLICE else range(0, 2 * SEGMENT * SEGMENTS, 2 * SEGMENT)
        columns = (source, offsets, sink, offsets, LARGE if size == SLICE else SEGMENT)
        for _ in range(ROUNDS):
            rounds["perftest"].append(perftest.bandwidth(tool, size, max(128, SLICES * SLICE // size)))
            rounds["fabric"].append(moved(fabric, "host", key, opcode, size))
            rounds["daemons"].append(transferred(lab, columns))
    of = "1 MiB each" if size == SLICE else "64 KiB each"
    whole = f"1 transfer of {'256 MiB' if size == SLICE else '512 x 64 KiB, scattered'}"
    name = {Opcode.WRITE: "WRITE, push", Opcode.READ: "READ, pull"}[opcode]
    fields = {"bound": bound, "reference": tool}
    bars(f"fabric_{stream}", f"verbs, {name[: name.index(',')]}, {of}", rounds["fabric"], rounds["perftest"], **fields)
    bars(f"daemons_{stream}", f"verbs, {name}, {whole}", rounds["daemons"], rounds["perftest"], **fields)


@pytest.mark.usefixtures("processors_awake")
@pytest.mark.parametrize("order", ["load", "store"])
def test_staged(lab: Lab, bars: Bars, order: str) -> None:
    """The slower half of a staged transfer, the other one being the wire, are the processor's copies of 8 bytes."""
    source, sink = ("staged", "memfd") if order == "load" else ("memfd", "staged")
    with regions(lab, source, sink, STAGED) as (x, y):
        whole = (x, range(1), y, range(1), STAGED)
        transferred(lab, whole)
        limit, ours = [], []
        for _ in range(ROUNDS):
            limit.append(copied(order))
            ours.append(transferred(lab, whole))
    what = f"STAGED, {'out of' if order == 'load' else 'into'} a BAR, 1 transfer of {STAGED >> 20} MiB"
    bars(f"staged_{order}", what, ours, limit, bound=0.8, reference="copies alone")


def copied(order: str) -> float:
    """Copy between a BAR and host memory as a daemon does and do nothing else; return bytes per second."""
    resource = Path("/sys/bus/pci/devices") / nodes.ivshmem() / "resource2"
    with resource.open("r+b", buffering=0) as file, closing(HostMemory(STAGED, "limit")) as memory:
        words = Words(mmap.mmap(file.fileno(), STAGED, offset=nodes.BAR_OFFSETS["a"]))
        began = time.perf_counter()
        (words.load if order == "load" else words.store)(memory.open_fd(), 0, 0, STAGED)
        return STAGED / (time.perf_counter() - began)


def test_registering(fabric: tuple[End, End], bars: Bars) -> None:
    length = REGISTERED // 4
    with bare_ends() as bare:
        pairs = [(fabric[0]("registering", length)[0], bare[0]("registering", length)) for _ in range(ROUNDS)]
    ours, reference = zip(*pairs, strict=True)
    fields = {"unit": "s", "at_least": False, "bound": 1.2, "reference": "ibv_reg_mr"}
    bars("register", f"registration of {length >> 20} MiB of fresh host memory", list(ours), list(reference), **fields)


# The control plane


def test_the_control_plane_stays_awake(fabric: tuple[End, End], lab: Lab, figures: Figures, tmp_path: Path) -> None:
    """The bar of 50 ms means nothing on an emulated processor: what counts is the same without the daemon's work."""
    with echo.server(tmp_path) as target:
        bare = answers(target, f"/{echo._SERVICE}/Unary", lambda: time.sleep(4))
    health = "/grpc.health.v1.Health/Check"
    idle = answers(lab.daemons["a"].target, health, lambda: time.sleep(4))
    busy = answers(lab.daemons["a"].target, health, lambda: registered(lab))
    seconds, pause = fabric[1]("registering", REGISTERED // 2)
    found = {"bare": bare, "idle": idle, "registering": busy}
    loop = {"bytes": REGISTERED // 2, "seconds": seconds, "longest_turn": pause}
    figures("awake", found | {"p99_ratio": busy["p99"] / bare["p99"], "fabric_alone": loop})


def registered(lab: Lab) -> None:
    with lab.nodes["a"].create_region(device="large", length=REGISTERED) as region:
        assert PORTS["a"] in region.nics


def answers(target: str, method: str, work: Callable[[], None]) -> dict[str, float]:
    """Call a method over and over while `work` is done; return what the calls took, in seconds."""
    times: list[float] = []
    with grpc.insecure_channel(target) as channel:
        call: Callable[..., bytes] = channel.unary_unary(method)
        for _ in range(10):
            call(b"", timeout=60)
        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive():
            began = time.perf_counter()
            call(b"", timeout=60)
            times.append(time.perf_counter() - began)
            time.sleep(0.001)
        thread.join()
    return {"p50": median(times), "p99": percentile(times, 0.99), "slowest": max(times), "calls": len(times)}
