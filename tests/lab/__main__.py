"""Runs the lab: `python -m tests.lab`. Rules of this file:

* It ends with 0 when everything passed, 1 when something did not, 2 when it could not begin.
* However it ends, no guest stays behind.
* A guest that does not come up is booted anew, and the report says how often: emulated processors at times trip over
  the kernel's changes to its own code, a second or two after power-on. One that came up and then ends is a failure.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.deploy import container_image
from tests.lab import host, image, machine, plugs, report, results, suites
from tests.lab.cache import Cache
from tests.lab.debian import RELEASES
from tests.lab.image import GUEST_TESTS, ROOT, tell
from tests.lab.machine import Boot, Clock
from tests.lab.results import GuestResult
from tests.lab.suites import Choice, Suite

_SHELL_SECONDS = 900
_LIMIT_SECONDS = 3600
_SOAK_LIMIT_SECONDS = 6 * 3600
_ENDING_SECONDS = 60
_RUN = ".run-"
_CACHE = ROOT / "build" / "lab" / "cache"


class Lab:
    """One run of the lab, whose results go to a folder."""

    def __init__(self, output: Path, clock: Clock) -> None:
        self._output = output.resolve()
        self._clock = clock

    def boot(self, release: str, plan: str, *, container: bool = False) -> tuple[Boot, GuestResult]:
        """Boot a guest until one comes up, with a disk that has the container image where `container` says so, let it
        carry out its plan, and read what it left."""
        boot = machine.until_up(
            lambda: self._boot_once(release, plan, container), self._clock, lambda line: tell(f"{release}: {line}")
        )
        return boot, results.read(self._output / "out" / release, self._output / f"console-{release}.log")

    def _boot_once(self, release: str, plan: str, container: bool) -> Boot:
        console = self._output / f"console-{release}.log"
        out = self._output / "out" / release
        console.unlink(missing_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=_RUN, dir=self._output) as temporary,
            (self._output / f"progress-{release}.log").open("w", buffering=1) as progress,
        ):
            folder = Path(temporary)

            def hear(line: str) -> None:
                progress.write(f"{line}\n")
                if line.startswith(plugs.SIGN):
                    plugs.obey(line, folder, tell)
                else:
                    _show(line)

            files = image.assemble(Cache(_CACHE), RELEASES[release], plan, folder)
            disk = machine.make_disks(folder)
            if container:
                container_image.make_disk(folder / machine.CONTAINER_IMAGE)
            boot = machine.run(machine.command(files, folder, console), self._clock, console, hear)
            results.unpack(disk, out)
        return boot

    def run_suites(self, chosen: list[Suite], choice: Choice) -> int:
        """Run the suites, a guest for each release, and write the report."""
        begun = time.monotonic()
        place = self._output / "report.json"
        place.unlink(missing_ok=True)
        boots: dict[str, Boot] = {}
        guests: dict[str, GuestResult] = {}
        for release in dict.fromkeys(suite.release for suite in chosen):
            tell(f"== {release}: booting")
            its = [suite for suite in chosen if suite.release == release]
            container = any(suite.settings.image for suite in its)
            boots[release], guests[release] = self.boot(release, suites.plan(its, choice), container=container)
        found = report.troubles(chosen, choice, boots, guests)
        seconds = time.monotonic() - begun
        data = report.build(found, seconds, boots, guests)
        place.write_text(json.dumps(data, indent=2) + "\n")
        for line in (*found, report.summary(data)):
            tell(line)
        if found:
            tell(f"Logs: out/, console-*.log and progress-*.log in {self._output}")
        return 1 if found else 0

    def prepare(self, releases: Sequence[str]) -> int:
        """Fetch and build what guests are made of, for a later run to find."""
        for release in releases:
            with tempfile.TemporaryDirectory(prefix=_RUN, dir=self._output) as folder:
                image.assemble(Cache(_CACHE), RELEASES[release], "", Path(folder))
        return 0

    def run_shell(self, release: str, command: str) -> int:
        """Run a shell command in a guest; return its status."""
        boot, guest = self.boot(release, suites.shell_plan(command, _SHELL_SECONDS))
        status = guest.suites["shell"].status if "shell" in guest.suites else None
        if boot.trouble:
            tell(boot.trouble)
        tell(f"Status {status}. Files: {self._output}/out/{release}")
        return 1 if boot.trouble or status is None else status


def main() -> int:
    """Run what the command line asks for."""
    options = _options()
    if options.missing:
        for package in host.look().missing:
            tell(package)
        return 0
    lack = host.lack(host.look())
    if lack:
        tell(lack)
        return 2
    limit = options.limit or (_SOAK_LIMIT_SECONDS if options.soak else _LIMIT_SECONDS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("The lab was told to end."))
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(f"The lab did not end at its limit of {limit} s."))
    signal.alarm(limit + _ENDING_SECONDS)
    soak = suites.WHOLE_SOAK if options.soak else suites.SHORT_SOAK
    expression = ("-k", options.k) if options.k else ()
    choice = Choice(tuple(options.only), tuple(options.rootfs), soak, (*expression, *options.arguments))
    try:
        chosen = suites.chosen(suites.found(GUEST_TESTS), choice)
        with _alone(options.output):
            lab = Lab(options.output, Clock(limit))
            if options.prepare:
                return lab.prepare(options.rootfs or list(RELEASES))
            if options.shell_command is not None:
                return lab.run_shell(options.rootfs[0] if options.rootfs else "trixie", options.shell_command)
            return lab.run_suites(chosen, choice)
    except (ValueError, RuntimeError, subprocess.CalledProcessError) as error:
        tell(f"The lab did not run: {error}")
        return 2


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keep other runs out of the output folder, and remove what one left that was killed."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            told = f"Another run of the lab writes to {output}: wait for its end, or name another --output."
            raise ValueError(told) from None
        for stale in output.glob(f"{_RUN}*"):
            shutil.rmtree(stale)
        yield


def _show(line: str) -> None:
    """Show a line of a guest's progress."""
    if line.startswith("@"):
        _, word, *names = line.split(" ")
        if word == "suite":
            tell(f"== {names[0]}")
    elif line:
        tell(line)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab", description="Run the lab's tests on a real kernel in an emulated machine."
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="SUITE", help="run these suites")
    parser.add_argument("--rootfs", nargs="+", default=[], choices=tuple(RELEASES), help="run these guests")
    parser.add_argument("-k", metavar="EXPRESSION", help="run the tests whose names match, as pytest's -k")
    parser.add_argument("--soak", action="store_true", help="run the soak whole, not a tenth of it")
    parser.add_argument("--shell-command", metavar="COMMAND", help="run this in a guest instead of the suites")
    parser.add_argument("--limit", type=int, metavar="SECONDS", help="end after this time whatever happens")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build" / "lab", help="where results go (default: build/lab)"
    )
    parser.add_argument("--prepare", action="store_true", help="fetch and build what guests are made of, and end")
    parser.add_argument("--missing", action="store_true", help="print the Debian packages to install, and end")
    parser.add_argument("arguments", nargs="*", help="after --: arguments for pytest")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
