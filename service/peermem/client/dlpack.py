"""Where the bytes of an array or tensor are, asked through DLPack or the CUDA array interface, without its library.

Rules of this file:

* Nothing is copied and nothing is kept: who asks keeps the tensor alive for as long as its memory is used.
* What is not one writable range of bytes in C order is refused with the reason.

The layout of DLManagedTensor and DLManagedTensorVersioned is that of dlpack.h 1.1, an ABI that does not change.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from typing import Any

from peermem.core.errors import NotAdoptable


class Kind(IntEnum):
    """Where memory is: DLDeviceType, as far as it is told apart."""

    HOST = 1
    CUDA = 2
    CUDA_HOST = 3
    ROCM = 10
    ROCM_HOST = 11
    CUDA_MANAGED = 13


@dataclass(frozen=True, slots=True)
class Range:
    """The bytes of a tensor."""

    kind: Kind
    ordinal: int
    """Which GPU, as this process counts them."""
    address: int
    length: int


class _Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_READ_ONLY = 1
_VERSION = (1, 0)
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_has_name = ctypes.pythonapi.PyCapsule_IsValid
_has_name.restype, _has_name.argtypes = ctypes.c_int, (ctypes.py_object, ctypes.c_char_p)


def located(tensor: object) -> Range:
    """Return where a tensor's bytes are. Raises NotAdoptable."""
    if hasattr(tensor, "__dlpack__") and hasattr(tensor, "__dlpack_device__"):
        found = _from_dlpack(tensor)
    elif hasattr(tensor, "__cuda_array_interface__"):
        found = _from_cuda(tensor)
    else:
        raise NotAdoptable(
            f"A {type(tensor).__name__} speaks neither DLPack nor the CUDA array interface. Give a tensor or an array "
            "of a library that does, or adopt a memory file."
        )
    if found.length == 0:
        raise NotAdoptable("The tensor has no bytes. Give one that has some.")
    return found


def _from_dlpack(tensor: Any) -> Range:
    try:
        capsule = _capsule(tensor)
    except (BufferError, RuntimeError, ValueError, TypeError) as error:  # libraries differ in what they raise
        raise NotAdoptable(f"The tensor does not give out its memory: {error}.") from error
    if _has_name(capsule, b"dltensor_versioned"):
        managed = _Versioned.from_address(_pointer(capsule, b"dltensor_versioned"))
        if managed.major != _VERSION[0]:
            raise NotAdoptable(f"The tensor speaks DLPack {managed.major}.{managed.minor}, which is not known here.")
        if managed.flags & _READ_ONLY:
            raise _read_only()
        inner = managed.tensor
    elif _has_name(capsule, b"dltensor"):
        inner = _Tensor.from_address(_pointer(capsule, b"dltensor"))
    else:
        raise NotAdoptable("The tensor's __dlpack__ returns no DLPack capsule.")
    shape = inner.shape[: inner.ndim] if inner.ndim else []
    strides = inner.strides[: inner.ndim] if inner.strides and inner.ndim else None
    _check_dense(shape, strides)
    if inner.device_type not in list(Kind):
        raise NotAdoptable(f"The tensor is on a device of DLPack's type {inner.device_type}, which can't be attached.")
    length = prod(shape) * ((inner.bits * inner.lanes + 7) // 8)
    return Range(Kind(inner.device_type), inner.device_id, (inner.data or 0) + inner.byte_offset, length)


def _capsule(tensor: Any) -> object:
    """Return the capsule, of the newer kind where the library knows it: that alone tells what is read-only. It is not
    consumed: when it goes, its library frees what it made for it."""
    try:
        made: object = tensor.__dlpack__(max_version=_VERSION)
    except TypeError:
        made = tensor.__dlpack__()
    return made


def _from_cuda(tensor: Any) -> Range:
    facts = tensor.__cuda_array_interface__
    try:
        address, read_only = facts["data"]
        shape = [int(size) for size in facts["shape"]]
        item = int(re.fullmatch(r"[<>|=]?[a-zA-Z](\d+)", facts["typestr"])[1])  # type: ignore[index]
        steps = facts.get("strides")
        strides = None if steps is None else [int(step) // item for step in steps]
    except (KeyError, TypeError, ValueError) as error:
        raise NotAdoptable(f"The tensor's __cuda_array_interface__ is not one: {error!r}.") from error
    if read_only:
        raise _read_only()
    _check_dense(shape, strides)
    return Range(Kind.CUDA, -1, int(address or 0), prod(shape) * item)


def _check_dense(shape: Sequence[int], strides: Sequence[int] | None) -> None:
    """Raise NotAdoptable unless elements lie one behind the other in C order; strides count elements."""
    step = 1
    for size, stride in reversed(list(zip(shape, strides or (), strict=False))):
        if size > 1 and stride != step:
            raise NotAdoptable(
                "The tensor's elements do not lie one behind the other. Give a contiguous one, such as "
                "tensor.contiguous() makes."
            )
        step *= size


def _read_only() -> NotAdoptable:
    return NotAdoptable("The tensor is read-only, and a region can be written to. Give a writable one.")
