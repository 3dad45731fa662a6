"""Any text in the place of a policy: put in force as a whole, or refused while the one before stays in force."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peermem.core.identity import Subject
from peermem.core.policy import Action, Rules, Traits
from tests.broker.support import eventually
from tests.fuzzing import fuzz, tried
from tests.test_policy_file import GOOD, RULE, TENANT
from tests.test_policy_source import Watched, replace

LINES = [line for text in (GOOD, RULE, TENANT) for line in text.splitlines()]
ODD = (
    *(
        'rights = ["manage", "manage"]',
        'subjects = ["uid:*@*@*"]',
        'subjects = ["spiffe://**"]',
        "weight = -1",
        "root = 0",
    ),
    *(
        'bytes = "9999PiB"',
        "regions = 1e9",
        'owners = [""]',
        'files = ["relative"]',
        'labels = { "" = "" }',
        "[rule]",
        "[[",
    ),
    *('name = "' + "x" * 100 + '"', "\ufeff", "rule = []", "a.b.c = 1", "subjects = [" * 40),
)
lines = st.one_of(st.sampled_from(LINES), st.sampled_from(ODD), st.text(max_size=20))


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Near policies, and what is none."""
    if draw(st.booleans()):
        return "\n".join(draw(st.lists(lines, max_size=12)))
    text = GOOD + RULE
    for position, length, new in draw(
        st.lists(st.tuples(st.integers(0, len(text)), st.integers(0, 4), st.text(max_size=3)), max_size=3)
    ):
        text = text[:position] + new + text[position + length :]
    return text


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[asyncio.Runner, Watched]]:
    file = tmp_path_factory.mktemp("policy") / "policy.toml"
    file.write_text(RULE)
    with asyncio.Runner() as runner:
        yield runner, runner.run(_watched(file))


async def _watched(file: Path) -> Watched:
    return Watched(file, 60.0)


@fuzz(60)
@given(text=texts())
def test_any_text_is_put_in_force_or_changes_nothing(source: tuple[asyncio.Runner, Watched], text: str) -> None:
    tried("policy files")
    runner, watched = source
    runner.run(offer(watched, text))


async def offer(watched: Watched, text: str) -> None:
    """Put a text in the policy's place, and see that it is either in force or refused, in words."""
    before = watched.sample("peermem_policy_reload_failures_total")
    replace(watched.file, text.encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
    tending = asyncio.create_task(watched.source.tend(watched.apply))
    watched.source.ask()
    try:
        await eventually(
            lambda: not watched.applied.empty() or watched.sample("peermem_policy_reload_failures_total") > before
        )
    finally:
        tending.cancel()
        await asyncio.gather(tending, return_exceptions=True)
    if watched.applied.empty():
        assert "The policy before it stays in force" in watched.source.problem
    else:
        usable(watched.applied.get_nowait())
        assert watched.source.problem == ""


def usable(rules: Rules) -> None:
    """Whoever has no right by a policy that was put in force is refused by it."""
    assert rules.rules
    for subject in (Subject("uid:4242"), Subject("anonymous"), Subject("uid:1000", (), "b")):
        for action in (Action.READ, Action.MANAGE):
            decision = rules.decide(subject, action, Traits("uid:1", "memfd0", {"team": "b"}))
            assert decision.allowed is (decision.rule != "built-in:deny")
