"""What the kernel says of the process behind a session, and a session's end with it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from peermem.core.errors import SessionNotFound
from peermem.core.identity import Subject
from peermem.core.origin import Origin, parse_origin
from tests.api.attaching import Node
from tests.descriptors import open_files, until


async def test_it_says_where_its_process_comes_from(served: Node) -> None:
    with closing(await served.attach()) as attachment:
        session = served.sessions.find(attachment.token)
        assert session.origin == parse_origin(Path("/proc/self/cgroup").read_text())  # noqa: ASYNC240 - of the kernel


async def test_it_ends_with_its_process_although_a_child_keeps_the_connection(served: Node) -> None:
    script = (
        "import os, sys; from peermem.client.attach import Attachment\n"
        f"attachment = Attachment.open({served.path!r})\n"
        "if os.fork() == 0: sys.stdin.read()\n"
        "else: os._exit(0)"
    )
    before = open_files()
    job = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, env={"PYTHONPATH": ":".join(sys.path)}, stdin=subprocess.PIPE
    )
    await until(lambda: len(served.ended) == 1)
    assert [session.pid for session in served.ended] == [job.pid]
    assert job.stdin is not None
    job.stdin.close()  # the child lived up to here
    await job.wait()
    await until(lambda: open_files() <= before)  # fewer where another test's connection has closed meanwhile


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may choose its groups")
@pytest.mark.parametrize(("count", "kept"), [(0, 1), (40, 41), (100, 64), (300, 1)])
async def test_as_many_groups_count_as_a_subject_has_room_for(served: Node, count: int, kept: int) -> None:
    script = (
        "import os, sys; from peermem.client.attach import Attachment\n"
        f"os.setgroups(range(1000, 1000 + {count})); os.setgid(7)\n"
        f"attachment = Attachment.open({served.path!r}); sys.stdin.read()"
    )
    job = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, env={"PYTHONPATH": ":".join(sys.path)}, stdin=subprocess.PIPE
    )
    await until(lambda: len(served.sessions) == 1)
    assert job.stdin is not None
    job.stdin.close()
    await job.wait()
    await served.quiet()
    groups = served.ended[0].subject.groups
    assert groups == ("gid:7", *(f"gid:{1000 + number}" for number in range(count)))[:64][:kept]
    assert Subject.parse_spoken(served.ended[0].subject.vouched_for("a").spoken()).groups == groups


async def test_a_kernel_that_gives_no_descriptor_of_a_process_tells_less(
    served: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peermem.api.job_process._SO_PEERPIDFD", 9999)
    with closing(await served.attach()) as attachment:
        assert served.sessions.find(attachment.token).origin == Origin()
    await served.quiet()


async def test_a_process_that_the_kernel_has_forgotten_gets_none(served: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    so_peername = 28  # refused here with an error that is none of an option that there isn't
    monkeypatch.setattr("peermem.api.job_process._SO_PEERPIDFD", so_peername)
    with pytest.raises(SessionNotFound, match="does not know the process"):
        await served.attach()
