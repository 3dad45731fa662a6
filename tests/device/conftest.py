from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from peermem.device.pci_resource import PciResourceDevice
from tests.device.conformance import PAGE
from tests.device.pci_tree import ADDRESS, PciTree

_NOBODY = 65534


@pytest.fixture
def as_nobody(tmp_path: Path) -> Iterator[None]:
    """Have no privilege, and nothing in `tmp_path` writable; its folders can still be read."""
    folders = [tmp_path, *tmp_path.parents]
    modes = {folder: folder.stat().st_mode for folder in folders if not folder.stat().st_mode & 0o005}
    for folder, mode in modes.items():
        folder.chmod(mode | 0o055)
    for file in tmp_path.rglob("*"):
        if file.is_file():
            file.chmod(0o444)
    before = os.geteuid()
    if before == 0:
        os.seteuid(_NOBODY)
    yield
    os.seteuid(before)
    for folder, mode in modes.items():
        folder.chmod(mode)


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    """A function with 4 MiB in its BAR 2."""
    return PciTree(tmp_path, 4 << 20)


@pytest.fixture
async def device(tree: PciTree) -> AsyncIterator[PciResourceDevice]:
    """64 pages from the second MiB of that BAR on."""
    device = PciResourceDevice("bar0", ADDRESS, 2, 1 << 20, 64 * PAGE, tree.root)
    yield device
    await device.close()
