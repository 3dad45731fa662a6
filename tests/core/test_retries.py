from hypothesis import given
from hypothesis import strategies as st

from peermem.core.retries import Backoff, Patience, RailHealth

chances = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@given(chances)
def test_pauses_grow_up_to_a_bound_and_chance_shortens_them(chances: list[float]) -> None:
    backoff = Backoff(0.5, 8.0)
    for attempt, chance in enumerate(chances):
        bound = min(0.5 * 2**attempt, 8.0)
        assert bound / 2 <= backoff.pause(chance) <= bound
    backoff.reset()
    assert backoff.pause(0.0) == 0.5


def test_patience_counts_from_the_first_failure_since_something_moved() -> None:
    patience = Patience(10.0)
    assert patience.left(100.0) == 10.0
    patience.broke(100.0)
    patience.broke(104.0)
    assert patience.left(107.0) == 3.0
    assert patience.left(200.0) == 0.0
    patience.moved()
    assert patience.left(200.0) == 10.0


def test_a_rail_that_breaks_again_and_again_is_set_aside_for_longer() -> None:
    health = RailHealth()
    pauses = []
    for now in range(0, 40, 2):
        health.came_up(float(now))
        pauses.append(health.failed(now + 1.0, 0.0))
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[1], pauses[-1]) == (RailHealth.SHORTEST, 2 * RailHealth.SHORTEST, RailHealth.LONGEST)


def test_a_rail_that_held_long_enough_begins_anew() -> None:
    health = RailHealth()
    for now in range(5):
        health.failed(float(now), 0.0)
    health.came_up(10.0)
    assert health.failed(10.0 + RailHealth.PROVEN / 2, 0.0) > RailHealth.SHORTEST
    health.came_up(30.0)
    assert health.failed(30.0 + RailHealth.PROVEN, 0.0) == RailHealth.SHORTEST
