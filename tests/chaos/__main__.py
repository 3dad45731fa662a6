"""Runs chaos: `python -m tests.chaos --seed N --seconds S`. Exit status 0 only if all was well.

With `--plant NAME` a defect is planted in the daemons, and all is well only if the checker finds it.

Rules of this file:

* The seed is printed first, and with it the command that does the same again.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.cluster import cluster
from tests.chaos.outcome import text, write
from tests.chaos.plants import PLANTS, Plant
from tests.chaos.run import Plan, Run


def run(plan: Plan, report: Path | None, *, keep: bool) -> bool:
    """Carry out one run; return whether all was well."""
    print(f"seed {plan.seed}; again: {plan.command}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    with cluster(folder) as daemons:
        outcome = Run(plan, folder, daemons).carry_out()
    print(text(outcome), flush=True)
    if report:
        write(outcome, report)
    if keep or not outcome.is_good:
        print(f"Histories and logs are in {folder}.")
    else:
        shutil.rmtree(folder)
    return outcome.is_good


def hunt(plant: Plant, seeds: Sequence[int], seconds: float, report: Path | None) -> bool:
    """Have the checker look for a plant, once for each seed; return whether it was found each time."""
    times = []
    for seed in seeds:
        plan = Plan(seed, seconds, plant=plant)
        folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        with cluster(folder, failpoints=plant.failpoints, is_open=plant.opens) as daemons:
            found = Run(plan, folder, daemons).hunt(plant)
        shutil.rmtree(folder)
        times.append(found)
        print(f"{plan.command}: {'NOT found' if found is None else f'found after {found:.1f} s'}", flush=True)
    if report:
        command = (
            f"python -m tests.chaos --plant {plant.name} --seed {seeds[0]} --seeds {len(seeds)} --seconds {seconds:g}"
        )
        told = {"command": command, "plant": plant.name, "what": plant.what, "found_after": times}
        report.write_text(json.dumps(told, indent=1) + "\n")
    return None not in times


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=None, help="what chance comes from (default: by chance)")
    parser.add_argument("--seconds", type=float, default=45.0, help="how long things are broken (default: %(default)g)")
    parser.add_argument("--soak", action="store_true", help="end no daemon, and see how the daemons grow")
    parser.add_argument("--plant", choices=sorted(PLANTS), help="plant a defect, and see whether it is found")
    parser.add_argument("--seeds", type=int, default=1, help="with --plant: try this many seeds, from --seed on")
    parser.add_argument("--report", type=Path, help="write the outcome there, as JSON")
    parser.add_argument("--keep", action="store_true", help="keep histories and logs, also when all is well")
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else secrets.randbelow(1 << 31)
    if options.plant:
        seeds = range(seed, seed + options.seeds)
        is_good = hunt(PLANTS[options.plant], seeds, options.seconds, options.report)
    else:
        is_good = run(Plan(seed, options.seconds, options.soak), options.report, keep=options.keep)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
