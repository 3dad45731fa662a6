"""GPUs of AMD's through the HIP runtime and the HSA runtime below it, by ctypes.

Rules of this file:

* The libraries are loaded when a region is first made on such a device. Without them the device says so, and nothing
  else is disturbed.
* HIP knows one current GPU per thread: each thread sets it for itself.
* A dma-buf comes of HSA, which says where in it the memory begins.
* The flush rule (`gpu.py`) in AMD's words: what comes in over PCIe passes the GPU's host data path, which is flushed by
  writing 1 to the register HDP_MEM_COHERENCY_FLUSH_CNTL that HIP maps for it. Where HIP has none, no NIC is let at the
  memory.
"""

from __future__ import annotations

import ctypes
import threading
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from typing import TYPE_CHECKING, Any

from peermem.core.errors import GpuDriverMissing
from peermem.device.gpu_driver import FaultKind, GpuDriver, GpuFault, Visibility

_HIP, _HSA = ("libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5"), ("libhsa-runtime64.so.1",)
_HDP_MEM_FLUSH = 10005
"""hipDeviceAttributeHdpMemFlushCntl: its value is an address."""
_NO_MEMORY = 2
_LOST = frozenset((4, 46, 100, 101, 214, 700, 702, 709, 710, 719, 999))
"""hipError_t values after which nothing works; HIP has CUDA's numbers for these."""
_NON_BLOCKING, _PORTABLE, _LAZY_PEER_ACCESS = 1, 1, 1
_EVENT_FLAGS = 3
"""Who waits sleeps, and no time is taken."""
HANDLE = 64
"""Bytes of a hipIpcMemHandle_t."""

_Handle = ctypes.c_char * HANDLE


class _HandleByValue(ctypes.Structure):
    """hipIpcMemHandle_t."""

    _fields_ = (("reserved", _Handle),)


class HipDriver:
    """One GPU; a `GpuDriver`."""

    visibility = Visibility.NEVER

    def __init__(self, address: str) -> None:
        """`address` is of its PCI function."""
        self._address = address
        self._hip: Any = None
        self._hsa: Any = None
        self._device = -1
        self._flush_register: c_uint32 | None = None
        self._thread = threading.local()

    def open(self) -> None:
        """See GpuDriver."""
        self._hip, self._hsa = _load(_HIP), _load(_HSA)
        device = c_int()
        self._call("hipInit", c_uint(0))
        self._call("hipDeviceGetByPCIBusId", byref(device), c_char_p(self._address.encode()))
        self._device = device.value
        register = c_void_p()
        self._call("hipDeviceGetAttribute", byref(register), c_int(_HDP_MEM_FLUSH), device)
        if register.value:
            self._flush_register = c_uint32.from_address(register.value)
            self.visibility = Visibility.BY_FLUSH

    def close(self) -> None:
        """See GpuDriver. HIP's primary context stays the process's."""

    def allocate(self, length: int) -> int:
        """See GpuDriver."""
        address = c_uint64()
        self._here("hipMalloc", byref(address), c_size_t(length))
        return address.value

    def free(self, address: int) -> None:
        """See GpuDriver."""
        self._here("hipFree", c_uint64(address))

    def open_handle(self, handle: bytes) -> tuple[int, int]:
        """See GpuDriver."""
        if len(handle) != HANDLE:
            raise GpuFault("hipIpcOpenMemHandle", f"no handle, for it has {len(handle)} bytes", FaultKind.OTHER)
        address, base, size = c_uint64(), c_uint64(), c_size_t()
        given = _HandleByValue.from_buffer_copy(handle)
        self._here("hipIpcOpenMemHandle", byref(address), given, c_uint(_LAZY_PEER_ACCESS))
        try:
            self._here("hipMemGetAddressRange", byref(base), byref(size), address)
        except GpuFault:
            self.close_handle(address.value)
            raise
        return address.value, base.value + size.value - address.value

    def close_handle(self, address: int) -> None:
        """See GpuDriver."""
        self._here("hipIpcCloseMemHandle", c_uint64(address))

    def export(self, address: int, length: int) -> tuple[int, int]:
        """See GpuDriver."""
        fd, offset = c_int(-1), c_uint64()
        export = self._hsa.hsa_amd_portable_export_dmabuf
        code = export(c_uint64(address), c_size_t(length), byref(fd), byref(offset))
        if code:
            raise GpuFault("hsa_amd_portable_export_dmabuf", f"{code:#x}", FaultKind.OTHER)
        return fd.value, offset.value

    def make_queue(self) -> object:
        """See GpuDriver."""
        queue = c_void_p()
        self._here("hipStreamCreateWithFlags", byref(queue), c_uint(_NON_BLOCKING))
        return queue

    def end_queue(self, queue: object) -> None:
        """See GpuDriver."""
        self._here("hipStreamDestroy", queue)

    def load(self, queue: object, address: int, host: int, length: int) -> None:
        """See GpuDriver."""
        self._here("hipMemcpyDtoHAsync", c_void_p(host), c_uint64(address), c_size_t(length), queue)

    def store(self, queue: object, address: int, host: int, length: int) -> None:
        """See GpuDriver."""
        self._here("hipMemcpyHtoDAsync", c_uint64(address), c_void_p(host), c_size_t(length), queue)

    def zero(self, queue: object, address: int, length: int) -> None:
        """See GpuDriver."""
        self._here("hipMemsetAsync", c_uint64(address), c_int(0), c_size_t(length), queue)

    def mark(self, queue: object) -> object:
        """See GpuDriver."""
        event = c_void_p()
        self._here("hipEventCreateWithFlags", byref(event), c_uint(_EVENT_FLAGS))
        try:
            self._here("hipEventRecord", event, queue)
        except GpuFault:
            self._here("hipEventDestroy", event)
            raise
        return event

    def wait(self, mark: object) -> None:
        """See GpuDriver."""
        try:
            self._here("hipEventSynchronize", mark)
        finally:
            self._here("hipEventDestroy", mark)

    def pin(self, host: int, length: int) -> None:
        """See GpuDriver."""
        self._here("hipHostRegister", c_void_p(host), c_size_t(length), c_uint(_PORTABLE))

    def unpin(self, host: int) -> None:
        """See GpuDriver."""
        self._here("hipHostUnregister", c_void_p(host))

    def flush(self) -> None:
        """See GpuDriver."""
        if self._flush_register is not None:
            self._flush_register.value = 1

    def _here(self, call: str, *arguments: object) -> None:
        """Call HIP about this GPU: it is made the current one of this thread. Raises GpuFault."""
        if getattr(self._thread, "device", None) != self._device:
            self._call("hipSetDevice", c_int(self._device))
            self._thread.device = self._device
        self._call(call, *arguments)

    def _call(self, call: str, *arguments: object) -> None:
        code = getattr(self._hip, call)(*arguments)
        if code:
            kind = FaultKind.NO_MEMORY if code == _NO_MEMORY else FaultKind.OTHER
            raise GpuFault(call, _name(self._hip, code), FaultKind.LOST if code in _LOST else kind)


def _load(names: tuple[str, ...]) -> ctypes.CDLL:
    """Return the first library of these that is there. Raises GpuDriverMissing."""
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            cause = error
    raise GpuDriverMissing(
        f"ROCm devices need AMD's runtime, whose library {names[0]} can't be loaded: {cause}. Install ROCm, and in a "
        "container pass it in."
    )


def _name(hip: Any, code: int) -> str:
    name = hip.hipGetErrorName
    name.restype = c_char_p
    found: bytes | None = name(c_int(code))
    return found.decode("ascii", "replace") if found else str(code)


if TYPE_CHECKING:
    _driver: type[GpuDriver] = HipDriver
