"""What the kernel and the NIC answer to a registration, as reasons with their fixes."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import cast

import pytest

from peermem.core import errors
from peermem.core.types import Path
from peermem.fabric.verbs_memory import check, refusal
from peermem.fabric.verbs_nic import Port
from peermem.fabric.verbs_types import VerbsError
from tests.fabric.support import FileMemory


def port(*, on_demand: bool) -> Port:
    """A port of a NIC that is not here, as far as registrations look at it."""
    return cast(Port, SimpleNamespace(name="nic0/1", nic=SimpleNamespace(caps=SimpleNamespace(on_demand=on_demand))))


@pytest.mark.parametrize(
    ("path", "on_demand", "fault"),
    [
        (Path.P2PDMA, False, errors.OnDemandMissing),
        (Path.STAGED, True, errors.RegistrationRefused),
        (Path.DMABUF, True, errors.RegistrationRefused),
    ],
)
def test_what_can_not_be_registered_is_not_tried(path: Path, on_demand: bool, fault: type[errors.PeermemError]) -> None:
    with pytest.raises(fault, match=r"nic0/1|not registered"):
        check(port(on_demand=on_demand), FileMemory(4096), path)


@pytest.mark.parametrize("path", [Path.HOST, Path.P2PDMA])
def test_what_can_be_is(path: Path) -> None:
    check(port(on_demand=True), FileMemory(4096), path)


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
    ],
)
def test_each_errno_has_its_reason(code: int, path: Path, fault: type[errors.PeermemError]) -> None:
    error = refusal(VerbsError("no", code), port(on_demand=True), FileMemory(4096), path)
    assert type(error) is fault
    assert "nic0/1" in error.message
