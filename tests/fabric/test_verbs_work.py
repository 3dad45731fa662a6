from __future__ import annotations

import dataclasses
import random

import pytest

from peermem.core.types import FabricKind, KeyPart, LinkAttributes, QueuePair, Ranges
from peermem.fabric.verbs_work import cut, is_sound, is_sound_answer, is_sound_end
from tests.fabric.support import ranges_of

BASE = 1 << 40
END = QueuePair("rxe0/1", 17, 5, bytes(15) + b"\x01", 0, 4096, 16)


def test_one_range_is_one_request() -> None:
    pieces = cut(Ranges.single(5, 7, 100), BASE, [11], 4096, [KeyPart(22, 9000, 200)])
    assert pieces == [(BASE + 5, 100, 11, 9007, 22)]


def test_neighbours_on_both_sides_become_one_request() -> None:
    ranges = ranges_of([0, 10, 20, 40], [100, 110, 120, 130], [10, 10, 10, 10])
    pieces = cut(ranges, BASE, [1], 4096, [KeyPart(2, 1000, 200)])
    assert pieces == [(BASE, 30, 1, 1100, 2), (BASE + 40, 10, 1, 1130, 2)]


def test_requests_end_at_the_edges_of_memory_regions() -> None:
    remote = [KeyPart(7, 500, 30), KeyPart(8, 9000, 100)]
    pieces = cut(ranges_of([90], [20], [60]), BASE, [1, 2], 100, remote)
    assert pieces == [(BASE + 90, 10, 1, 520, 7), (BASE + 100, 50, 2, 9000, 8)]


@pytest.mark.parametrize("seed", range(20))
def test_the_pieces_of_any_ranges_are_those_ranges(seed: int) -> None:
    chance = random.Random(seed)
    part = 64
    remote, there = [], 10_000
    for number in range(8):
        length = chance.randrange(1, 90)
        remote.append(KeyPart(number, there, length))
        there += length + chance.randrange(2) * 50
    opened = sum(key.length for key in remote)
    ranges = ranges_of(
        *zip(
            *[
                (here, far, min(chance.randrange(1, 100), 512 - here, opened - far))
                for here, far in [(chance.randrange(512), chance.randrange(opened)) for _ in range(10)]
            ],
            strict=True,
        )
    )
    byte_pairs = [
        (BASE + here + at, far + at)
        for here, far, length in zip(ranges.local, ranges.remote, ranges.lengths, strict=True)
        for at in range(length)
    ]
    starts = [sum(key.length for key in remote[:number]) for number in range(8)]
    moved = []
    for address, length, lkey, remote_address, rkey in cut(ranges, BASE, list(range(8)), part, remote):
        key = remote[rkey]
        assert (address - BASE) // part == (address - BASE + length - 1) // part == lkey
        assert key.address <= remote_address
        assert remote_address + length <= key.address + key.length
        moved += [(address + at, starts[rkey] + remote_address - key.address + at) for at in range(length)]
    assert moved == byte_pairs


@pytest.mark.parametrize(
    ("parts", "is_good"),
    [
        ([KeyPart(1, 0, 100)], True),
        ([KeyPart(1, 0, 60), KeyPart(2, 0, 40)], True),
        ([], False),
        ([KeyPart(1, 0, 99)], False),
        ([KeyPart(1 << 32, 0, 100)], False),
        ([KeyPart(-1, 0, 100)], False),
        ([KeyPart(1, (1 << 64) - 99, 100)], False),
        ([KeyPart(1, -1, 100)], False),
        ([KeyPart(1, 0, 100), KeyPart(1, 0, 0)], False),
    ],
)
def test_parts_of_a_remote_key_are_looked_at(parts: list[KeyPart], is_good: bool) -> None:
    assert is_sound(parts, 100) is is_good


@pytest.mark.parametrize(
    "change",
    [
        {"number": 0},
        {"number": 1 << 24},
        {"psn": -1},
        {"psn": 1 << 24},
        {"gid": bytes(16)},
        {"gid": b"\x01" * 15},
        {"lid": 1 << 16},
        {"mtu": 1500},
        {"reads": 0},
    ],
)
def test_queue_pairs_of_a_remote_node_are_looked_at(change: dict[str, object]) -> None:
    assert is_sound_end(END)
    assert not is_sound_end(dataclasses.replace(END, **change))  # type: ignore[arg-type]


def test_answers_are_about_all_rails() -> None:
    good = LinkAttributes(FabricKind.VERBS, 2, b"i" * 16, queue_pairs=[END, dataclasses.replace(END, number=0)])
    assert is_sound_answer(good, 2)
    assert not is_sound_answer(good, 1)
    assert not is_sound_answer(dataclasses.replace(good, link_id=b""), 2)
    assert not is_sound_answer(dataclasses.replace(good, fabric=FabricKind.TCP), 2)
    assert not is_sound_answer(dataclasses.replace(good, queue_pairs=[END, dataclasses.replace(END, mtu=1)]), 2)
