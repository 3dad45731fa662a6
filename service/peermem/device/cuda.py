"""GPUs of NVIDIA's through the CUDA driver, by the package cuda-bindings.

Rules of this file:

* The package (`peermem[cuda]`) and the driver's library are loaded when a region is first made on such a device.
  Without one of them the device says so, and nothing else is disturbed.
* The package's calls have to let go of the GIL, as they do since release 12.9.1.
* The GPU's primary context is used, which CUDA programs share; each thread makes it current for itself.
* A dma-buf is asked for with a mapping through the PCIe BAR (driver 12.8 or newer), then without that wish.
* Memory that NICs write to synchronises memory operations (SYNC_MEMOPS), as GPUDirect RDMA asks.
* The flush rule (`gpu.py`) in CUDA's words: no flush where GPU_DIRECT_RDMA_WRITES_ORDERING is ALL_DEVICES; else
  cuFlushGPUDirectRDMAWrites to all devices, where FLUSH_WRITES_OPTIONS has HOST; else no NIC.
"""

from __future__ import annotations

import ctypes
import threading
from importlib import import_module
from typing import TYPE_CHECKING, Any

from peermem.core.errors import GpuDriverMissing
from peermem.device.gpu_driver import FaultKind, GpuDriver, GpuFault, Visibility

_ALL_DEVICES = 200
_FLUSH_BY_HOST = 1
_MAPPING_PCIE = 1
_PORTABLE = 1
_LAZY_PEER_ACCESS = 1
_NON_BLOCKING = 1
_EVENT_FLAGS = 3
"""Who waits sleeps, and no time is taken."""
_NO_MEMORY = 2
_LOST = frozenset((4, 46, 100, 101, 214, 220, 700, 702, 709, 710, *range(714, 720), 999))
"""CUresult values after which nothing works: deinitialised, unavailable, no (such) device, ECC and NVLink errors that
can't be corrected, and what makes a context useless."""
HANDLE = 64
"""Bytes of a CUipcMemHandle."""


class CudaDriver:
    """One GPU; a `GpuDriver`."""

    visibility = Visibility.NEVER

    def __init__(self, address: str) -> None:
        """`address` is of its PCI function."""
        self._address = address
        self._cuda: Any = None
        self._device: Any = None
        self._context: Any = None
        self._thread = threading.local()

    def open(self) -> None:
        """See GpuDriver."""
        try:
            cuda = import_module("cuda.bindings.driver")
        except ImportError as error:
            raise GpuDriverMissing(
                f"CUDA devices need the package cuda-bindings, which can't be imported: {error}. Install peermem[cuda]."
            ) from error
        try:
            (code,) = cuda.cuInit(0)
        except RuntimeError as error:  # the package looks for libcuda.so.1 with its first call
            raise GpuDriverMissing(
                "CUDA devices need NVIDIA's driver, whose library libcuda.so.1 can't be loaded. Install the driver, "
                "and in a container pass it in (NVIDIA Container Toolkit).",
            ) from error
        self._cuda = cuda
        self._check("cuInit", code)
        self._device = self._call(cuda.cuDeviceGetByPCIBusId, self._address.encode())
        self._context = self._call(cuda.cuDevicePrimaryCtxRetain, self._device)
        self.visibility = self._visibility()

    def close(self) -> None:
        """See GpuDriver."""
        if self._context is not None:
            self._context = None
            self._call(self._cuda.cuDevicePrimaryCtxRelease, self._device)

    def allocate(self, length: int) -> int:
        """See GpuDriver."""
        address = int(self._call(self._here().cuMemAlloc, length))
        try:
            self._sync_memops(address)
        except GpuFault:
            self.free(address)
            raise
        return address

    def free(self, address: int) -> None:
        """See GpuDriver."""
        self._call(self._here().cuMemFree, address)

    def open_handle(self, handle: bytes) -> tuple[int, int]:
        """See GpuDriver."""
        cuda = self._here()
        if len(handle) != HANDLE:
            raise GpuFault("cuIpcOpenMemHandle", f"no handle, for it has {len(handle)} bytes", FaultKind.OTHER)
        given = cuda.CUipcMemHandle()
        ctypes.memmove(int(given.getPtr()), handle, HANDLE)
        address = int(self._call(cuda.cuIpcOpenMemHandle, given, _LAZY_PEER_ACCESS))
        try:
            _, size = self._call(cuda.cuMemGetAddressRange, address)
            self._sync_memops(address)
        except GpuFault:
            self.close_handle(address)
            raise
        return address, int(size)

    def close_handle(self, address: int) -> None:
        """See GpuDriver."""
        self._call(self._here().cuIpcCloseMemHandle, address)

    def export(self, address: int, length: int) -> tuple[int, int]:
        """See GpuDriver."""
        cuda = self._here()
        kind = cuda.CUmemRangeHandleType.CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD
        for flags in (_MAPPING_PCIE, 0):
            try:
                return int(self._call(cuda.cuMemGetHandleForAddressRange, address, length, kind, flags)), 0
            except GpuFault:
                if not flags:
                    raise
        raise AssertionError("the last try returns or raises")

    def make_queue(self) -> object:
        """See GpuDriver."""
        made: object = self._call(self._here().cuStreamCreate, _NON_BLOCKING)
        return made

    def end_queue(self, queue: object) -> None:
        """See GpuDriver."""
        self._call(self._here().cuStreamDestroy, queue)

    def load(self, queue: object, address: int, host: int, length: int) -> None:
        """See GpuDriver."""
        self._call(self._here().cuMemcpyDtoHAsync, host, address, length, queue)

    def store(self, queue: object, address: int, host: int, length: int) -> None:
        """See GpuDriver."""
        self._call(self._here().cuMemcpyHtoDAsync, address, host, length, queue)

    def zero(self, queue: object, address: int, length: int) -> None:
        """See GpuDriver."""
        self._call(self._here().cuMemsetD8Async, address, 0, length, queue)

    def mark(self, queue: object) -> object:
        """See GpuDriver."""
        cuda = self._here()
        event: object = self._call(cuda.cuEventCreate, _EVENT_FLAGS)
        try:
            self._call(cuda.cuEventRecord, event, queue)
        except GpuFault:
            self._call(cuda.cuEventDestroy, event)
            raise
        return event

    def wait(self, mark: object) -> None:
        """See GpuDriver."""
        cuda = self._here()
        try:
            self._call(cuda.cuEventSynchronize, mark)
        finally:
            self._call(cuda.cuEventDestroy, mark)

    def pin(self, host: int, length: int) -> None:
        """See GpuDriver."""
        self._call(self._here().cuMemHostRegister, host, length, _PORTABLE)

    def unpin(self, host: int) -> None:
        """See GpuDriver."""
        self._call(self._here().cuMemHostUnregister, host)

    def flush(self) -> None:
        """See GpuDriver."""
        cuda = self._here()
        self._call(
            cuda.cuFlushGPUDirectRDMAWrites,
            cuda.CUflushGPUDirectRDMAWritesTarget.CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX,
            cuda.CUflushGPUDirectRDMAWritesScope.CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_ALL_DEVICES,
        )

    def _visibility(self) -> Visibility:
        names = self._cuda.CUdevice_attribute
        ordering, options = (
            self._call(self._cuda.cuDeviceGetAttribute, getattr(names, f"CU_DEVICE_ATTRIBUTE_{name}"), self._device)
            for name in ("GPU_DIRECT_RDMA_WRITES_ORDERING", "GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS")
        )
        if ordering >= _ALL_DEVICES:
            return Visibility.AT_ONCE
        return Visibility.BY_FLUSH if options & _FLUSH_BY_HOST else Visibility.NEVER

    def _sync_memops(self, address: int) -> None:
        attribute = self._cuda.CUpointer_attribute.CU_POINTER_ATTRIBUTE_SYNC_MEMOPS
        self._call(self._cuda.cuPointerSetAttribute, True, attribute, address)

    def _here(self) -> Any:
        """Return the library, for a call that needs the context: it is made current in this thread."""
        if getattr(self._thread, "context", None) is not self._context:
            self._call(self._cuda.cuCtxSetCurrent, self._context)
            self._thread.context = self._context
        return self._cuda

    def _call(self, function: Any, *arguments: Any) -> Any:
        """Return what a function returns behind its code: nothing, one thing, or a tuple. Raises GpuFault."""
        code, *results = function(*arguments)
        self._check(function.__name__, code)
        return results[0] if len(results) == 1 else tuple(results)

    def _check(self, call: str, code: Any) -> None:
        number = int(code)
        if number:
            kind = FaultKind.NO_MEMORY if number == _NO_MEMORY else FaultKind.OTHER
            raise GpuFault(call, getattr(code, "name", str(number)), FaultKind.LOST if number in _LOST else kind)


if TYPE_CHECKING:
    _driver: type[GpuDriver] = CudaDriver
