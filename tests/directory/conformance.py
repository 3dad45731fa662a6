"""What every directory keeps. Subclass it and say how one is made; the static one needs no server, etcd does."""

from __future__ import annotations

import pytest

from peermem.directory.base import Directory, NodeEntry

A, B = NodeEntry("a", "10.0.0.1:7470"), NodeEntry("b", "10.0.0.2:7470")


class DirectoryConformance:
    @pytest.fixture
    def directory(self) -> Directory:
        """A directory that knows node b already, and not node a, in whose daemon it is."""
        raise NotImplementedError

    async def test_it_knows_the_others_before_it_has_joined(self, directory: Directory) -> None:
        assert directory.nodes() == {"b": B}

    async def test_joining_makes_this_node_known_and_leaving_withdraws_it(self, directory: Directory) -> None:
        await directory.join(A)
        assert directory.nodes() == {"a": A, "b": B}
        await directory.leave()
        assert directory.nodes() == {"b": B}

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

    async def test_closing_twice_is_no_error(self, directory: Directory) -> None:
        await directory.join(A)
        await directory.leave()
        await directory.close()
        await directory.close()
