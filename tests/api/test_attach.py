"""The attach socket over real sockets, with real descriptors and the real client side."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import stat
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from peermem.api.attach import MAX_PACKET, AttachServer
from peermem.broker.sessions import MAX_HANDED_IN, SessionTable
from peermem.core.errors import (
    AccessDenied,
    Internal,
    InvalidField,
    LimitReached,
    NotAdoptable,
    NotMappable,
    PeermemError,
    RegionNotFound,
)
from peermem.v1 import attach_pb2
from tests.api.attaching import HAND_IN, HELLO, LENGTH, MAP, ME, REGION, Node, Raw, serving
from tests.descriptors import limited, lingering_socket, memory_file, open_files, until


class TestMap:
    async def test_job_and_daemon_see_the_same_bytes(self, served: Node) -> None:
        with closing(await served.attach()) as attachment:
            mapped = await asyncio.to_thread(attachment.map, REGION)
            assert served.asked == [(REGION, ME)]
            assert len(mapped) == LENGTH
            mapped[LENGTH - 1] = 1
            served.memory.view()[0] = 2
            assert (served.memory.view()[LENGTH - 1], mapped[0]) == (1, 2)
            mapped.close()

    async def test_threads_share_an_attachment(self, served: Node) -> None:
        fds = [memory_file(length) for length in range(1, 9)]
        with closing(await served.attach()) as attachment:
            asking = [asyncio.to_thread(attachment.map, REGION) for _ in fds]
            handing = [asyncio.to_thread(attachment.hand_in, fd) for fd in fds]
            mappings, handed_in = await asyncio.gather(asyncio.gather(*asking), asyncio.gather(*handing))
            assert [length for _, length in handed_in] == list(range(1, 9))
            for mapping in mappings:
                mapping.close()
        for fd in fds:
            os.close(fd)

    @pytest.mark.parametrize(
        ("fault", "seen"),
        [
            (AccessDenied("not yours", region=REGION), AccessDenied),
            (NotMappable("no descriptor", device="bar0"), NotMappable),
        ],
    )
    async def test_a_fault_reaches_the_job_whole_and_the_session_goes_on(
        self, served: Node, fault: PeermemError, seen: type[PeermemError]
    ) -> None:
        with closing(await served.attach()) as attachment:
            served.fault = fault
            with pytest.raises(seen) as caught:
                await asyncio.to_thread(attachment.map, REGION)
            assert (caught.value.message, caught.value.metadata) == (fault.message, fault.metadata)
            served.fault = None
            (await asyncio.to_thread(attachment.map, REGION)).close()

    async def test_a_defect_is_logged_and_told_without_its_words(self, served: Node) -> None:
        served.fault = RuntimeError("inner words")
        with closing(await served.attach()) as attachment, capture_logs() as logs:
            with pytest.raises(Internal) as caught:
                await asyncio.to_thread(attachment.map, REGION)
            assert "inner words" not in caught.value.message
            assert [entry["event"] for entry in logs] == ["attach_defect"]
            served.fault = None
            (await asyncio.to_thread(attachment.map, REGION)).close()

    async def test_a_region_that_is_not_here(self, served: Node) -> None:
        with closing(await served.attach()) as attachment, pytest.raises(RegionNotFound):
            await asyncio.to_thread(attachment.map, "nodes/a/regions/other")

    @pytest.mark.parametrize("name", ["", "r", "nodes/a/transfers/r", "nodes/a/regions/../r", REGION + "x" * 3000])
    async def test_a_name_that_is_none_is_refused_by_both_sides(self, served: Node, name: str) -> None:
        with closing(await served.attach()) as attachment, pytest.raises(InvalidField):
            await asyncio.to_thread(attachment.map, name)
        with Raw(served.path) as job:
            await job.ask(HELLO)
            request = attach_pb2.AttachRequest(map=attach_pb2.AttachMap(region=name))
            answer = await job.ask(request.SerializeToString())
            assert answer is not None
            assert answer.error.reason == "INVALID_FIELD"
            assert await job.ask(MAP) is not None
        assert len(served.asked) == 1


class TestHandIn:
    async def test_the_descriptor_waits_for_its_session(self, served: Node) -> None:
        fd = memory_file(LENGTH)
        with closing(await served.attach()) as attachment:
            token, length = await asyncio.to_thread(attachment.hand_in, fd)
            assert length == LENGTH
            taken = served.sessions.take(served.sessions.find(attachment.token), token)
            assert os.fstat(taken).st_ino == os.fstat(fd).st_ino
            assert not os.get_inheritable(taken)
            os.close(taken)
        os.close(fd)

    async def test_one_that_is_no_memory_file_is_refused_and_the_session_goes_on(self, served: Node) -> None:
        with closing(await served.attach()) as attachment:
            before = open_files()
            for path in ("/dev/zero", "/proc/self/status", "/"):
                fd = os.open(path, os.O_RDONLY)
                with pytest.raises(NotAdoptable, match="no memory file"):
                    await asyncio.to_thread(attachment.hand_in, fd)
                os.close(fd)
            with pytest.raises(NotAdoptable, match="Bad file descriptor"):
                await asyncio.to_thread(attachment.hand_in, 1 << 20)
            await until(lambda: open_files() <= before)
            (await asyncio.to_thread(attachment.map, REGION)).close()

    async def test_more_than_may_wait(self, served: Node) -> None:
        fd = memory_file(1)
        with closing(await served.attach()) as attachment:
            for _ in range(MAX_HANDED_IN):
                await asyncio.to_thread(attachment.hand_in, fd)
            before = open_files()
            with pytest.raises(LimitReached):
                await asyncio.to_thread(attachment.hand_in, fd)
            await until(lambda: open_files() <= before)
        os.close(fd)


class TestMalformed:
    @pytest.mark.parametrize(
        "packet",
        [b"\xff", b"not a message", b"\x7a\x00", bytes(MAX_PACKET), b"\x12\x03\x0a\x01\xff"],
        ids=["a byte", "text", "a field of the future", "zeros", "a name that is no text"],
    )
    @pytest.mark.parametrize("greeted", [False, True])
    async def test_bytes_that_are_no_request(self, served: Node, packet: bytes, greeted: bool) -> None:
        with Raw(served.path) as job:
            if greeted:
                assert await job.ask(HELLO) is not None
            await job.is_refused(packet)
        await served.quiet()

    async def test_a_packet_that_is_too_long(self, served: Node) -> None:
        with Raw(served.path) as job:
            await job.ask(HELLO)
            await job.is_refused(HELLO + b"\x7a\xff\x1f" + bytes(MAX_PACKET))

    async def test_a_second_hello(self, served: Node) -> None:
        with Raw(served.path) as job:
            await job.ask(HELLO)
            await job.is_refused(HELLO)

    @pytest.mark.parametrize("packet", [MAP, HAND_IN], ids=["map", "hand in"])
    async def test_a_command_before_hello(self, served: Node, packet: bytes) -> None:
        with Raw(served.path) as job:
            await job.is_refused(packet)

    @pytest.mark.parametrize("packet", [MAP, HELLO, b"\xff"], ids=["map", "hello", "garbage"])
    @pytest.mark.parametrize("count", [1, 2, 253])
    async def test_descriptors_where_none_belong(self, served: Node, packet: bytes, count: int) -> None:
        before = open_files()
        fd = memory_file(1)
        with Raw(served.path) as job:
            if packet != HELLO:
                await job.ask(HELLO)
            await job.is_refused(packet, [fd] * count)
        os.close(fd)
        await until(lambda: open_files() <= before)

    @pytest.mark.parametrize("count", [0, 2, 253])
    async def test_hand_in_with_another_number_than_one(self, served: Node, count: int) -> None:
        before = open_files()
        fd = memory_file(1)
        with Raw(served.path) as job:
            await job.ask(HELLO)
            await job.is_refused(HAND_IN, [fd] * count)
        os.close(fd)
        await until(lambda: open_files() <= before)

    async def test_an_empty_packet_ends_the_session(self, served: Node) -> None:
        with Raw(served.path) as job:
            await job.ask(HELLO)
            assert await job.ask(b"", [0]) is None
        await served.quiet()


class TestHostileJobs:
    async def test_without_hello_it_is_dropped(self, node: Node) -> None:
        async with serving(node.server(hello_timeout=0.05)):
            with closing(await node.attach()) as attachment, Raw(node.path) as silent:
                assert await silent.answer() is None
                (await asyncio.to_thread(attachment.map, REGION)).close()  # who said hello may be silent for long

    async def test_who_does_not_read_is_dropped_and_holds_few_descriptors(self, served: Node) -> None:
        with Raw(served.path) as job:
            job.send(HELLO)
            await until(lambda: not job.sends(MAP))
            assert 0 < len(served.asked) < 200
        await served.quiet()

    async def test_what_hangs_when_it_is_closed_hangs_only_its_own_connection(self, served: Node) -> None:
        hands_in, greets, leaves = [Raw(served.path) for _ in range(3)]
        ends = []
        for job, greeting, packet in ((hands_in, HELLO, HAND_IN), (greets, b"", HELLO), (leaves, HELLO, b"\xff")):
            if greeting:
                await job.ask(greeting)
            fd, end = lingering_socket()
            job.send(packet, [fd])
            if job is leaves:
                job.send(HAND_IN, [fd])  # is never read: closing the connection closes it
            os.close(fd)
            ends.append(end)
        for job in (hands_in, greets):
            answer = await job.answer()
            assert answer is not None
            assert answer.HasField("error")
        async with asyncio.timeout(5):
            with closing(await served.attach()) as attachment:
                (await asyncio.to_thread(attachment.map, REGION)).close()
        for end in ends:
            end.close()
        for job in (hands_in, greets, leaves):
            job.sock.close()
        await served.quiet()

    async def test_a_hanging_descriptor_does_not_hold_up_the_end(self, node: Node) -> None:
        async with serving(node.server()):
            with Raw(node.path) as job:
                await job.ask(HELLO)
                fd, end = lingering_socket()
                job.send(HAND_IN, [fd])
                os.close(fd)
                assert await job.answer() is not None
        end.close()

    async def test_a_daemon_without_descriptors_pauses_and_then_serves(self, served: Node) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as early, capture_logs() as logs:
            early.setblocking(False)
            with limited(resource.RLIMIT_NOFILE, 3):
                early.connect(served.path)
                await until(lambda: bool(logs))
            assert [(entry["event"], entry["cause"]) for entry in logs] == [
                ("attach_accept_failed", "Too many open files")
            ]
            early.send(HELLO)
            await until(lambda: len(served.sessions) == 1)

    async def test_connections_beyond_the_limit_wait_and_are_served_later(self, node: Node) -> None:
        node.sessions = SessionTable(1)
        async with serving(node.server()):
            crowd = [Raw(node.path) for _ in range(65)]
            with Raw(node.path) as last:
                last.send(HELLO)
                await crowd[0].ask(HELLO)
                for job in crowd:
                    job.sock.close()
                answer = await last.answer()
                assert answer is not None
                assert answer.session.token


class TestSocketFile:
    async def test_its_folder_is_made_and_everybody_may_attach(self, node: Node, tmp_path: Path) -> None:
        node.path = str(tmp_path / "run" / "peermem" / "attach.sock")
        async with serving(node.server()):
            assert stat.S_IMODE(os.stat(node.path).st_mode) == 0o666
            assert stat.S_IMODE(os.stat(os.path.dirname(node.path)).st_mode) & 0o700 == 0o700
            (await node.attach()).close()

    async def test_another_mode(self, node: Node) -> None:
        server = AttachServer(node.path, node.sessions, node.map_region, node.token_subject, "a", mode=0o600)
        async with serving(server):
            assert stat.S_IMODE(os.stat(node.path).st_mode) == 0o600

    async def test_who_connects_before_it_serves_is_answered_then(self, node: Node) -> None:
        server = node.server()
        server.listen()
        waiting = asyncio.create_task(node.attach())
        await until(lambda: os.path.exists(node.path))
        server.serve()
        (await waiting).close()
        await server.close()

    async def test_one_that_was_handed_over_is_served_and_left_there(self, node: Node) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as held:
            held.bind(node.path)
            held.listen()
            for _ in range(2):  # as when the daemon is restarted
                server = node.server()
                server.listen(held.dup())
                server.serve()
                (await node.attach()).close()
                await server.close()
            assert os.stat(node.path)

    async def test_one_of_a_dead_daemon_is_replaced(self, node: Node) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
            dead.bind(node.path)
        async with serving(node.server()):
            (await node.attach()).close()

    async def test_one_of_a_living_daemon_is_left_alone(self, served: Node) -> None:
        with pytest.raises(OSError, match="Another daemon is listening"):
            served.server().listen()
        (await served.attach()).close()

    async def test_a_file_that_is_no_socket_is_left_alone(self, node: Node, tmp_path: Path) -> None:
        node.path = str(tmp_path)
        server = node.server()
        with pytest.raises(OSError, match="no socket"):
            server.listen()
        await server.close()
        assert os.listdir(tmp_path) == []
