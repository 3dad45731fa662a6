"""Why a NIC or the kernel refuses to register memory: from an errno to a reason with its fix.

Rules of this file:

* An errno means another thing on each path (rdma-core and Linux 7.3, as read and seen); what can be told apart by
  looking at the dma-buf is told apart.
* Whether PCI lets nothing pass is the topology's to say; a refusal that may have that cause says so.
"""

from __future__ import annotations

import errno
import os
import resource

from peermem.core.errors import (
    DmaBufUnsupported,
    MemlockTooSmall,
    NicNotFound,
    OnDemandMissing,
    PeermemError,
    RegionRevoked,
    RegistrationRefused,
)
from peermem.core.types import Path
from peermem.core.units import format_size
from peermem.fabric.verbs_nic import Port
from peermem.fabric.verbs_types import VerbsError
from peermem.memory import dma_buf_exporter


def refusal(
    error: VerbsError, port: Port, length: int, path: Path, dma_buf: tuple[int, int] | None = None
) -> PeermemError:
    """Return the reason for which a registration of `length` bytes failed; `dma_buf` is what it is a range of: a
    descriptor, and where it begins."""
    if dma_buf is not None:
        return _of_dma_buf(error, port, length, dma_buf)
    if error.errno in (errno.ENOMEM, errno.EPERM):
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        allowed = "no limit" if limit == resource.RLIM_INFINITY else format_size(limit)
        return MemlockTooSmall(
            f"The NIC {port.name} needs to lock {format_size(length)} more, and the daemon may lock {allowed} "
            "in all. Set LimitMEMLOCK=infinity in its unit (ulimit -l unlimited), or give it CAP_IPC_LOCK.",
            nic=port.name,
            need=length,
            limit=limit,
        )
    if error.errno == errno.EOPNOTSUPP and path is Path.P2PDMA:
        return no_on_demand(port)
    if error.errno == errno.ENODEV:
        return NicNotFound(f"The NIC {port.name} is gone: {error}.", nic=port.name)
    hint = _LEGACY if path is Path.LEGACY_PEER_MEMORY else _NO_PAGES
    return RegistrationRefused(
        f"The kernel or the NIC {port.name} refused to register {format_size(length)} of path {path.value}: "
        f"{error}. {hint}",
        nic=port.name,
        errno=error.errno,
    )


def no_on_demand(port: Port) -> OnDemandMissing:
    """Return the reason for which a port can't register p2pmem."""
    return OnDemandMissing(
        f"The NIC {port.name} can't register memory on demand, which is the only way to reach p2pmem. Use a NIC and a "
        "kernel that can (mlx5 since Linux 6.16, rxe since 6.15), or path STAGED.",
        nic=port.name,
    )


def _of_dma_buf(error: VerbsError, port: Port, length: int, dma_buf: tuple[int, int]) -> PeermemError:
    fd, offset = dma_buf
    exporter = dma_buf_exporter(fd)
    what = f"the dma-buf of exporter {exporter}" if exporter else f"file descriptor {fd}"
    named = {"nic": port.name, "exporter": exporter, "errno": error.errno}
    if error.errno == errno.EOPNOTSUPP:
        return DmaBufUnsupported(
            f"The NIC {port.name} can't import {what}: its driver imports none (as rxe, siw and mlx4), or the exporter "
            "refuses a NIC that could not let go of the memory (vfio takes mlx5 since Linux 6.19 and irdma since 7.1). "
            "Use such a NIC and kernel, or path STAGED.",
            **named,
        )
    if error.errno == errno.ENODEV:
        return RegionRevoked(
            f"The device behind {what} has taken its memory back: it was reset, closed or switched off. Bring it back "
            "and export its memory anew.",
            **named,
        )
    if not exporter:
        cause = "it is closed, or no dma-buf. Hand in an open one"
    elif (size := _size(fd)) is not None and offset + length > size:
        cause = f"it has {size} bytes, and bytes {offset} to {offset + length} were asked for. Ask for what is inside"
    elif error.errno == errno.EINVAL:
        cause = (
            "PCI lets the two not reach each other, or the NIC can't map such memory. Preflight says which bridge or "
            "host bridge is to blame"
        )
    else:
        cause = f"{os.strerror(error.errno) if error.errno else error}. See the kernel's log"
    return RegistrationRefused(f"The NIC {port.name} can't register {what}: {cause}.", **named)


def _size(fd: int) -> int | None:
    """Return a dma-buf's bytes, which lseek(2) tells; None where it does not."""
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    except OSError:
        return None


_NO_PAGES = "Mappings of a PCI BAR without struct pages can't be registered; use path STAGED for them."
_LEGACY = (
    "A device address can be registered only where the vendor's kernel modules resolve it: load nvidia_peermem on a "
    "kernel of that vendor, or use a driver that exports dma-bufs."
)
