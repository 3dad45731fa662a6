"""What every directory keeps. Subclass it and say how one is made; the static one needs no server, etcd does."""

from __future__ import annotations

import asyncio

import pytest

from peermem.core.names import ChildName
from peermem.directory.base import Directory, NodeEntry
from tests.directory.etcd_server import PATIENCE
from tests.directory.support import FULL, region

A, B = NodeEntry("a", "10.0.0.1:7470"), NodeEntry("b", "10.0.0.2:7470")


async def names(directory: Directory, *labels: tuple[str, str]) -> list[str]:
    """Return the names of all published regions with these labels, asked for one by one."""
    found: list[str] = []
    after: ChildName | None = None
    while True:
        page, after = await directory.find(dict(labels), after, 1)
        found += [each.name.id for each in page]
        if after is None:
            return found


async def written(directory: Directory) -> None:
    """Wait until what was published and withdrawn is so."""
    async with asyncio.timeout(PATIENCE):
        while directory.status().unwritten:
            await directory.changed()


class DirectoryConformance:
    @pytest.fixture
    def directory(self) -> Directory:
        """A directory, open, that knows node b already, and not node a, in whose daemon it is."""
        raise NotImplementedError

    async def test_it_knows_the_others_before_it_has_joined(self, directory: Directory) -> None:
        assert directory.nodes() == {"b": B}
        assert directory.gone() == {}

    async def test_joining_makes_this_node_known_and_leaving_withdraws_it(self, directory: Directory) -> None:
        await directory.join(A)
        assert directory.nodes() == {"a": A, "b": B}
        await directory.leave()
        assert directory.nodes() == {"b": B}

    async def test_all_that_a_node_says_of_itself_is_kept(self, directory: Directory) -> None:
        await directory.join(FULL)
        assert directory.nodes()["a"] == FULL

    async def test_leaving_without_having_joined_and_twice_is_no_error(self, directory: Directory) -> None:
        await directory.leave()
        await directory.join(A)
        await directory.leave()
        await directory.leave()
        assert directory.nodes() == {"b": B}

    async def test_what_it_returned_can_not_be_changed_by_its_user(self, directory: Directory) -> None:
        nodes = directory.nodes()
        with pytest.raises((TypeError, AttributeError)):
            nodes["c"] = A  # type: ignore[index]
        assert directory.nodes() == {"b": B}

    async def test_a_node_that_comes_back_elsewhere_has_its_new_address(self, directory: Directory) -> None:
        await directory.join(A)
        await directory.leave()
        moved = NodeEntry("a", "10.0.0.3:7470")
        await directory.join(moved)
        assert directory.nodes()["a"] == moved

    async def test_who_waits_is_told_of_a_change(self, directory: Directory) -> None:
        waiting = asyncio.create_task(directory.changed())
        await asyncio.sleep(0)
        assert not waiting.done()
        await directory.join(A)
        async with asyncio.timeout(PATIENCE):
            await waiting

    async def test_a_directory_that_is_there_has_no_problem(self, directory: Directory) -> None:
        status = directory.status()
        assert (status.away_for, status.problem, status.refusal, status.published) == (None, None, None, 0)

    async def test_a_published_region_is_found_until_it_is_withdrawn(self, directory: Directory) -> None:
        await directory.join(A)
        kept = region("kept", model="llama", layer="7")
        directory.publish(kept)
        directory.publish(region("other"))
        assert directory.status().published == 2
        await written(directory)
        assert (await directory.find({"model": "llama"}, None, 10)) == ([kept], None)
        directory.withdraw(kept.name)
        directory.withdraw(kept.name)
        await written(directory)
        assert await names(directory) == ["other"]
        assert await names(directory, ("model", "llama")) == []

    async def test_regions_are_found_by_all_labels_that_are_asked_for(self, directory: Directory) -> None:
        await directory.join(A)
        for name, labels in (
            ("x", {"model": "llama", "layer": "7"}),
            ("y", {"model": "llama", "layer": "70"}),
            ("z", {"model": "llam", "a/b=c d": "ü/="}),
        ):
            directory.publish(region(name, **labels))
        await written(directory)
        assert await names(directory) == ["x", "y", "z"]
        assert await names(directory, ("model", "llama")) == ["x", "y"]
        assert await names(directory, ("model", "llama"), ("layer", "7")) == ["x"]
        assert await names(directory, ("a/b=c d", "ü/=")) == ["z"]
        assert await names(directory, ("model", "llama"), ("layer", "8")) == []

    async def test_pages_are_in_order_and_begin_behind_a_region_that_need_not_be_there(
        self, directory: Directory
    ) -> None:
        await directory.join(A)
        for name in ("r-2", "r-10", "r", "r-1"):
            directory.publish(region(name))
        await written(directory)
        page, after = await directory.find({}, None, 2)
        assert ([each.name.id for each in page], after) == (["r", "r-1"], page[-1].name)
        directory.withdraw(page[-1].name)
        await written(directory)
        page, after = await directory.find({}, after, 2)
        assert ([each.name.id for each in page], after) == (["r-10", "r-2"], None)

    async def test_a_node_that_left_has_no_published_regions(self, directory: Directory) -> None:
        await directory.join(A)
        directory.publish(region("x"))
        await written(directory)
        await directory.leave()
        assert directory.status().published == 0
        assert await names(directory) == []

    async def test_closing_twice_is_no_error(self, directory: Directory) -> None:
        await directory.join(A)
        await directory.leave()
        await directory.close()
        await directory.close()
