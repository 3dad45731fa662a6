"""Whatever a caller says of itself: a session's token counts only whole, and nobody else is let in by words."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peermem import errors
from peermem.app import App
from peermem.client.attach import Attachment
from peermem.client.errors import from_call
from peermem.v1 import region_pb2, region_pb2_grpc
from tests.fuzzing import fuzz, tried
from tests.test_app import config


@dataclass
class Door:
    """A daemon in this process, and a session of it."""

    runner: asyncio.Runner
    app: App
    attachment: Attachment
    regions: Any

    def outcome(self, *told: tuple[str, str]) -> errors.PeermemError | None:
        """Ask as whoever is told, and return why that is refused."""
        return self.runner.run(self._outcome(told))

    async def _outcome(self, told: tuple[tuple[str, str], ...]) -> errors.PeermemError | None:
        try:
            await self.regions.ListRegions(region_pb2.ListRegionsRequest(), timeout=10, metadata=told)
        except grpc.aio.AioRpcError as error:
            return from_call(error, "the daemon")
        return None


async def _opened(folder: Path) -> tuple[App, grpc.aio.Channel, Attachment]:
    app = App(config(folder))
    await app.start()
    attachment = await asyncio.to_thread(Attachment.open, f"{folder}/attach.sock")
    return app, grpc.aio.insecure_channel(f"unix:{folder}/peermem.sock"), attachment


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with asyncio.Runner() as runner:
        app, channel, attachment = runner.run(_opened(tmp_path_factory.mktemp("fuzzed")))
        yield Door(runner, app, attachment, region_pb2_grpc.RegionServiceStub(channel))
        attachment.close()
        runner.run(channel.close())
        runner.run(app.stop())


printable = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=80)
edits = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2), st.text("aB9-_=", max_size=2)), max_size=3)


def edited(text: str, changes: list[tuple[int, int, str]]) -> str:
    for position, length, new in changes:
        text = text[:position] + new + text[position + length :]
    return text


@fuzz(50)
@given(changes=edits, other=printable)
def test_a_session_counts_only_by_its_whole_token(door: Door, changes: list[tuple[int, int, str]], other: str) -> None:
    token = door.attachment.token
    for told in (edited(token, changes), other):
        if told:
            tried("session tokens")
            error = door.outcome(("peermem-session", told))
            assert (error is None) if told == token else isinstance(error, errors.SessionNotFound)


_WORDS = st.sampled_from(
    ("uid:0", "@", "a", "b", "gid:0", ",", "spiffe://x/y", "anonymous", "kubernetes:a/b", "Bearer ", ".")
)
words = st.one_of(st.lists(_WORDS, max_size=6).map("".join), printable).map(str.strip)


@fuzz(50)
@given(key=st.sampled_from(("peermem-on-behalf-of", "authorization")), words=words)
def test_nobody_is_somebody_by_words(door: Door, key: str, words: str) -> None:
    if words:
        tried("claimed subjects")
        assert isinstance(door.outcome((key, words)), (errors.AccessDenied, errors.Unauthenticated))
