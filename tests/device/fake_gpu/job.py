"""A job with memory on a GPU: prints its handle, then reads and writes it as it is told. Needs nothing but Python."""

# ruff: noqa: T201
import ctypes
import sys

library, vendor, length = ctypes.CDLL(sys.argv[1]), sys.argv[2], int(sys.argv[3])
names = {
    "cuda": ("cuMemAlloc", "cuIpcGetMemHandle", "cuMemcpyDtoH", "cuMemcpyHtoD"),
    "hip": ("hipMalloc", "hipIpcGetMemHandle", "hipMemcpyDtoH", "hipMemcpyHtoD"),
}[vendor]
allocate, export, load, store = (getattr(library, name) for name in names)
address, handle = ctypes.c_uint64(), ctypes.create_string_buffer(64)
assert allocate(ctypes.byref(address), ctypes.c_size_t(length)) == 0
assert export(handle, address) == 0
print(handle.raw.hex(), flush=True)
for line in sys.stdin:
    command, offset, what = line.split()
    at = ctypes.c_uint64(address.value + int(offset))
    if command == "read":
        buffer = ctypes.create_string_buffer(int(what))
        assert load(buffer, at, ctypes.c_size_t(len(buffer))) == 0
        print(buffer.raw.hex(), flush=True)
    else:
        data = bytes.fromhex(what)
        assert store(at, data, ctypes.c_size_t(len(data))) == 0
        print(flush=True)
