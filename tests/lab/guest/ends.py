"""Processes in the network namespaces of the nodes, which a test asks to do things one after the other.

Rules of this file:

* `End` is the test's side: a call goes to a method of the object that the process serves, and its result comes back.
* A process whose method raises ends, with the traceback in the suite's log; the call then fails.
* While a call runs, the process has nothing else to do and no other thread: what it measures is its own.
"""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
from types import TracebackType
from typing import Any


class End:
    """A process that runs a module of this package in a namespace."""

    def __init__(self, namespace: str, module: str, *arguments: str) -> None:
        command = ["ip", "netns", "exec", namespace, sys.executable, "-m", f"tests.lab.guest.{module}", *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> End:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process:
            self._process.kill()

    def __call__(self, method: str, *arguments: object) -> Any:
        """Call a method. Raises RuntimeError when the process has ended instead of answering."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            pickle.dump((method, arguments), self._process.stdin)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise RuntimeError(f"{self._process.args!r} ended in {method}") from error


async def serve(thing: object) -> None:
    """Answer calls of a thing's coroutine methods until nobody asks any more."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            method, arguments = await loop.run_in_executor(None, pickle.load, sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(await getattr(thing, method)(*arguments), sys.stdout.buffer)
        sys.stdout.buffer.flush()
