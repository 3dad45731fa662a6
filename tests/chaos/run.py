"""One run: daemons, jobs and faults for its time, then the end of everything and a look at what is left.

Rules of this file:

* It ends in time: what does not end by itself is killed, and told.
* A run with a plant is over when the checker has found it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.cluster import Cluster
from tests.chaos.faults import Injector, Process
from tests.chaos.history import Held, read
from tests.chaos.model import Model, Violation
from tests.chaos.outcome import Growth, Outcome, filled, passed_failpoints, recoveries
from tests.chaos.plants import Plant
from tests.e2e.support import eventually

JOBS = 3
FIRST_USER = 41000
"""User id of the first job, where jobs can be users of their own."""
_ROOT = Path(__file__).parents[2]
_FIRST_WORDS, _LAST_WORDS = 60.0, 60.0
"""Seconds that jobs get to begin, and to end."""
_WARM = 20.0
"""Seconds after which a daemon counts as warm, and its growth begins to count."""
_SAMPLED = 60.0
"""Seconds between two looks at how large daemons are."""
_LOOKS = 1.0
"""Seconds between two looks for what is planted."""
_CALM = 6.0
"""Seconds in which jobs go on undisturbed: what they leave behind then, no broken link takes away."""
_PATIENCE, _SHORT = 45.0, 12.0
"""Seconds until what a daemon still holds is a leak; where one was planted."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does."""

    seed: int
    seconds: float
    """For which things are broken."""
    soak: bool = False
    """Whether no daemon is ended, so that their growth can be seen."""
    plant: Plant | None = None

    @property
    def command(self) -> str:
        """What does the same again."""
        more = " --soak" if self.soak else f" --plant {self.plant.name}" if self.plant else ""
        return f"python -m tests.chaos --seed {self.seed} --seconds {self.seconds:g}{more}"


class Run:
    """One run."""

    def __init__(self, plan: Plan, folder: Path, cluster: Cluster) -> None:
        self._plan = plan
        self._folder = folder
        self._cluster = cluster
        self._random = random.Random(plan.seed)
        self._corrupts = self._random.random() < 0.34 and plan.plant is None
        self._started = 0
        self._failed: list[str] = []
        folder.chmod(0o755)
        (folder / "jobs").mkdir()
        (folder / "jobs").chmod(0o777)  # jobs are users of their own, where this is root
        jobs = [self._job(index) for index in range(JOBS)]
        self._injector = Injector(
            plan.seed,
            cluster,
            jobs,
            self._job,
            corrupts=self._corrupts,
            spares_daemons=plan.soak or plan.plant is not None,
            plant=plan.plant,
        )

    def _job(self, index: int) -> Process:
        number = self._started
        self._started += 1
        order = {
            "number": number,
            "seed": self._random.randrange(1 << 32),
            "targets": self._cluster.targets(),
            "checksums": self._corrupts,
            "out": str(self._folder / "jobs" / f"job-{number}.history"),
            "tls": str(self._cluster.certificates.folder),
            "user": FIRST_USER + index if os.geteuid() == 0 else os.geteuid(),
        }
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(_ROOT / "service"), str(_ROOT)))}
        with (self._folder / f"job-{number}.log").open("wb") as log:
            command = [sys.executable, "-m", "tests.chaos.job", json.dumps(order)]
            return Process(number, subprocess.Popen(command, env=environ, stdout=log, stderr=log))

    def _await_jobs(self) -> None:
        """Wait until each job has moved something: what is broken before breaks nothing."""
        histories = [self._folder / "jobs" / f"job-{number}.history" for number in range(JOBS)]
        eventually(
            lambda: all(path.exists() and '"Ended"' in path.read_text() for path in histories),
            "the first transfer of each job",
            _FIRST_WORDS,
        )

    def carry_out(self) -> Outcome:
        """Break things for the time of the run, let everything end, and look at what is left."""
        self._await_jobs()
        began = time.monotonic()
        until = began + self._plan.seconds
        self._injector.run(min(until, began + _WARM))
        growth = [Growth(node, [], []) for node in self._cluster.daemons] if self._plan.soak else []
        while time.monotonic() < until:
            self._sample(growth)
            self._injector.run(min(until, time.monotonic() + _SAMPLED))
        self._settle(_PATIENCE)
        self._sample(growth)
        return self._judge(time.monotonic() - began, growth)

    def _sample(self, growth: Sequence[Growth]) -> None:
        for each in growth:
            memory, descriptors = self._cluster.memory(each.node)
            each.bytes.append(memory)
            each.descriptors.append(descriptors)

    def hunt(self, plant: Plant) -> float | None:
        """Break things until the checker finds what is planted; return after how many seconds, or None."""
        self._await_jobs()
        began = time.monotonic()
        try:
            while time.monotonic() - began < (_CALM if plant.is_left_over else self._plan.seconds):
                self._injector.run(time.monotonic() + _LOOKS)
                if (found := self._find(plant)) is not None:
                    return max(0.0, found.at - began)  # it may show while jobs begin
            if not plant.is_left_over:
                return None
            self._injector.heal()
            time.sleep(_CALM)
            self._settle(_SHORT)
            found = self._find(plant)
            return found.at - began if found is not None else None
        finally:
            for job in self._injector.jobs:
                job.process.kill()
                job.process.wait()

    def _find(self, plant: Plant) -> Violation | None:
        violations = Model().follow(read(sorted(self._folder.rglob("*.history")))).violations
        return next((violation for violation in violations if violation.fault in plant.found), None)

    def _settle(self, patience: float) -> None:
        """End all faults and jobs; write down what the daemons hold then."""
        self._injector.heal()
        self._end_jobs()
        for node in self._cluster.daemons:
            held = self._cluster.settle(node, patience)
            self._cluster.record.add(Held, node=node, baseline=self._cluster.baselines[node], now=held)

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
            if status not in (0, -signal.SIGTERM):  # by the signal, where it had not begun yet
                words = (self._folder / f"job-{job.number}.log").read_text()[-2000:]
                self._failed.append(f"job {job.number} ended with {status}: {words}")

    def _judge(self, seconds: float, growth: Sequence[Growth]) -> Outcome:
        events = list(read(sorted(self._folder.rglob("*.history"))))
        self._cluster.end()
        return Outcome(
            self._plan.seed,
            seconds,
            self._plan.command,
            Model().follow(events),
            faults=Counter(fault.kind for fault in self._injector.injected),
            failpoints=passed_failpoints(daemon.log for daemon in self._cluster.daemons.values()),
            limits=filled(events),
            recoveries=recoveries(self._injector.injected, events),
            growth=list(growth),
            defects=self._failed + self._cluster.defects,
        )
