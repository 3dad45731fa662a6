from __future__ import annotations

import ctypes

import numpy
import pytest

from peermem.client.dlpack import Kind, Range, located
from peermem.core.errors import NotAdoptable
from tests.client.tensors_double import CudaArray, DlpackTensor

BASE = 0xD0000000000


def test_an_array_of_numpy() -> None:
    array = numpy.arange(24, dtype=numpy.int32).reshape(2, 3, 4)
    assert located(array) == Range(Kind.HOST, 0, array.ctypes.data, 96)
    assert located(array[1]) == Range(Kind.HOST, 0, array.ctypes.data + 48, 48)
    array[0, 0, 0] = 7  # it is still its owner's


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize(
    ("shape", "strides", "length"),
    [([6], None, 24), ([2, 3], [3, 1], 24), ([1, 3], [99, 1], 12), ([3, 1], [1, 99], 12), ([], None, 4), ([], [], 4)],
)
def test_what_lies_in_one_piece(versioned: bool, shape: list[int], strides: list[int] | None, length: int) -> None:
    tensor = DlpackTensor(Kind.CUDA, BASE, shape, strides, versioned=versioned, offset=64)
    assert located(tensor) == Range(Kind.CUDA, 0, BASE + 64, length)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (DlpackTensor(Kind.CUDA, BASE, [2, 3], [1, 2]), "one behind the other"),
        (DlpackTensor(Kind.CUDA, BASE, [3], [2]), "one behind the other"),
        (DlpackTensor(Kind.CUDA, BASE, [3], [-1]), "one behind the other"),
        (DlpackTensor(Kind.CUDA, BASE, [3], [0]), "one behind the other"),
        (DlpackTensor(Kind.CUDA, BASE, [3], versioned=True, read_only=True), "read-only"),
        (DlpackTensor(Kind.CUDA, BASE, [3], versioned=True, major=2), "DLPack 2.0"),
        (DlpackTensor(Kind.CUDA, BASE, [0, 3]), "no bytes"),
        (DlpackTensor(8, BASE, [3]), "type 8"),
        (numpy.arange(10)[::2], "one behind the other"),
        (numpy.asfortranarray(numpy.ones((2, 3))), "one behind the other"),
        (numpy.ones(0), "no bytes"),
        (numpy.array(["text"]), "does not give out its memory"),
        (CudaArray(shape=(3,), typestr="<f4", data=(BASE, True), version=3), "read-only"),
        (CudaArray(shape=(3,), typestr="<f4", data=(BASE, False), strides=(8,), version=3), "one behind"),
        (CudaArray(shape=(0,), typestr="<f4", data=(0, False), version=3), "no bytes"),
        (CudaArray(shape=(3,), typestr="<f4", version=3), "is not one"),
        (CudaArray(shape=(3,), typestr="structure", data=(BASE, False)), "is not one"),
        (b"bytes", "neither DLPack"),
    ],
)
def test_what_is_refused_and_why(tensor: object, words: str) -> None:
    with pytest.raises(NotAdoptable, match=words):
        located(tensor)


def test_a_read_only_array() -> None:
    array = numpy.ones(3)
    array.flags.writeable = False
    with pytest.raises(NotAdoptable, match="read-only"):
        located(array)


@pytest.mark.parametrize("strides", [None, (12, 4)])
def test_the_cuda_array_interface(strides: tuple[int, ...] | None) -> None:
    array = CudaArray(shape=(2, 3), typestr="<f4", data=(BASE, False), strides=strides, version=3)
    assert located(array) == Range(Kind.CUDA, -1, BASE, 24)


def test_a_capsule_of_something_else() -> None:
    class Odd:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

        def __dlpack__(self, **_: object) -> object:
            return ctypes.pythonapi.PyCapsule_New(ctypes.c_void_p(1), b"other", None)

    with pytest.raises(NotAdoptable, match="no DLPack capsule"):
        located(Odd())
