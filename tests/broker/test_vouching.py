"""Who may speak of whom: a client of one node, whose transfer another runs, and a third one's region."""

from __future__ import annotations

import pytest

from peermem.core import errors
from peermem.core.identity import ANONYMOUS, Subject
from peermem.core.names import ChildName
from peermem.core.segments import columns
from peermem.core.transfer import TransferRequest
from peermem.core.types import Rights
from tests.broker.conftest import hosts
from tests.doubles import Host

SOURCE, SINK = ChildName("b", "regions", "source"), ChildName("c", "regions", "sink")
REQUEST = TransferRequest([columns(SOURCE, SINK, (0, 1), (0, 1), (1, 1)), columns(SOURCE, SINK, (2,), (2,), (1,))])
CLIENT = Subject("uid:7", ("gid:7",))
SPOKEN = CLIENT.vouched_for("a")


async def confirmed(host: Host, node: str, subject: Subject, region: ChildName, right: Rights) -> Subject:
    return await host.broker.vouching.confirmed(node, subject, region, right)


async def test_a_node_speaks_of_its_own_clients() -> None:
    async with hosts("a", "c") as (_, c):
        assert await confirmed(c, "a", SPOKEN, SINK, Rights.WRITE) == SPOKEN
        assert await confirmed(c, "a", ANONYMOUS.vouched_for("a"), SINK, Rights.WRITE) == ANONYMOUS.vouched_for("a")


async def test_of_anothers_client_only_what_its_transfer_needs_and_only_while_it_runs() -> None:
    async with hosts("a", "b", "c") as (a, _, c):
        vouching = a.broker.vouching
        with vouching.relaying("b", CLIENT, REQUEST), vouching.relaying("b", CLIENT, REQUEST):
            assert await confirmed(c, "b", SPOKEN, SINK, Rights.WRITE) == SPOKEN
            for node, subject, region, right in (
                ("c", SPOKEN, SINK, Rights.WRITE),
                ("b", Subject("uid:7").vouched_for("a"), SINK, Rights.WRITE),
                ("b", Subject("uid:8", ("gid:7",)).vouched_for("a"), SINK, Rights.WRITE),
                ("b", SPOKEN, ChildName("c", "regions", "other"), Rights.WRITE),
                ("b", SPOKEN, SINK, Rights.READ),
            ):
                with pytest.raises(errors.AccessDenied):
                    vouching.check_relayed(node, subject, region, right)
            with pytest.raises(errors.AccessDenied):
                await confirmed(c, "b", SPOKEN, SINK, Rights.READ)
        with pytest.raises(errors.AccessDenied, match="no transfer of uid:7@a under way on nodes/b"):
            await confirmed(c, "b", SPOKEN, SINK, Rights.WRITE)


async def test_one_relay_that_ends_leaves_another_one_be() -> None:
    async with hosts("a", "c") as (a, c):
        vouching = a.broker.vouching
        with vouching.relaying("b", CLIENT, REQUEST):
            with vouching.relaying("b", CLIENT, REQUEST):
                pass
            assert await confirmed(c, "b", SPOKEN, SINK, Rights.WRITE) == SPOKEN


async def test_a_client_that_comes_back_by_way_of_another_node_is_this_nodes_own_again() -> None:
    async with hosts("a", "b") as (a, _):
        back = ChildName("a", "regions", "back")
        request = TransferRequest([columns(SOURCE, back, (0,), (0,), (1,))])
        with a.broker.vouching.relaying("b", CLIENT, request):
            assert await confirmed(a, "b", SPOKEN, back, Rights.WRITE) == CLIENT
        with pytest.raises(errors.AccessDenied):
            await confirmed(a, "b", SPOKEN, back, Rights.WRITE)


async def test_a_node_that_nobody_knows_vouches_for_nobody() -> None:
    async with hosts("a", "c") as (_, c):
        with pytest.raises(errors.NodeNotFound):
            await confirmed(c, "a", CLIENT.vouched_for("nowhere"), SINK, Rights.WRITE)
