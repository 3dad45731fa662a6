"""What the comparison between tenants tells, from figures that are given."""

from __future__ import annotations

from bench.fairness import HEADING, Round, Times, section


def measured(p99: float) -> Round:
    alone, beside = Times(0.001, 0.002, 100), Times(0.001, p99, 100)
    return Round(alone, beside, Times(0.005, 0.02, 100), bandwidth=float(1 << 20) / 0.001)


def test_the_bar_is_twice_the_p99_alone_and_a_slice() -> None:
    assert measured(0.005).slice_time == 0.001
    assert measured(0.005).share == 1.0
    assert measured(0.010).share == 2.0


def test_the_median_of_the_rounds_decides() -> None:
    text = section([measured(0.004), measured(0.005), measured(0.020)], "a machine", " It was busy.")
    assert text.startswith(f"{HEADING}\n\nMade by `python -m bench.fairness` (3 rounds) on a machine. It was busy.\n")
    assert "| 1 | 1.0ms · 2.0ms | 1.0ms · 4.0ms | 5.0ms · 20.0ms | 1.05 GB/s | 1.0ms | 0.80 |" in text
    assert text.endswith("Of what the bar allows, the median is 1.00 (0.80 to 4.00): met.\n")
    assert "NOT MET" in section([measured(0.006)], "a machine", "")
