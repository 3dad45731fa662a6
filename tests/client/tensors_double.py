"""A tensor on a GPU that is not there, which speaks DLPack and the CUDA array interface as frameworks do."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_size_t, c_uint64

from peermem.client.dlpack import Kind, _Tensor, _Versioned
from tests.device.fake_gpu import FakeGpu

_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_NAMES = {
    "cuda": ("cuMemAlloc", "cuMemFree", "cuMemcpyDtoH", "cuMemcpyHtoD", "cuIpcGetMemHandle"),
    "hip": ("hipMalloc", "hipFree", "hipMemcpyDtoH", "hipMemcpyHtoD", "hipIpcGetMemHandle"),
}


class DlpackTensor:
    """Anything with this memory; a capsule is good for as long as this object lives."""

    def __init__(
        self,
        kind: int,
        address: int,
        shape: Sequence[int],
        strides: Sequence[int] | None = None,
        *,
        versioned: bool = False,
        read_only: bool = False,
        major: int = 1,
        offset: int = 0,
    ) -> None:
        """Of elements of 4 bytes."""
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        self._strides = None if strides is None else (ctypes.c_int64 * len(strides))(*strides)
        pointer = ctypes.POINTER(ctypes.c_int64)
        inner = _Tensor(
            address,
            kind,
            0,
            len(shape),
            2,
            32,
            1,
            ctypes.cast(self._shape, pointer),
            ctypes.cast(self._strides, pointer) if self._strides is not None else None,
            offset,
        )
        self._versioned = versioned
        self._managed = _Versioned(major, 0, None, None, int(read_only), inner) if versioned else inner
        self.kind = kind

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, 0

    def __dlpack__(self, **options: object) -> object:
        if options and not self._versioned:
            raise TypeError("unexpected keyword argument")
        name = b"dltensor_versioned" if self._versioned else b"dltensor"
        return _new(ctypes.addressof(self._managed), name, None)


class CudaArray:
    """What speaks the CUDA array interface alone."""

    def __init__(self, **facts: object) -> None:
        self.__cuda_array_interface__ = facts


class Allocation:
    """Memory on the GPU of this process, such as a framework's pool has, of which tensors are parts."""

    def __init__(self, gpu: FakeGpu, length: int) -> None:
        self._allocate, self._free, self._load, self._store, self._export = (
            getattr(gpu.library, name) for name in _NAMES[gpu.vendor]
        )
        self._kind = Kind.CUDA if gpu.vendor == "cuda" else Kind.ROCM
        address = c_uint64()
        assert self._allocate(byref(address), c_size_t(length)) == 0
        self.address = address.value

    def tensor(self, offset: int, count: int, *, versioned: bool = False) -> DlpackTensor:
        """Return a tensor of `count` elements of 4 bytes."""
        return DlpackTensor(self._kind, self.address + offset, [count], versioned=versioned)

    def handle(self) -> bytes:
        """Return what opens it in another process."""
        handle = ctypes.create_string_buffer(64)
        assert self._export(handle, c_uint64(self.address)) == 0
        return handle.raw

    def read(self, offset: int, length: int) -> bytes:
        buffer = ctypes.create_string_buffer(length)
        assert self._load(buffer, c_uint64(self.address + offset), c_size_t(length)) == 0
        return buffer.raw

    def write(self, offset: int, data: bytes) -> None:
        assert self._store(c_uint64(self.address + offset), data, c_size_t(len(data))) == 0

    def free(self) -> None:
        assert self._free(c_uint64(self.address)) == 0
