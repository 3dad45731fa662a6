"""A policy file that changes, breaks and is mended under a source that looks at it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from peermem.core.identity import Subject
from peermem.core.policy import OPEN, OWN, Action, Rules, Traits
from peermem.policy_source import PolicySource
from peermem.strict_toml import ConfigError
from peermem.telemetry.policy import PolicyMetrics
from tests.broker.support import eventually
from tests.policies import rule

USER, THING = Subject("uid:7"), Traits("uid:1", "memfd0")
PATIENCE = 20.0


class Watched:
    """A source with what it counted and handed out."""

    def __init__(self, file: Path, every: float) -> None:
        self.file = file
        self.registry = CollectorRegistry()
        self.source = PolicySource(str(file), OWN, PolicyMetrics(self.registry), every)
        self.applied: asyncio.Queue[Rules] = asyncio.Queue()

    async def apply(self, rules: Rules) -> None:
        await self.applied.put(rules)

    async def next_rule(self) -> str:
        """Return what decides by the next policy that is put in force."""
        async with asyncio.timeout(PATIENCE):
            return (await self.applied.get()).decide(USER, Action.READ, THING).rule

    async def refused(self, problem: str, count: int) -> None:
        """Wait until a file was refused for a reason, `count` in all."""
        await eventually(
            lambda: problem in self.source.problem and self.sample("peermem_policy_reload_failures_total") >= count
        )

    def sample(self, name: str) -> float:
        return self.registry.get_sample_value(name) or 0.0


@asynccontextmanager
async def watched(folder: Path, every: float = 0.005) -> AsyncIterator[Watched]:
    file = folder / "policy.toml"
    file.write_text(rule("first", "uid:7", "read"))
    made = Watched(file, every)
    tending = asyncio.create_task(made.source.tend(made.apply))
    yield made
    tending.cancel()
    await asyncio.gather(tending, return_exceptions=True)


def replace(file: Path, text: str) -> None:
    """Put a whole new file in its place, as a careful editor does."""
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    fresh.rename(file)


async def test_a_changed_file_is_put_in_force(tmp_path: Path) -> None:
    async with watched(tmp_path) as made:
        assert made.source.rules.decide(USER, Action.READ, THING).rule == "first"
        before = made.sample("peermem_policy_loaded_timestamp_seconds")
        assert before > 0
        replace(made.file, rule("second", "uid:7", "read"))
        assert await made.next_rule() == "second"
        assert made.sample("peermem_policy_loaded_timestamp_seconds") >= before


async def test_a_file_that_has_not_changed_is_read_again_when_somebody_asks(tmp_path: Path) -> None:
    async with watched(tmp_path, every=3600.0) as made:
        made.source.ask()
        assert await made.next_rule() == "first"


def make_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def make_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda file: replace(file, ""), "a policy needs at least one [[rule]]"),
        (lambda file: replace(file, rule("r", "uid:7", "raed")), "rule[0].rights[0] is 'raed'"),
        (lambda file: file.unlink(), "there is no such file"),
        (make_directory, "it can't be read: Is a directory"),
        (make_loop, "it can't be read: Too many levels of symbolic links"),
    ],
)
async def test_a_file_with_an_error_changes_nothing_and_says_so_once(
    tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    async with watched(tmp_path) as made:
        damage(made.file)
        await made.refused(told, 1)
        assert made.source.problem.startswith("The policy before it stays in force, because its file is refused: ")
        assert str(made.file) in made.source.problem
        assert made.applied.empty()
        made.source.ask()
        await made.refused(told, 2)  # many looks later, the one that was asked for is the second
        if made.file.is_dir():
            made.file.rmdir()
        replace(made.file, rule("mended", "uid:7", "read"))
        assert await made.next_rule() == "mended"
        assert made.sample("peermem_policy_reload_failures_total") == 2
        await eventually(lambda: not made.source.problem)


async def test_a_policy_that_can_not_be_put_in_force_is_tried_again(tmp_path: Path) -> None:
    async with watched(tmp_path, every=3600.0) as made:
        failing = PolicySource(str(made.file), OWN, PolicyMetrics(CollectorRegistry()), 3600.0)
        calls: asyncio.Queue[Rules] = asyncio.Queue()

        async def apply(rules: Rules) -> None:
            await calls.put(rules)
            if calls.qsize() == 1:
                raise RuntimeError("a defect")

        tending = asyncio.create_task(failing.tend(apply))
        failing.ask()
        await eventually(lambda: calls.qsize() == 1)
        failing.ask()
        await eventually(lambda: calls.qsize() == 2)
        tending.cancel()


async def test_without_a_file_what_is_built_in_holds(tmp_path: Path) -> None:
    source = PolicySource(None, OPEN, PolicyMetrics(CollectorRegistry()))
    assert source.rules is OPEN
    source.ask()
    await source.tend(Watched.apply)  # type: ignore[arg-type]  # ends at once: there is nothing to look at


def test_a_daemon_does_not_start_with_a_policy_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        PolicySource(str(tmp_path / "none"), OPEN, PolicyMetrics(CollectorRegistry()))
