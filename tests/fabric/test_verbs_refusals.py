"""What the kernel and the NIC answer to a registration, as reasons with their fixes."""

from __future__ import annotations

import errno
import os
from pathlib import Path as FilePath
from types import SimpleNamespace
from typing import cast

import pytest

from peermem import memory
from peermem.core import errors
from peermem.core.types import Path
from peermem.fabric import verbs_refusals
from peermem.fabric.verbs_nic import Port
from peermem.fabric.verbs_refusals import refusal
from peermem.fabric.verbs_types import VerbsError
from tests.descriptors import memory_file

PORT = cast(Port, SimpleNamespace(name="nic0/1"))
LENGTH = 4096


@pytest.mark.parametrize(
    ("code", "path", "fault"),
    [
        (errno.EFAULT, Path.P2PDMA, errors.RegistrationRefused),
        (errno.EREMOTEIO, Path.HOST, errors.RegistrationRefused),
        (errno.EINVAL, Path.HOST, errors.RegistrationRefused),
        (errno.EOPNOTSUPP, Path.P2PDMA, errors.OnDemandMissing),
        (errno.EOPNOTSUPP, Path.HOST, errors.RegistrationRefused),
        (errno.ENOMEM, Path.HOST, errors.MemlockTooSmall),
        (errno.EPERM, Path.HOST, errors.MemlockTooSmall),
        (errno.ENODEV, Path.HOST, errors.NicNotFound),
        (errno.EFAULT, Path.LEGACY_PEER_MEMORY, errors.RegistrationRefused),
    ],
)
def test_each_errno_has_its_reason(code: int, path: Path, fault: type[errors.PeermemError]) -> None:
    error = refusal(VerbsError("no", code), PORT, LENGTH, path)
    assert type(error) is fault
    assert "nic0/1" in error.message
    assert ("nvidia_peermem" in error.message) is (path is Path.LEGACY_PEER_MEMORY)


class TestDmaBufs:
    """The exporter's name comes from the kernel; here a memory file stands for a dma-buf of 8 KiB."""

    @pytest.fixture
    def fd(self, monkeypatch: pytest.MonkeyPatch) -> int:
        fd = memory_file(2 * LENGTH)
        monkeypatch.setattr(verbs_refusals, "dma_buf_exporter", lambda asked: "vfio_pci_core" if asked == fd else "")
        return fd

    @pytest.mark.parametrize(
        ("code", "offset", "fault", "words"),
        [
            (errno.EOPNOTSUPP, 0, errors.DmaBufUnsupported, "can't import the dma-buf of exporter vfio_pci_core"),
            (errno.ENODEV, 0, errors.RegionRevoked, "taken its memory back"),
            (errno.EINVAL, LENGTH, errors.RegistrationRefused, "PCI lets the two not reach"),
            (errno.EINVAL, LENGTH + 1, errors.RegistrationRefused, "it has 8192 bytes, and bytes 4097 to 8193"),
            (errno.ENOMEM, 0, errors.RegistrationRefused, "Cannot allocate memory"),
            (errno.ETIMEDOUT, 0, errors.RegistrationRefused, "timed out"),
            (0, 0, errors.RegistrationRefused, "no"),
        ],
    )
    def test_each_errno_has_its_reason(
        self, fd: int, code: int, offset: int, fault: type[errors.PeermemError], words: str
    ) -> None:
        error = refusal(VerbsError("no", code), PORT, LENGTH, Path.DMABUF, (fd, offset))
        assert type(error) is fault
        assert words in error.message
        assert error.metadata["exporter"] == "vfio_pci_core"
        os.close(fd)

    @pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF])
    def test_what_is_no_dma_buf_is_told_so(self, code: int) -> None:
        fd = memory_file(LENGTH)
        if code == errno.EBADF:
            os.close(fd)
        error = refusal(VerbsError("no", code), PORT, LENGTH, Path.DMABUF, (fd, 0))
        assert type(error) is errors.RegistrationRefused
        assert "no dma-buf" in error.message
        if code != errno.EBADF:
            os.close(fd)


def test_the_exporter_is_what_the_kernel_says(tmp_path: FilePath) -> None:
    with open("/dev/null", "rb") as file:
        assert memory.dma_buf_exporter(file.fileno()) == ""
    assert memory.dma_buf_exporter(-1) == ""
