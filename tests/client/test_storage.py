"""What the client makes of loads and stores: requests, progress and the outcome."""

import pytest
from google.protobuf.duration_pb2 import Duration

from peermem.client.facts import Progress
from peermem.client.storage import Course, StorageWay, load_request, store_request
from peermem.core import errors
from peermem.v1 import region_pb2

ASKED = {"offset": 0, "length": None, "checksum": False, "request": None}


def test_requests_say_what_was_asked_for() -> None:
    load = load_request("x", "/f", offset=1, length=2, file_offset="4KiB", checksum=True, request="id")
    assert (load.name, load.path, load.offset, load.length, load.file_offset) == ("x", "/f", 1, 2, 4096)
    assert (load.checksum, load.request_id) == (True, "id")
    assert load_request("x", "/f", file_offset=0, **ASKED).request_id  # type: ignore[arg-type]
    assert store_request("x", "/f", file_offset=0, **ASKED).HasField("file_offset")  # type: ignore[arg-type]
    assert not store_request("x", "/f", file_offset=None, **ASKED).HasField("file_offset")  # type: ignore[arg-type]


def test_the_last_message_is_the_outcome() -> None:
    seen: list[Progress] = []
    course = Course(seen.append)
    course.take(region_pb2.StorageProgress(bytes_total=10, bytes_done=4))
    with pytest.raises(errors.Internal, match="without an outcome"):
        course.outcome()
    last = region_pb2.StorageProgress(bytes_total=10, bytes_done=10, duration=Duration(seconds=2), crc32c=0)
    last.way = region_pb2.STORAGE_WAY_STAGED
    course.take(last)
    info = course.outcome()
    assert [progress.bytes_done for progress in seen] == [4, 10]
    assert (info.bytes_done, info.duration, info.bandwidth, info.crc32c) == (10, 2.0, 5.0, 0)
    assert info.way is StorageWay.STAGED


def test_a_way_of_a_newer_daemon_is_no_fault() -> None:
    course = Course(None)
    message = region_pb2.StorageProgress(duration=Duration())
    message.way = 99  # type: ignore[assignment]
    course.take(message)
    info = course.outcome()
    assert (info.way, info.crc32c, info.bandwidth) == (StorageWay.UNSPECIFIED, None, None)
