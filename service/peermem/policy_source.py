"""Where the policy in force comes from: its file, read again when it changes or when somebody asks for it.

Rules of this file:

* A file with an error changes nothing: the policy before it stays in force, and the log, a metric and the readiness
  page say so until a good one is there.
* A file is read in a thread when its facts (stat) change, so that what is wrong with it is told once.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import structlog

from peermem import policy_file
from peermem.core.policy import Rules
from peermem.offload import in_thread
from peermem.strict_toml import ConfigError
from peermem.telemetry.policy import PolicyMetrics

log = structlog.get_logger(__name__)

_Facts = tuple[int, ...] | None


class PolicySource:
    """The policy file of a daemon, or the rules that hold without one."""

    def __init__(self, path: str | None, without: Rules, metrics: PolicyMetrics, every: float = 1.0) -> None:
        """Read the file at `path`, and look at it `every` so many seconds; without one, `without` holds for good.

        Raises ConfigError.
        """
        self.problem = ""
        """What is wrong with the file, in a sentence; empty where nothing is."""
        self._path = Path(path) if path else None
        self._metrics = metrics
        self._every = every
        self._asked = asyncio.Event()
        self._facts = _facts(self._path) if self._path else None
        self.rules = policy_file.read(self._path) if self._path else without
        """Those that were there at the start."""
        metrics.loaded()

    async def tend(self, apply: Callable[[Rules], Awaitable[None]]) -> None:
        """Hand each new policy to `apply`, for as long as the daemon runs."""
        while self._path is not None:
            asked = await self._is_asked()
            try:
                if asked or await in_thread(partial(_facts, self._path)) != self._facts:
                    await self._reload(self._path, apply)
            except Exception:
                log.exception("policy_defect", file=str(self._path))

    def ask(self) -> None:
        """Have the file read soon, also if it has not changed."""
        self._asked.set()

    async def _is_asked(self) -> bool:
        """Wait until somebody asks, but no longer than until the next look is due."""
        try:
            async with asyncio.timeout(self._every):
                await self._asked.wait()
        except TimeoutError:
            return False
        self._asked.clear()
        return True

    async def _reload(self, path: Path, apply: Callable[[Rules], Awaitable[None]]) -> None:
        self._facts, rules = await in_thread(partial(_read, path))
        if isinstance(rules, ConfigError):
            self.problem = f"The policy before it stays in force, because its file is refused: {rules}"
            self._metrics.reload_failed()
            log.error("policy_refused", file=str(path), problems=list(rules.problems))
            return
        await apply(rules)
        self.problem = ""
        self._metrics.loaded()
        log.info("policy_loaded", file=str(path), rules=len(rules.rules), tenants=len(rules.tenants))


def _read(path: Path) -> tuple[_Facts, Rules | ConfigError]:
    facts = _facts(path)  # first: what changes while it is read is looked at again
    try:
        return facts, policy_file.read(path)
    except ConfigError as error:
        return facts, error


def _facts(path: Path) -> _Facts:
    """Return what changes when the file does; None where it can't be looked at."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns
