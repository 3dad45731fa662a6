"""Copies between memory with a file, memory with a mapping only, and memory that has vanished."""

import ctypes
import mmap
import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import google_crc32c
import pytest

from peermem import memory
from tests.descriptors import limited, open_files

SIZE = 3 << 20


@dataclass
class Bytes:
    """A `Memory` over a memory file, or over an anonymous mapping with no file."""

    length: int
    fd: int | None
    mapping: mmap.mmap

    def view(self) -> memoryview:
        return memoryview(self.mapping)


@pytest.fixture
def make() -> Iterator[Callable[[bool], Bytes]]:
    made: list[Bytes] = []

    def one(with_file: bool) -> Bytes:
        fd = os.memfd_create("test") if with_file else None
        if fd is not None:
            os.ftruncate(fd, SIZE)
        made.append(Bytes(SIZE, fd, mmap.mmap(-1 if fd is None else fd, SIZE)))
        return made[-1]

    yield one
    for each in made:
        each.mapping.close()
        if each.fd is not None:
            os.close(each.fd)


@pytest.mark.parametrize("source_file", [True, False])
@pytest.mark.parametrize("target_file", [True, False])
def test_bytes_arrive_where_they_belong(make: Callable[[bool], Bytes], source_file: bool, target_file: bool) -> None:
    source, target = make(source_file), make(target_file)
    data = os.urandom(SIZE)
    memory.write(source, 0, data)
    memory.copy(source, 1, target, 5, (1 << 20) + 7)
    assert memory.read(target, 5, (1 << 20) + 7) == data[1 : (1 << 20) + 8]
    assert memory.read(target, 0, 5) == bytes(5)
    assert memory.read(target, (1 << 20) + 12, 3) == bytes(3)


@pytest.mark.parametrize("with_file", [True, False])
def test_the_checksum_is_that_of_the_ranges_in_order(make: Callable[[bool], Bytes], with_file: bool) -> None:
    source = make(with_file)
    data = os.urandom(SIZE)
    memory.write(source, 0, data)
    ranges = [(7, 5), (1 << 20, (1 << 20) + 1), (0, 0)]
    wanted = google_crc32c.value(b"".join(data[start : start + length] for start, length in ranges))
    assert memory.crc32c(source, ranges) == wanted
    assert memory.crc32c(source, ranges[1:], memory.crc32c(source, ranges[:1])) == wanted


def test_ranges_outside_are_a_defect_of_the_caller(make: Callable[[bool], Bytes]) -> None:
    a, b = make(True), make(True)
    for call in (
        lambda: memory.read(a, SIZE, 1),
        lambda: memory.read(a, -1, 1),
        lambda: memory.write(a, SIZE - 1, b"xx"),
        lambda: memory.copy(a, 0, b, 1, SIZE),
        lambda: memory.copy(a, 1, b, 0, SIZE),
        lambda: memory.crc32c(a, [(SIZE, 1)]),
    ):
        with pytest.raises(ValueError, match="outside a memory"):
            call()


def test_a_file_that_ends_early_is_an_error(make: Callable[[bool], Bytes]) -> None:
    a = make(True)
    assert a.fd is not None
    os.ftruncate(a.fd, 4096)
    with pytest.raises(OSError, match="ended"):
        memory.read(a, 0, SIZE)


def test_vanished_memory_is_an_error_and_no_signal(make: Callable[[bool], Bytes]) -> None:
    source, target = make(True), make(False)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.addressof(ctypes.c_char.from_buffer(target.mapping))
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(SIZE), 0) == 0
    for call in (
        lambda: memory.copy(source, 0, target, 0, 4096),
        lambda: memory.read(target, 0, 4096),
        lambda: memory.write(target, 0, b"x"),
        lambda: memory.crc32c(target, [(0, 1)]),
    ):
        with pytest.raises(OSError, match="Bad address"):
            call()


def test_host_memory_is_zeroed_and_its_own() -> None:
    one, other = memory.HostMemory(5000, "peermem-test"), memory.HostMemory(5000)
    assert memory.read(one, 0, 5000) == bytes(5000)
    memory.write(one, 4999, b"x")
    assert one.view()[4999] == ord("x")
    assert memory.read(other, 4999, 1) == b"\0"
    with open("/proc/self/maps") as maps:
        assert "peermem-test" in maps.read()
    for each in (one, other):
        each.close()
        each.close()
        assert each.fd is None
        with pytest.raises(ValueError, match="closed"):
            each.view()


def test_host_memory_that_can_not_be_had_leaves_nothing_open() -> None:
    before = open_files()
    with limited(resource.RLIMIT_FSIZE, 4096), pytest.raises(OSError, match="File too large"):
        memory.HostMemory(4097)
    assert open_files() <= before


@pytest.mark.parametrize(("length", "pages"), [(0, 0), (1, 1), (4096, 1), (4097, 2)])
def test_whole_pages(length: int, pages: int) -> None:
    assert memory.whole_pages(length) == pages * mmap.PAGESIZE
