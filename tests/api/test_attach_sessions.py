"""Sessions of the attach socket: whose they are, how long they last, and how many there may be."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import closing

import pytest

from peermem.broker.sessions import SessionTable
from peermem.core.errors import LimitReached, NodeUnreachable, Unauthenticated
from peermem.core.identity import Subject
from tests.api.attaching import ME, REGION, Node, serving
from tests.descriptors import open_files, until

LONG_TOKEN = "x" * 12_000
"""As long as any that is reviewed."""


async def test_it_is_of_the_user_that_the_kernel_names_and_lasts_as_long_as_the_connection(served: Node) -> None:
    attachment = await served.attach()
    session = served.sessions.find(attachment.token)
    assert (session.subject, session.pid, attachment.node) == (ME, os.getpid(), "nodes/a")
    assert attachment.token not in repr(attachment)
    attachment.close()
    attachment.close()
    await served.quiet()
    assert served.ended == [session]


async def test_who_shows_a_token_is_the_service_account_and_maps_as_that(node: Node) -> None:
    loader = Subject("kubernetes:training/loader")

    async def token_subject(token: str) -> Subject:
        if token != LONG_TOKEN:
            raise Unauthenticated("The token is of nobody.")
        return loader

    node.token_subject = token_subject
    async with serving(node.server()):
        with closing(await node.attach(LONG_TOKEN)) as attachment:
            session = node.sessions.find(attachment.token)
            assert (session.subject, session.pid) == (loader, os.getpid())
            (await asyncio.to_thread(attachment.map, REGION)).close()
            assert node.asked == [(REGION, loader)]
        with pytest.raises(Unauthenticated, match="of nobody"):
            await node.attach("another")
        await node.quiet()


async def test_a_token_counts_only_where_the_node_has_somebody_to_ask(served: Node) -> None:
    with pytest.raises(Unauthenticated, match=r"no \[kubernetes\] table"):
        await served.attach("a.b.c")
    assert len(served.sessions) == 0


async def test_a_review_that_never_ends_does_not_keep_the_connection(node: Node) -> None:
    async def token_subject(_: str) -> Subject:
        await asyncio.Event().wait()
        raise AssertionError

    node.token_subject = token_subject
    async with serving(node.server(hello_timeout=0.05)):
        with pytest.raises(NodeUnreachable, match="closed the connection"):
            await node.attach("a.b.c")
        await node.quiet()


async def test_a_killed_job_ends_its_session_and_what_it_left(served: Node) -> None:
    script = (
        "import os, sys, time; from peermem.client.attach import Attachment\n"
        f"attachment = Attachment.open({served.path!r})\n"
        "attachment.hand_in(os.memfd_create('left'))\n"
        "print('attached', flush=True); sys.stdin.read()"
    )
    before = open_files()
    job = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, env={"PYTHONPATH": ":".join(sys.path)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert job.stdout is not None
    assert await job.stdout.readline() == b"attached\n"
    job.kill()
    await job.wait()
    await served.quiet()
    assert [session.pid for session in served.ended] == [job.pid]
    await until(lambda: open_files() <= before)


async def test_one_too_many_is_told_so(node: Node) -> None:
    node.sessions = SessionTable(1)
    async with serving(node.server()):
        with closing(await node.attach()), pytest.raises(LimitReached, match="1 sessions open"):
            await node.attach()
        await node.quiet()
        (await node.attach()).close()


async def test_the_end_of_the_server_is_the_end_of_all(node: Node) -> None:
    server = node.server()
    server.listen()
    server.serve()
    attachment = await node.attach()
    await server.close()
    await server.close()
    assert len(node.sessions) == 0
    assert os.listdir(os.path.dirname(node.path)) == []
    with pytest.raises(NodeUnreachable, match="can't be reached"):
        await asyncio.to_thread(attachment.map, REGION)
    with pytest.raises(NodeUnreachable, match="closed"):
        await asyncio.to_thread(attachment.map, REGION)
    with pytest.raises(NodeUnreachable, match="No such file"):
        await node.attach()
