"""What of a tensor can become a region: a memory file of this process, or an allocation on a GPU with its handle.

Rules of this file:

* Host memory is attached where it lies in a memory file that this process still has open: nothing else can be shared
  with a daemon afterwards.
* A GPU's allocation is shared whole, by the handle that its driver gives, with the place of the tensor in it: a pool of
  a framework hands out parts of large allocations, and a handle of a part opens the whole.
* The driver's library is the one that the tensor's framework has loaded into this process already.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass, field

from peermem.client.dlpack import Kind, Range, located
from peermem.core.errors import GpuDriverMissing, NotAdoptable

_HANDLE = 64
_MEMORY_TYPE, _CONTEXT, _ORDINAL, _CAN_SHARE = 2, 1, 9, 10
"""CUpointer_attribute."""
_DEVICE_MEMORY = 2
_CUDA_FIX = "cudaMalloc (in PyTorch, without expandable_segments in PYTORCH_CUDA_ALLOC_CONF)"
_HIP = ("libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5")


@dataclass(frozen=True, slots=True)
class HostFile:
    """A memory file that begins with a tensor."""

    fd: int
    """The process's own."""
    length: int


@dataclass(frozen=True, slots=True)
class GpuRange:
    """A tensor in an allocation on a GPU."""

    kind: str
    """Of the daemon's device: cuda or rocm."""
    pci_address: str
    handle: bytes = field(repr=False)
    offset: int
    length: int


def memory_of(tensor: object) -> HostFile | GpuRange:
    """Return what of a tensor can become a region. Raises NotAdoptable, GpuDriverMissing."""
    found = located(tensor)
    if found.kind is Kind.HOST:
        return _host_file(found)
    if found.kind is Kind.CUDA:
        return _cuda(found)
    if found.kind is Kind.ROCM:
        return _rocm(found)
    raise NotAdoptable(
        f"The tensor is in memory of kind {found.kind.name}, which moves or is shared with nobody. Give one in the "
        "GPU's own memory, or in a memory file."
    )


def _host_file(found: Range) -> HostFile:
    """Return the open file that a mapping at an address is of."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        mapping = next((line.split() for line in maps if _holds(line, found)), None)
    if mapping is None:
        raise NotAdoptable("There is no memory at the tensor's address in this process. Give a tensor that is alive.")
    span, modes, offset, device, inode = mapping[:5]
    first, end = (int(part, 16) for part in span.split("-"))
    start = int(offset, 16) + found.address - first
    fd = _open_file(device, int(inode)) if modes.startswith("rw") and modes.endswith("s") else None
    if fd is None:
        raise NotAdoptable(
            "The tensor is in memory of this process alone, which no daemon can share. Put it into a memory file that "
            "stays open: numpy.frombuffer(mmap.mmap(fd, 0), ...) of a descriptor of os.memfd_create."
        )
    if found.address + found.length > end:
        raise NotAdoptable("The tensor is in several mappings of memory. Map its memory file in one piece.")
    if start:
        raise NotAdoptable(
            f"The tensor begins at byte {start} of its memory file, and a region with the first. Adopt the file "
            "(node.adopt) and use a slice of the region."
        )
    return HostFile(fd, found.length)


def _holds(line: str, found: Range) -> bool:
    first, _, end = line.partition(" ")[0].partition("-")
    return int(first, 16) <= found.address < int(end, 16)


def _open_file(device: str, inode: int) -> int | None:
    """Return a descriptor of this process for a file, which is a memory file as far as the daemon will look."""
    major, minor = (int(part, 16) for part in device.split(":"))
    wanted = (os.makedev(major, minor), inode)
    for name in os.listdir("/proc/self/fd") if inode else ():
        with suppress(OSError):
            facts = os.fstat(int(name))
            if (facts.st_dev, facts.st_ino) == wanted:
                return int(name)
    return None


def _cuda(found: Range) -> GpuRange:
    cuda = _library("libcuda.so.1")
    context, kind, ordinal, shares = c_void_p(), c_uint(), c_int(), c_int(1)
    pointer = c_uint64(found.address)
    for value, attribute in ((kind, _MEMORY_TYPE), (ordinal, _ORDINAL)):
        if cuda.cuPointerGetAttribute(byref(value), c_int(attribute), pointer):
            raise _not_there(found)
    if kind.value != _DEVICE_MEMORY:
        raise _not_there(found)
    cuda.cuPointerGetAttribute(byref(shares), c_int(_CAN_SHARE), pointer)  # older drivers don't tell
    belongs = cuda.cuPointerGetAttribute(byref(context), c_int(_CONTEXT), pointer) == 0  # a pool's memory to none
    if not shares.value or not belongs or cuda.cuCtxPushCurrent_v2(context):
        raise _not_shared(_CUDA_FIX)
    base, size, handle = c_uint64(), c_size_t(), ctypes.create_string_buffer(_HANDLE)
    try:
        inside = cuda.cuMemGetAddressRange_v2(byref(base), byref(size), pointer) == 0
        shared = inside and cuda.cuIpcGetMemHandle(handle, base) == 0
    finally:
        cuda.cuCtxPopCurrent_v2(byref(c_void_p()))
    _check(found, inside, base.value, size.value)
    if not shared:
        raise _not_shared(_CUDA_FIX)
    address = ctypes.create_string_buffer(32)
    if cuda.cuDeviceGetPCIBusId(address, c_int(len(address)), ordinal):
        raise _not_there(found)
    offset = found.address - base.value
    return GpuRange("cuda", address.value.decode("ascii").lower(), handle.raw, offset, found.length)


def _rocm(found: Range) -> GpuRange:
    hip = _library(*_HIP)
    base, size, before = c_uint64(), c_size_t(), c_int()
    handle, address = ctypes.create_string_buffer(_HANDLE), ctypes.create_string_buffer(32)
    hip.hipGetDevice(byref(before))
    hip.hipSetDevice(c_int(found.ordinal))
    try:
        inside = hip.hipMemGetAddressRange(byref(base), byref(size), c_uint64(found.address)) == 0
        shared = inside and hip.hipIpcGetMemHandle(handle, base) == 0
    finally:
        hip.hipSetDevice(before)
    _check(found, inside, base.value, size.value)
    if not shared:
        raise _not_shared("hipMalloc")
    if hip.hipDeviceGetPCIBusId(address, c_int(len(address)), c_int(found.ordinal)):
        raise _not_there(found)
    offset = found.address - base.value
    return GpuRange("rocm", address.value.decode("ascii").lower(), handle.raw, offset, found.length)


def _library(*names: str) -> ctypes.CDLL:
    for name in names:
        with suppress(OSError):
            return ctypes.CDLL(name)
    raise GpuDriverMissing(
        f"The tensor is on a GPU, and its driver's library {names[0]} can't be loaded into this process. Install the "
        "driver, and in a container pass it in."
    )


def _check(found: Range, inside: bool, base: int, size: int) -> None:
    if not inside or found.address + found.length > base + size:
        raise _not_there(found)


def _not_there(found: Range) -> NotAdoptable:
    return NotAdoptable(
        f"The GPU's driver knows no memory of {found.length} bytes at the tensor's address in this process. Give a "
        "tensor that this process allocated and that is still there."
    )


def _not_shared(fix: str) -> NotAdoptable:
    return NotAdoptable(
        f"The GPU's driver gives no handle of the tensor's allocation to other processes. Allocate it with {fix}."
    )
