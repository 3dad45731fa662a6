"""Networks that lose packets, links that go down, daemons that die: what transfers say, and what is left afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass

import numpy
import pytest

import peermem
from peermem import FabricKind, Region, errors
from tests.e2e.support import eventually, moving
from tests.lab.guest import nodes
from tests.lab.guest.conftest import Figures
from tests.lab.guest.nodes import HOST, MIB, PATIENCE, Lab, held, noise, sample, until_held

pytestmark = pytest.mark.timeout(300)

BIG = 128 * MIB
STALL, GRANT = 5.0, 15.0
SLACK = 20.0
"""Seconds that an emulated machine is late."""
CONFIG = f"""
[verbs]
stall_timeout = "{STALL:.0f}s"
[transfer]
grant_ttl = "{GRANT:.0f}s"
link_idle = "1s"
"""
VERBS = FabricKind.VERBS


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with nodes.lab(tmp_path_factory.mktemp("faults"), CONFIG) as lab:
        yield lab


@dataclass
class Baseline:
    """What the daemons held before a test, which they must hold again after it."""

    lab: Lab
    before: dict[str, dict[str, object]]

    def wait(self) -> None:
        """Wait until nothing is left over."""
        for name, expected in self.before.items():
            until_held(self.lab, name, expected)


@pytest.fixture
def baseline(lab: Lab) -> Iterator[Baseline]:
    nodes.until_idle(lab)
    baseline = Baseline(lab, {name: held(lab, name) for name in ("a", "b")})
    yield baseline
    baseline.wait()


@contextmanager
def regions(lab: Lab, order: str, length: int) -> Iterator[tuple[Region, Region]]:
    """Make a region on a and one on b; yield them as source and destination of a transfer that a runs."""
    here, there = (lab.nodes[name].create_region(device=HOST, length=length) for name in ("a", "b"))
    try:
        yield (here, there) if order == "push" else (there, here)
    finally:
        for region in (here, there):
            with suppress(errors.RegionNotFound, errors.NodeUnreachable):  # its daemon may have been killed
                region.delete(force=True)


def works(lab: Lab, order: str = "push") -> None:
    """Move some bytes over verbs, as soon as there is a link again."""

    def try_once() -> bool:
        try:
            return lab.nodes["a"].transfer(x, y, checksum=True).wait(PATIENCE).fabric is VERBS
        except errors.NodeUnreachable:
            return False

    with regions(lab, order, MIB) as (x, y):
        x.write(noise(MIB))
        eventually(try_once, "verbs again", 60)
        assert y.read() == noise(MIB)


@pytest.mark.parametrize("how", ["loss 1%", "delay 5ms", "delay 5ms reorder 2%"])
def test_a_bad_network(lab: Lab, baseline: Baseline, how: str, figures: Figures) -> None:
    begun = time.monotonic()
    half, size, stride = MIB, 512, 1024
    with nodes.netem(*how.split()):
        for order in ("push", "pull"):
            with regions(lab, order, 2 * half) as (x, y):
                pattern = noise(2 * half)
                x.write(pattern)
                large = lab.nodes["a"].transfer(x[:half], y[:half], checksum=True)
                strides = peermem.Strided(x, y, size, half // stride, stride, stride, half, half)
                small = lab.nodes["a"].transfer(segments=[strides], checksum=True)
                assert {large.wait(PATIENCE).fabric, small.wait(PATIENCE).fabric} == {VERBS}
                expected = numpy.frombuffer(pattern, numpy.uint8).copy()
                expected[half:].reshape(-1, stride)[:, size:] = 0
                assert y.read() == expected.tobytes()
    figures(f"netem_{how.replace(' ', '_').replace('%', '')}", {"seconds": time.monotonic() - begun})


def test_subjects_have_links_and_domains_of_their_own_and_leave_nothing(lab: Lab, baseline: Baseline) -> None:
    """Over TCP whoever asks is nobody in particular here, and over the attach socket root."""

    def objects() -> dict[str, float]:
        return {kind: sample(lab.daemons["a"], "peermem_verbs_objects", kind=kind) for kind in ("pd", "mr")}

    def have_both_moved() -> bool:
        x.write(noise(MIB))
        running = [node.transfer(x[at : at + half], y[at : at + half]) for node, at in askers.items()]
        assert {transfer.wait(PATIENCE).fabric for transfer in running} == {VERBS}
        links = [sample(lab.daemons[name], "peermem_links", fabric="verbs") for name in ("a", "b")]
        both = {"pd": 2 * alone["pd"], "mr": 2 * alone["mr"]}
        return links == [2, 2] and objects() == both  # unless one has ended by now

    half = MIB // 2
    with peermem.connect(lab.daemons["a"].grpc, attach=False) as nobody, regions(lab, "push", MIB) as (x, y):
        alone, askers = objects(), {lab.nodes["a"]: 0, nobody: half}
        assert alone["pd"] == 2, "one on each NIC"
        eventually(have_both_moved, "links and domains of two subjects", 60)
        assert y.read() == noise(MIB)


@contextmanager
def port_down() -> Iterator[None]:
    """The cables are pulled: both ends see it."""
    with nodes.nics_down("b"):
        yield


@contextmanager
def silence() -> Iterator[None]:
    """A switch between the nodes fails: nothing arrives, and no port is down."""
    with nodes.netem("loss", "100%"):
        yield


@contextmanager
def no_network() -> Iterator[None]:
    """Nothing of node b is reached any more, its daemon included."""
    nodes.command("ip", "link", "set", "m2", "down")
    try:
        with nodes.nics_down("b"):
            yield
    finally:
        nodes.command("ip", "link", "set", "m2", "up")


Outage = Callable[[], AbstractContextManager[None]]
outages = pytest.mark.parametrize(
    ("outage", "order"), [(port_down, "push"), (silence, "push"), (silence, "pull"), (no_network, "pull")]
)


@outages
def test_an_outage_of_two_seconds(lab: Lab, baseline: Baseline, outage: Outage, order: str, figures: Figures) -> None:
    with regions(lab, order, BIG) as (x, y):
        pattern = noise(MIB)
        for start in range(0, BIG, 16 * MIB):
            x.write(pattern, start)
        transfer = lab.nodes["a"].transfer(x, y, checksum=True)
        moving(transfer)
        over = threading.Event()
        with outage():
            over.wait(2.0)
            assert transfer.progress.bytes_done < BIG
        outcome = "survived"
        try:
            transfer.wait(PATIENCE)
        except errors.NodeUnreachable as error:
            outcome = error.message
        if outcome == "survived":
            assert all(y.read(start, MIB) == pattern for start in range(0, BIG, 16 * MIB))
        else:
            assert 0 < transfer.progress.bytes_done < BIG
        figures(f"outage_of_2_s_{outage.__name__}_{order}", {"outcome": outcome})
    works(lab, order)


@outages
def test_an_outage_without_end(lab: Lab, baseline: Baseline, outage: Outage, order: str, figures: Figures) -> None:
    with regions(lab, order, BIG) as (x, y):
        transfer = lab.nodes["a"].transfer(x, y)
        moving(transfer)
        with outage():
            begun = time.monotonic()
            with pytest.raises((errors.NodeUnreachable, errors.FabricUnavailable)) as caught:
                transfer.wait(PATIENCE)
            seconds = time.monotonic() - begun
        assert seconds < STALL + GRANT + SLACK
        figures(f"outage_without_end_{outage.__name__}_{order}", {"seconds": seconds})
        assert 0 < int(caught.value.metadata["bytes_done"]) < BIG
        cause = "nodes/b" if isinstance(caught.value, errors.NodeUnreachable) else "is not active"
        assert cause in caught.value.message  # the port here may be what is down
    works(lab, order)


@pytest.mark.parametrize("order", ["push", "pull"])
@pytest.mark.parametrize("victim", ["a", "b"])
def test_a_daemon_that_is_killed(lab: Lab, baseline: Baseline, victim: str, order: str) -> None:
    survivor = {"a": "b", "b": "a"}[victim]
    pid = lab.daemons[survivor].pid
    with regions(lab, order, BIG) as (x, y):
        transfer = lab.nodes["a"].transfer(x, y)
        moving(transfer)
        lab.daemons[victim].kill()
        with pytest.raises(errors.NodeUnreachable):
            transfer.wait(PATIENCE)
        assert 0 < transfer.progress.bytes_done < BIG
        eventually(lambda: not any(any(kinds.values()) for kinds in nodes.resources(victim).values()), "cleaned up")
    until_held(lab, survivor, baseline.before[survivor])
    lab.restart(victim)
    works(lab, order)
    assert lab.daemons[survivor].pid == pid


@pytest.mark.parametrize("order", ["push", "pull"])
def test_a_region_deleted_in_the_middle_ends_its_transfer_alone(lab: Lab, baseline: Baseline, order: str) -> None:
    length = 96 * MIB
    with regions(lab, order, length) as (x, y), regions(lab, order, length) as (source, sink):
        x.write(noise(MIB), length - MIB)
        other = lab.nodes["a"].transfer(x, y)
        doomed = lab.nodes["a"].transfer(source, sink)
        moving(other)
        moving(doomed)
        assert doomed.info().state == other.info().state == "RUNNING", (doomed.info(), other.info())
        pairs = nodes.queue_pairs("a")
        (sink if order == "push" else source).delete(force=True)
        with pytest.raises(errors.RegionDeleted) as caught:
            doomed.wait(PATIENCE)
        assert int(caught.value.metadata["bytes_done"]) < length
        assert other.wait(PATIENCE).fabric is VERBS
        assert nodes.queue_pairs("a") == pairs  # the link of before
        assert y.read(length - MIB, MIB) == noise(MIB)
        assert lab.nodes["a"].transfer(x[:MIB], y[:MIB], checksum=True).wait(PATIENCE).fabric is VERBS
