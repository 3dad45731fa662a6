"""What can be planted is what daemons know, beside faults that there are."""

from __future__ import annotations

import pytest

from peermem.core.failpoints import FailOrder
from tests.chaos.faults import KINDS
from tests.chaos.plants import PLANTS, Plant


@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS.keys())
def test_a_plant_can_be_planted(plant: Plant) -> None:
    assert [FailOrder.parse(each).times != 0 for each in plant.failpoints] == [True] * len(plant.failpoints)
    assert set(plant.among) <= {kind for kind, _ in KINDS}
    assert plant.found
    assert plant.opens or plant.failpoints
