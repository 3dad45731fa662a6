"""Whatever a job sends, the daemon keeps serving others and keeps none of its descriptors."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from peermem.api.attach import MAX_PACKET
from peermem.v1 import attach_pb2
from tests.api.attaching import HAND_IN, HELLO, MAP, REGION, Raw, quiet_node, serving
from tests.descriptors import memory_file, open_files, until
from tests.fuzzing import fuzz, tried

GOOD = (HELLO, MAP, HAND_IN)

mutated = st.builds(
    lambda packet, position, change: packet[: position % len(packet)] + change + packet[position % len(packet) + 1 :],
    st.sampled_from(GOOD),
    st.integers(0, 1 << 16),
    st.binary(max_size=8),
)
packets = st.one_of(
    st.sampled_from(GOOD),
    mutated,
    st.binary(max_size=64),
    st.integers(MAX_PACKET - 2, MAX_PACKET + 2).map(bytes),
    st.builds(
        lambda name: attach_pb2.AttachRequest(map=attach_pb2.AttachMap(region=name)).SerializeToString(),
        st.text(max_size=100),
    ),
)
conversation = st.lists(st.tuples(packets, st.sampled_from([0, 0, 0, 1, 2, 253])), max_size=8)


@fuzz(150)
@given(greets=st.booleans(), said=conversation)
def test_any_conversation(greets: bool, said: list[tuple[bytes, int]]) -> None:
    with TemporaryDirectory() as folder:
        asyncio.run(survives(Path(folder), [(HELLO, 0)] * greets + said))


async def survives(folder: Path, said: list[tuple[bytes, int]]) -> None:
    async with quiet_node(folder) as node, serving(node.server()):
        before = open_files()
        fd = memory_file(100)
        with Raw(node.path) as job:
            for data, count in said:
                tried("attach packets")
                if not await is_answered(job.ask(data, [fd] * count)):
                    break
        os.close(fd)
        await node.quiet()
        await until(lambda: open_files() <= before)
        with closing(await node.attach()) as attachment:
            (await asyncio.to_thread(attachment.map, REGION)).close()


async def is_answered(asking: Coroutine[None, None, attach_pb2.AttachResponse | None]) -> bool:
    """Return whether there is an answer; the only other thing that may happen is the end of the connection."""
    try:
        answer = await asking
    except (BrokenPipeError, ConnectionResetError):
        return False
    if answer is None:
        return False
    outcome = answer.WhichOneof("outcome")
    assert outcome is not None
    assert outcome != "error" or answer.error.reason in {
        "MALFORMED_MESSAGE", "INVALID_FIELD", "REGION_NOT_FOUND", "NOT_ADOPTABLE", "LIMIT_REACHED",
    }  # fmt: skip
    return True
