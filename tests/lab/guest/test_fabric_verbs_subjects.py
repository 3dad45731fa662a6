"""Subjects over the verbs fabric between two nodes: the NIC keeps apart what is theirs, and nothing of them stays."""

from __future__ import annotations

from pathlib import Path as FilePath

import pytest

from peermem.core.types import Ranges
from peermem.fabric.base import Opcode, Status
from tests.fabric.support import MIB, eventually
from tests.lab.guest.fabric_node import FarNode
from tests.lab.guest.wires import QUICK, Wire, Wired, all_well, far_state

ANN, BEN = "uid:1@a", "uid:2@a"


@pytest.mark.parametrize("opcode", list(Opcode))
async def test_what_is_registered_for_one_subject_is_of_no_use_to_another_one(
    wire: Wire, far_socket: FilePath, opcode: Opcode
) -> None:
    """No window is in the way: only that the protection domain is another one."""
    before = await wire.far.content(), wire.local.bytes()
    ann, again, ben = [
        await Wire(wire.fabric, FarNode(far_socket), wire.local, subject).open() for subject in (ANN, ANN, BEN)
    ]
    key = await ann.far.expose()
    assert await ben.wait([ben.post(opcode, key, Ranges.single(0, MIB, 8192))]) == {Status.REM_ACCESS_ERR}
    assert (await wire.far.content(), wire.local.bytes()) == before
    for each in (ann, again):
        assert await each.wait([each.post(opcode, key, Ranges.single(0, MIB, 8192))]) == {Status.SUCCESS}
    assert ann.domains() == again.domains()
    assert not ann.domains() & ben.domains()
    await ann.far.conceal()
    for each in (ann, again, ben):
        await all_well(each)
        await each.link.close()
        assert each.events.faults == []


async def test_subjects_that_come_and_go_leave_nothing(wired: Wired, far_socket: FilePath) -> None:
    async with wired(QUICK) as wire:
        here, there = wire.fabric.object_counts(), (await wire.far.state())[3]
        for number in range(5):
            subjects = [
                await Wire(wire.fabric, FarNode(far_socket), wire.local, f"uid:{number + each}@a").open()
                for each in range(3)
            ]
            assert wire.fabric.object_counts()["pd"] == 4 * here["pd"]
            for each in subjects:
                await all_well(each)
            for each in subjects:
                await each.link.close()
        await eventually(lambda: wire.fabric.object_counts() == here)
        await far_state(wire, lambda _lost, links, grants, objects: (links, grants, objects) == (1, 0, there))
