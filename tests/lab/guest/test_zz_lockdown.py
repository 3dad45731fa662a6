"""A kernel that is locked down: the last suite, because a kernel that is locked down stays so until it is booted."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.daemons import daemons

import peermem
from peermem import errors
from tests.lab.guest import nodes
from tests.lab.guest.nodes import BAR, HOST

_SECURITY = Path("/sys/kernel/security")


@pytest.fixture
def locked_down() -> Iterator[None]:
    subprocess.run(["mount", "-t", "securityfs", "securityfs", str(_SECURITY)], check=True)
    (_SECURITY / "lockdown").write_text("integrity")
    yield
    subprocess.run(["umount", str(_SECURITY)], check=True)


@pytest.mark.usefixtures("locked_down")
def test_bars_can_not_be_mapped_and_all_else_works(tmp_path: Path) -> None:
    config = f"{nodes.HOST_DEVICE}{nodes.bar_device('a')}"
    with daemons(tmp_path, ("a",), config) as running, peermem.connect(running["a"].target) as node:
        with pytest.raises(errors.KernelLockedDown) as caught:
            node.create_region(device=BAR, length=4096)
        assert "Secure Boot" in caught.value.message
        found = {verdict.check: verdict.error for verdict in node.preflight(HOST)}
        assert isinstance(found["lockdown"], errors.KernelLockedDown)
        with node.create_region(device=HOST, length=4096) as region:
            region.write(b"served")
            assert region.read(0, 6) == b"served"
        assert running["a"].stop() == 0
        nodes.check_log(running["a"])
