"""Processes that a benchmark starts and ends: modules of this package, and the programs of other engines.

Rules of this file:

* A process never outlives its `with` block, nor its time; what an engine forked ends with it.
* A program that failed is told of with its last words.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from bench.figures import Sample, Shape, parse

_ENGINE_TIMEOUT = 120.0


class EngineFailed(Exception):
    """An engine's program gave no figures; the text says why."""


Process = subprocess.Popen[str]


@contextmanager
def module(name: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run `python -m name arguments`, with its standard output to be read; it is killed at the end."""
    command = [sys.executable, "-m", name, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    """Return the next line that a process prints. Raises RuntimeError when it has ended instead."""
    assert process.stdout
    text = process.stdout.readline()
    if not text:
        raise RuntimeError(f"{process.args!r} ended with {process.wait()} before it said what was expected.")
    return text.strip()


def engine(command: str, iterations: Mapping[Shape, int], timeout: float = _ENGINE_TIMEOUT) -> dict[Shape, Sample]:
    """Return what an engine's program measures; each shape is an argument `bytes:segments:iterations`.

    Raises EngineFailed.
    """
    cases = [f"{shape.size}:{shape.segments}:{count}" for shape, count in iterations.items()]
    try:
        text = _output([*shlex.split(command), *cases], timeout)
    except OSError as error:
        raise EngineFailed(f"it can't be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise EngineFailed(f"it did not end within {timeout:.0f} s") from error
    measured = parse(text)
    if measured.keys() != iterations.keys():
        raise EngineFailed(f"it printed {len(measured)} of {len(cases)} results")
    return measured


def _output(command: Sequence[str], timeout: float) -> str:
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            text, errors = process.communicate(timeout=timeout)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it forked, too
    if process.returncode:
        last = (errors.strip() or text.strip() or "nothing said").splitlines()[-1]
        raise EngineFailed(f"it ended with {process.returncode}: {last}")
    return text
