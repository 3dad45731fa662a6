"""What the kernel says about the host and this process, read below roots that are parameters.

Rules of this file:

* Reading always succeeds: what is missing or refused is empty, and `core/preflight.py` judges what that means.
* Nothing is changed. A NIC's device file is opened and closed again, because only that tells whether it may be.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from peermem.core.node import OwnMemory
from peermem.core.preflight import Capability, HostFacts
from peermem.device.sysfs import PROCFS, SYSFS, lockdown

DEVFS = Path("/dev")

_MODES = {"Y": "shared", "N": "exclusive"}
_LIBIBVERBS = re.compile(r"/libibverbs\.so\.1\.\d+\.(\d+\.\d+)")
"""A library's file name ends with the release of rdma-core, which is pyverbs' as well; pyverbs itself does not say."""
_ALL_USERS = ["0", "0", "4294967295"]


def read_host(
    files: Iterable[str],
    root: Path = SYSFS,
    proc: Path = PROCFS,
    dev: Path = DEVFS,
) -> HostFacts:
    """Return what holds now. `files` below /dev/infiniband are tried."""
    maps = _text(proc / "self/maps")
    library = _LIBIBVERBS.search(maps)
    return HostFacts(
        kernel=_text(proc / "sys/kernel/osrelease"),
        memlock=_memlock(_text(proc / "self/limits")),
        capabilities=_capabilities(proc),
        rdma_mode=_MODES.get(_text(root / "module/ib_core/parameters/netns_mode"), ""),
        device_files={name: _refusal(dev / "infiniband" / name) for name in files},
        lockdown=lockdown(root),
        iommu=_iommu(root / "kernel/iommu_groups"),
        pyverbs="/pyverbs/" in maps,
        rdma_core=library[1] if library else "",
    )


def read_own_memory(proc: Path = PROCFS) -> OwnMemory:
    """Return what this process has now; 0 for what the kernel does not say."""
    status = _text(proc / "self/status")
    may_any = Capability.CAP_IPC_LOCK in _capabilities(proc)
    return OwnMemory(
        private=_kib(status, "RssAnon"),
        pinned=_kib(status, "VmPin"),
        pin_limit=None if may_any else _memlock(_text(proc / "self/limits")),
    )


def _kib(status: str, name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d{{1,20}}) kB$", status, re.MULTILINE | re.ASCII)
    return int(found[1]) << 10 if found else 0


def _memlock(limits: str) -> int | None:
    """Return the soft limit, which is the one that the kernel compares with."""
    found = re.search(r"^Max locked memory\s+(\d{1,20})\s", limits, re.MULTILINE | re.ASCII)
    return int(found[1]) if found else None


def _capabilities(proc: Path) -> frozenset[Capability]:
    found = re.search(r"^CapEff:\s*([0-9a-f]{1,16})$", _text(proc / "self/status"), re.MULTILINE)
    if not found or _text(proc / "self/uid_map").split() != _ALL_USERS:
        return frozenset()
    mask = int(found[1], 16)
    return frozenset(capability for capability in Capability if mask >> capability.value & 1)


def _refusal(path: Path) -> str:
    """Return why a device file can't be opened; empty when it can."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return os.strerror(error.errno or 0)
    return ""


def _iommu(groups: Path) -> Mapping[str, int]:
    with suppress(OSError):
        kinds = (_text(groups / name / "type") for name in os.listdir(groups))
        return Counter(filter(None, kinds))
    return {}


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace").strip()
    except OSError:
        return ""
