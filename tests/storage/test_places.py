"""What may be opened: hostile paths, things that are no files, and errors of the kernel."""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from peermem.core import errors
from peermem.core.errors import PeermemError
from peermem.core.storage import Order
from peermem.storage.places import Place, Places, refused
from tests.descriptors import limited, open_files
from tests.storage.support import storage


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    before = open_files()
    yield
    assert open_files() <= before


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    """Return the folder that is allowed, beside one that is not."""
    for name in ("inside", "outside", "inside/deep"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside/secret").write_bytes(b"secret")
    (tmp_path / "inside/deep/x").write_bytes(b"x" * 100)
    return tmp_path / "inside"


async def open_and_close(folder: Path, path: str, order: Order = Order.LOAD, offset: int | None = 0) -> int:
    file = await storage(folder).open(order, path, offset, 10 if order is Order.STORE else 0)
    await file.close()
    return file.length


async def test_a_file_below_the_folder(inside: Path) -> None:
    assert await open_and_close(inside, f"{inside}/deep/x") == 100
    assert await open_and_close(inside, f"/{inside}//./deep/x/") == 100


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "{inside}/../outside/secret",
        "{inside}/deep/../deep/x",
        "{inside}/..",
        "{inside}2/x",
        "/",
    ],
)
async def test_paths_outside_are_refused(inside: Path, path: str, order: Order) -> None:
    with pytest.raises(errors.StorageForbidden, match="is in no directory") as caught:
        await open_and_close(inside, path.format(inside=inside), order, None)
    assert str(inside) in caught.value.message


@pytest.mark.parametrize(
    "path", ["", "x", "inside/x", "{inside}/\0x", "{inside}/" + "x" * 4096, "{inside}/" + "x" * 256]
)
async def test_what_is_no_path_is_refused(inside: Path, path: str) -> None:
    for order in Order:
        with pytest.raises(errors.InvalidField, match="path"):
            await open_and_close(inside, path.format(inside=inside), order, None)


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("out", "../outside"),
        ("file", "../outside/secret"),
        ("near", "deep/x"),
        ("self", "self"),
        ("proc", "/proc/self"),
    ],
)
async def test_symbolic_links_are_not_followed(inside: Path, link: str, target: str) -> None:
    (inside / link).symlink_to(target)
    for path in (inside / link, inside / link / "secret"):
        for order in Order:
            with pytest.raises((errors.StorageForbidden, errors.FileNotFound)) as caught:
                await open_and_close(inside, str(path), order, None)
            if path.name == link:
                assert "symbolic link" in caught.value.message


async def test_the_operators_own_links_are_followed(inside: Path) -> None:
    link = inside.parent / "link"
    link.symlink_to(inside)
    assert await open_and_close(link, f"{link}/deep/x") == 100
    file = inside.parent / "file"
    file.symlink_to(inside / "deep/x")
    assert await open_and_close(file, str(file)) == 100
    assert await open_and_close(file, str(file), Order.STORE, None) == 10
    assert file.is_symlink()


async def test_what_is_no_file_is_refused_and_not_waited_for(inside: Path) -> None:
    os.mkfifo(inside / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(inside / "socket"))
        for name, kind in (("fifo", "a FIFO"), ("socket", "a socket"), ("deep", "a directory")):
            for order in Order:
                with pytest.raises(errors.FileUnusable, match=f"is {kind}"):
                    await open_and_close(inside, str(inside / name), order, None)
    for path in ("/dev/full", "/dev/null"):
        with pytest.raises(errors.FileUnusable, match="character device"):
            await open_and_close(Path("/dev"), path)
    with pytest.raises(errors.FileUnusable, match="a directory"):
        await open_and_close(inside, str(inside))


@pytest.mark.parametrize("path", ["none", "none/x", "deep/x/y"])
async def test_files_that_do_not_exist(inside: Path, path: str) -> None:
    for order, offset in ((Order.LOAD, 0), (Order.STORE, 0)):
        with pytest.raises(errors.FileNotFound):
            await open_and_close(inside, str(inside / path), order, offset)
    if path != "none":
        with pytest.raises(errors.FileNotFound):
            await open_and_close(inside, str(inside / path), Order.STORE, None)
    with pytest.raises(errors.FileNotFound):
        await open_and_close(inside / "missing", str(inside / "missing/x"))


async def test_files_that_are_too_short(inside: Path) -> None:
    path, here = str(inside / "deep/x"), storage(inside)
    for offset, length in ((0, 101), (99, 2), (200, 1)):
        with pytest.raises(errors.FileTooShort, match="has 100 bytes"):
            await here.open(Order.LOAD, path, offset, length)
    (inside / "empty").touch()
    for name, offset in ((str(inside / "empty"), 0), (path, 100), (path, 200)):
        with pytest.raises((errors.ZeroLength, errors.FileTooShort)):
            await here.open(Order.LOAD, name, offset, 0)


async def test_a_folder_that_is_open_to_loads_only(inside: Path) -> None:
    read_only = storage(inside, write=False)
    for offset in (None, 0):
        with pytest.raises(errors.StorageForbidden, match="open to loads only"):
            await read_only.open(Order.STORE, str(inside / "deep/x"), offset, 10)
    await (await read_only.open(Order.LOAD, str(inside / "deep/x"), 0, 0)).close()


def test_the_innermost_place_counts(inside: Path) -> None:
    places = Places([Place(str(inside), write=False), Place(str(inside / "deep"), write=True)])
    pinned, _ = places.pin(str(inside / "deep/x"), write=True)
    os.close(pinned)
    with pytest.raises(errors.StorageForbidden):
        places.pin(str(inside / "y"), write=True)


async def test_a_daemon_out_of_descriptors(inside: Path) -> None:
    free = os.dup(0)
    os.close(free)
    with limited(resource.RLIMIT_NOFILE, free), pytest.raises(errors.LimitReached):
        await open_and_close(inside, str(inside / "deep/x"))


async def test_a_daemon_without_the_permission(inside: Path) -> None:
    (inside / "deep/x").chmod(0)
    if os.geteuid():
        with pytest.raises(errors.StorageForbidden, match="may not open"):
            await open_and_close(inside, str(inside / "deep/x"))
        return
    os.setegid(65534)
    os.seteuid(65534)
    try:
        with pytest.raises((errors.StorageForbidden, errors.FileNotFound)):
            await open_and_close(inside, str(inside / "deep/x"))
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EROFS, errors.StorageForbidden),
        (errno.ENOSPC, errors.StorageFull),
        (errno.EDQUOT, errors.StorageFull),
        (errno.EBUSY, errors.FileUnusable),
        (errno.EIO, errors.StorageFailed),
        (None, errors.StorageFailed),
    ],
)
def test_errors_of_the_kernel_have_reasons(number: int | None, kind: type[PeermemError]) -> None:
    error = OSError(number, os.strerror(number)) if number else OSError("the file took 1 of 2 bytes")
    found = refused("/data/x", error)
    assert type(found) is kind
    assert "/data/x" in found.message


def test_a_file_system_that_the_unit_has_read_only_is_told_as_that() -> None:
    found = refused("/data/x", OSError(errno.EROFS, ""))
    assert "ReadWritePaths=" in found.message
