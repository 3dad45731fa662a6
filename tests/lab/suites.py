"""The suites that run in the guests. Rules of this file:

* Each file `tests/lab/guest/test_NAME.py` is the suite NAME: none is forgotten.
* A suite runs on trixie, in the guest's initial network namespace, for at most five minutes, and skips nothing, unless
  the table says otherwise.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

WHOLE_SOAK = 1.0
SHORT_SOAK = 0.1


@dataclass(frozen=True)
class Settings:
    """How a suite runs.

    `releases` names the guests; `namespace` is a network namespace, "" for the initial one, from which tests start
    daemons by `ip netns exec`; `seconds` is all the time that it may take, or `soak_seconds`, if more, when the soak is
    whole; `skips` are the names of the tests that may be skipped; `image` asks for a disk with the container image.
    """

    releases: tuple[str, ...] = ("trixie",)
    namespace: str = ""
    seconds: int = 300
    soak_seconds: int = 0
    skips: tuple[str, ...] = ()
    image: bool = False


TABLE = {
    "dmabuf": Settings(seconds=600),
    "fabric_verbs": Settings(releases=("trixie", "bookworm"), namespace="n1"),
    "fabric_verbs_nodes": Settings(namespace="n1"),
    "fabric_verbs_subjects": Settings(namespace="n1"),
    "faults": Settings(seconds=1800),
    "image": Settings(seconds=600, image=True),
    "lab": Settings(releases=("trixie", "bookworm")),
    "machines": Settings(seconds=600),
    "nodes": Settings(seconds=600),
    "preflight": Settings(namespace="n1", seconds=600),
    "pulled": Settings(seconds=900),
    "soak": Settings(namespace="n1", soak_seconds=3600),
    "speed": Settings(seconds=600),
    "storage": Settings(seconds=600),
    "vfio": Settings(seconds=600),
}


@dataclass(frozen=True)
class Suite:
    """One file of tests in one guest."""

    name: str
    release: str
    settings: Settings


@dataclass(frozen=True)
class Choice:
    """What of the lab to run."""

    names: tuple[str, ...] = ()
    releases: tuple[str, ...] = ()
    soak: float = SHORT_SOAK
    pytest: tuple[str, ...] = ()


def found(folder: Path) -> list[Suite]:
    """Return the suites of the files in `folder`."""
    names = sorted(path.stem.removeprefix("test_") for path in folder.glob("test_*.py"))
    settings = {name: TABLE.get(name, Settings()) for name in names}
    return [Suite(name, release, settings[name]) for name in names for release in settings[name].releases]


def chosen(suites: Iterable[Suite], choice: Choice) -> list[Suite]:
    """Return the suites that `choice` names, all where it names none; raises ValueError for a name there is not."""
    suites = list(suites)
    strange = sorted(set(choice.names) - {suite.name for suite in suites})
    if strange:
        known = ", ".join(dict.fromkeys(suite.name for suite in suites))
        raise ValueError(f"The lab has no suite '{strange[0]}': its suites are {known}.")
    return [
        suite
        for suite in suites
        if suite.name in (choice.names or (suite.name,)) and suite.release in (choice.releases or (suite.release,))
    ]


def limit(suite: Suite, choice: Choice) -> int:
    """Return the seconds that a suite may take."""
    soak_seconds = suite.settings.soak_seconds if choice.soak == WHOLE_SOAK else 0
    return max(suite.settings.seconds, soak_seconds)


def plan(suites: Iterable[Suite], choice: Choice) -> str:
    """Return the guest's plan: a shell command for each suite."""
    return "".join(_suite_line(suite, choice) for suite in suites)


def shell_plan(command: str, seconds: int) -> str:
    """Return the plan that runs a shell command and nothing else."""
    return _line("shell", "", seconds, ["bash", "-c", command])


def _suite_line(suite: Suite, choice: Choice) -> str:
    pytest = ["env", f"PEERMEM_LAB_SOAK={choice.soak}", "python3", "-m", "pytest", "--verbose", "--tb=short"]
    pytest += ["--durations=5", "--color=no", "-p", "no:cacheprovider", f"--junitxml=/out/{suite.name}/junit.xml"]
    pytest += [*choice.pytest, f"tests/lab/guest/test_{suite.name}.py"]
    return _line(suite.name, suite.settings.namespace, limit(suite, choice), pytest)


def _line(name: str, namespace: str, seconds: int, command: Sequence[str]) -> str:
    return shlex.join(["suite", name, namespace, str(seconds), *command]) + "\n"
