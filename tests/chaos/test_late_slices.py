"""Slices that come late: fenced out, unless a defect is planted that lets them in. Real daemons, and no chance."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy
import pytest

import peermem
from peermem import errors
from tests.chaos.cluster import cluster
from tests.chaos.plants import PLANTS
from tests.chaos.proxy import Mode
from tests.e2e.support import eventually

LENGTH = 2 << 20


@pytest.mark.parametrize("plant", ["", "no-fence", "revoke-ignored"])
def test_what_is_late_lands_only_where_a_defect_is_planted(plant: str) -> None:
    failpoints = PLANTS[plant].failpoints if plant else ()
    with TemporaryDirectory(prefix="late-") as folder, cluster(Path(folder), ("a", "b"), failpoints) as run:
        a, b = (peermem.connect(run.daemons[node].target) for node in ("a", "b"))
        with a, b:
            source, sink = (node.create_region(device="bar0", length=LENGTH) for node in (a, b))
            source.write(b"late")
            view = numpy.frombuffer(sink.map(), dtype=numpy.uint8)
            run.fabric["b"].set(Mode.BULK_LATE)
            transfer = a.transfer(source, sink)
            with suppress(errors.Timeout):
                transfer.wait("1s")  # the slices are on the wire, and given up after the stall timeout
            assert transfer.cancel("60s").state == "CANCELLED"
            view[:] = 0xEE
            run.fabric["b"].set(Mode.OPEN)
            if plant:
                eventually(lambda: (view != 0xEE).any(), "the late write")
            else:
                a.transfer(source[0:4096], sink[0:4096]).wait("60s")
                view[:4096] = 0xEE
                assert (view == 0xEE).all()
