"""Runs chaos: `python -m tests.chaos --seed N --seconds S`. Exit status 0 only if all was well.

Rules of this file:

* The seed is printed first, and with it the command that does the same again.
* It ends in time: what does not end by itself is killed, and told.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.cluster import Cluster, cluster
from tests.chaos.faults import Injector, Process
from tests.chaos.history import Held, Record, read
from tests.chaos.model import Model
from tests.chaos.outcome import Growth, Outcome, filled, passed_failpoints, recoveries, text, write

JOBS = 3
_ROOT = Path(__file__).parents[2]
_LAST_WORDS = 60.0
"""Seconds that jobs get to end."""
_WARM = 20.0
"""Seconds after which a daemon counts as warm, and its growth begins to count."""


class Run:
    """One run."""

    def __init__(self, options: argparse.Namespace, folder: Path, cluster: Cluster) -> None:
        self._options = options
        self._folder = folder
        self._cluster = cluster
        self._random = random.Random(options.seed)
        self._corrupts = self._random.random() < 0.34
        self._started = 0
        self._failed: list[str] = []
        jobs = [self._job(index) for index in range(JOBS)]
        self._injector = Injector(
            options.seed,
            cluster,
            jobs,
            self._job,
            corrupts=self._corrupts,
            spares_daemons=options.soak,
        )

    def _job(self, index: int) -> Process:
        number = self._started
        self._started += 1
        order = {
            "number": number,
            "seed": self._random.randrange(1 << 32),
            "targets": self._cluster.targets(),
            "checksums": self._corrupts,
            "out": str(self._folder / f"job-{number}.history"),
        }
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(_ROOT / "service"), str(_ROOT)))}
        with (self._folder / f"job-{number}.log").open("wb") as log:
            command = [sys.executable, "-m", "tests.chaos.job", json.dumps(order)]
            return Process(number, subprocess.Popen(command, env=environ, stdout=log, stderr=log))

    def carry_out(self) -> Outcome:
        """Break things for the time of the run, let everything end, and look at what is left."""
        began = time.monotonic()
        until = began + self._options.seconds
        self._injector.run(min(until, began + _WARM))
        warm = {node: self._cluster.memory(node) for node in self._cluster.daemons} if self._options.soak else {}
        self._injector.run(until)
        self._injector.heal()
        self._end_jobs()
        record = Record(self._folder / "holdings.history")
        for node in self._cluster.daemons:
            record.add(Held, node=node, baseline=self._cluster.baselines[node], now=self._cluster.settle(node))
        record.close()
        growth = [Growth(node, *_paired(before, self._cluster.memory(node))) for node, before in warm.items()]
        return self._judge(time.monotonic() - began, growth)

    def _end_jobs(self) -> None:
        jobs = self._injector.jobs
        for job in jobs:
            job.process.terminate()
        end = time.monotonic() + _LAST_WORDS
        for job in jobs:
            try:
                status = job.process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                job.process.kill()
                status = job.process.wait()
            if status != 0:
                words = (self._folder / f"job-{job.number}.log").read_text()[-2000:]
                self._failed.append(f"job {job.number} ended with {status}: {words}")

    def _judge(self, seconds: float, growth: Sequence[Growth]) -> Outcome:
        events = list(read(sorted(self._folder.glob("*.history"))))
        self._cluster.end()
        return Outcome(
            self._options.seed,
            seconds,
            command(self._options),
            Model().follow(events),
            faults=Counter(fault.kind for fault in self._injector.injected),
            failpoints=passed_failpoints(daemon.log for daemon in self._cluster.daemons.values()),
            limits=filled(events),
            recoveries=recoveries(self._injector.injected, events),
            growth=list(growth),
            defects=self._failed + self._cluster.defects,
        )


def _paired(before: tuple[int, int], after: tuple[int, int]) -> tuple[int, int, int, int]:
    return before[0], after[0], before[1], after[1]


def command(options: argparse.Namespace) -> str:
    """Return what does the same again."""
    soak = " --soak" if options.soak else ""
    return f"python -m tests.chaos --seed {options.seed} --seconds {options.seconds:g}{soak}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=None, help="what chance comes from (default: by chance)")
    parser.add_argument("--seconds", type=float, default=45.0, help="how long things are broken (default: %(default)g)")
    parser.add_argument("--soak", action="store_true", help="end no daemon, and see how the daemons grow")
    parser.add_argument("--report", type=Path, help="write the outcome there, as JSON")
    parser.add_argument("--keep", action="store_true", help="keep histories and logs, also when all is well")
    options = parser.parse_args(arguments)
    if options.seed is None:
        options.seed = secrets.randbelow(1 << 31)
    print(f"seed {options.seed}; again: {command(options)}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    with cluster(folder) as daemons:
        outcome = Run(options, folder, daemons).carry_out()
    print(text(outcome), flush=True)
    if options.report:
        write(outcome, options.report)
    if options.keep or not outcome.is_good:
        print(f"Histories and logs are in {folder}.")
    else:
        shutil.rmtree(folder)
    return 0 if outcome.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
