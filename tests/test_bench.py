from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from bench import bars, processes, report, rounds, run
from bench.bars import NIXL_SHM, NIXL_TCP, SENDFILE, ours
from bench.echo import ECHO
from bench.figures import Sample, Series, Shape, parse, percentile, sample
from bench.health import Health
from bench.scale import Costs, Plan, Scale
from bench.transfers import Layout

PRINTED = """\
2026-01-01 00:00:00 ENGINE INFO started: 2 x4
nixl[tcp,self] 65536 x256: 1.546 GB/s p50 8477.1 us p99 19362.0 us
nixl[tcp,self] 4096 x1: 0.08 GB/s p50 25.0 us p99 31272.2 us
"""
ECHO_ENGINE = """
import sys
for case in sys.argv[1:]:
    size, segments, iterations = case.split(":")
    print(f"mine[x] {size} x{segments}: 2.000 GB/s p50 10.0 us p99 11.0 us")
"""


def engine(folder: Path, program: str) -> str:
    script = folder / "an engine.py"
    script.write_text(program)
    return f"{sys.executable} '{script}'"


def series(mine: list[float], theirs: list[float]) -> Series:
    """Return rounds of one shape in GB/s; a transfer of ours takes a third of the time that theirs takes."""
    made = Series()
    for rate in mine:
        made.add(ours("tcp", Layout.CONTIGUOUS), {bars.ONE_64M: Sample(rate * 1e9, 0.01)})
    for rate in theirs:
        made.add(NIXL_TCP, {bars.ONE_64M: Sample(rate * 1e9, 0.03)})
    return made


def bar(made: Series, name: str, health: Health | None = None, scale: Scale | None = None) -> bars.Bar:
    return next(each for each in bars.bars(made, health, scale) if each.name == name)


def test_what_engines_print_is_parsed_and_other_lines_are_passed_over() -> None:
    assert parse(PRINTED) == {
        Shape(65536, 256): Sample(1.546e9, 8477.1 * 1e-6),
        Shape(4096): Sample(0.08e9, 25.0 * 1e-6),
    }


def test_bandwidth_is_of_the_mean_time_and_p50_of_the_median() -> None:
    assert sample(100, [1.0, 1.0, 4.0]) == Sample(50.0, 1.0)
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0


def test_the_median_of_the_rounds_is_compared_with_the_bar() -> None:
    met = bar(series([3.0, 9.0, 1.0], [2.5, 2.0, 2.0]), "tcp, 1 x 64MiB")
    assert (met.ratio, met.met, met.rounds) == (1.5, True, (0.5, 4.5))
    assert met.p50_ratio == pytest.approx(3.0)
    assert bar(series([2.9], [2.0]), "tcp, 1 x 64MiB").met is False


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    assert bar(series([3.0], []), "tcp, 1 x 64MiB").met is None
    assert {each.met for each in bars.bars(Series(), None, None) if each.reference != "the bar"} == {None}


def test_the_limit_tells_which_part_of_it_is_reached() -> None:
    made = series([3.0], [2.0])
    made.add(SENDFILE, {Shape(64 << 20): Sample(4e9, 0.01)})
    assert bar(made, "tcp, 1 x 64MiB").limit == "loopback, sendfile: 4.00 GB/s, of which 75% is reached"


def test_absolute_bars_are_ratios_with_the_bar() -> None:
    health = Health(p99=0.06, p50=0.01, slowest=0.07, checks=100, bandwidth=2e9, small_rate=300.0)
    assert bar(Series(), "health check while transfers saturate, p99", health).met is False
    few, many = Costs(1e-3, 1e-5, 1e-4), Costs(1.4e-3, 2e-5, 1e-4)
    scale = Scale(Plan(), few, many, memory=100 << 20, settled=100 << 20, after=101 << 20)
    met = [each.met for each in bars.bars(Series(), None, scale) if each.met is not None]
    assert met == [True, False, True, True, True]


def found(made: Series, *failures: str) -> report.Run:
    return report.Run("2 cores", {NIXL_TCP}, 1, made, bars.bars(made, None, None), failures)


def test_the_report_has_each_bar_and_the_command_that_makes_it() -> None:
    made = found(series([3.0], [2.0]), "A sentence.")
    text = report.as_markdown(made)
    assert "| tcp, 1 x 64MiB | 3.00 GB/s | 2.00 GB/s (NIXL, UCX tcp) | 1.50 |" in text
    assert "1 of 1 measured bars are met. NIXL, shared memory was not given. Mooncake tcp was not given. A s" in text
    assert "$ make bench ARGS='--nixl-tcp \"NIXL_TCP_COMMAND\"'\n" in text
    assert json.loads(json.dumps(report.as_json(made)))["bars"][1]["ratio"] == 1.5
    assert len(report.as_text(made).splitlines()) == 1 + len(made.bars) + len(made.remarks)


def test_a_bar_that_is_not_met_or_an_engine_that_failed_is_told_by_the_exit_code() -> None:
    missed = found(series([2.0], [2.0]))
    assert run.exit_code(found(series([3.0], [2.0])), no_fail=False) == 0
    assert run.exit_code(missed, no_fail=False) == 1
    assert run.exit_code(missed, no_fail=True) == 0
    assert run.exit_code(found(series([3.0], [2.0]), "It failed."), no_fail=True) == 2


def test_an_engine_is_given_each_shape_and_its_figures_are_taken(tmp_path: Path) -> None:
    measured = processes.engine(engine(tmp_path, ECHO_ENGINE), {Shape(4096): 3, Shape(65536, 256): 2})
    assert measured == {shape: Sample(2e9, 10.0 * 1e-6) for shape in (Shape(4096), Shape(65536, 256))}


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("raise SystemExit('no library')", "it ended with 1: no library"),
        ("print('nothing of use')", "it printed 0 of 1 results"),
        ("import threading; threading.Event().wait()", "it did not end within 1 s"),
    ],
)
def test_an_engine_that_fails_says_why(tmp_path: Path, program: str, why: str) -> None:
    with pytest.raises(processes.EngineFailed, match=why):
        processes.engine(engine(tmp_path, program), {Shape(4096): 3}, timeout=1.0)


def test_an_engine_that_is_not_there_says_so() -> None:
    with pytest.raises(processes.EngineFailed, match="can't be run"):
        processes.engine("/nonexistent/engine", {Shape(4096): 3})


def test_a_round_measures_transfers_engines_and_limits_and_leaves_a_broken_engine_out(tmp_path: Path) -> None:
    engines = {NIXL_TCP: engine(tmp_path, ECHO_ENGINE), NIXL_SHM: "/nonexistent/engine"}
    shapes = {Shape(4096): 3, Shape(4096, 16): 3}
    made, failures = rounds.measure(tmp_path, engines, 2, 1.0, shapes)
    assert failures == [f"{NIXL_SHM} failed: it can't be run: No such file or directory."]
    for fabric in ("tcp", "local"):
        for layout in Layout:
            assert len(made.rounds(ours(fabric, layout), Shape(4096, 16))) == 2
    assert made.median(NIXL_TCP, Shape(4096)) == Sample(2e9, 10.0 * 1e-6)
    for source in (bars.SENDFILE, bars.SENDMSG, bars.COPY_1, bars.COPY_2):
        assert made.median(source, Shape(16 * 4096))
    assert made.median(bars.UNARY, ECHO)
    assert made.median(bars.STREAM, ECHO)


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main(["--only", "everything"])
    assert "'health', 'scale'" in capsys.readouterr().err
