"""A vendor's driver that is compiled from the C files here and loaded into this process, in place of the real one."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

ADDRESS = "0000:41:00.0"
LIBRARIES = {"cuda": "libcuda.so.1", "hip": "libamdhip64.so"}
_ALSO = {"hip": "libhsa-runtime64.so.1"}
"""A second library of a vendor's, which has no code of its own but needs the first."""
_SOURCES = Path(__file__).parent


@cache
def folder(vendor: str) -> Path:
    """Compile a vendor's library and return the folder that has it. Skips the test where nothing compiles C."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler to make the fake GPU driver with")
    target = Path(tempfile.mkdtemp(prefix="peermem-fake-gpu-"))
    name = LIBRARIES[vendor]
    sources = [str(_SOURCES / "gpu.c"), str(_SOURCES / f"{vendor}.c")]
    options = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", f"-Wl,-soname,{name}", "-pthread"]
    subprocess.run([compiler, *options, "-o", str(target / name), *sources, "-ldl"], check=True)
    if other := _ALSO.get(vendor):
        needed = [f"-Wl,-soname,{other}", "-Wl,--no-as-needed", f"-Wl,-rpath,{target}", f"-L{target}", f"-l:{name}"]
        subprocess.run([compiler, "-shared", "-o", str(target / other), "-xc", "/dev/null", *needed], check=True)
    return target


class FakeGpu:
    """The one GPU of the loaded library."""

    def __init__(self, vendor: str) -> None:
        """It does all that it is asked to."""
        self.vendor = vendor
        self.library = load(vendor)
        self.library.fake_reset()
        self.is_like()
        self.flushes()

    def fail(self, call: str, code: int, after: int = 0) -> None:
        """Have an entry point return `code` from now on, after so many good calls; 0: no more."""
        self.library.fake_fail(call.encode(), code, after)

    def hold(self, on: bool = True) -> None:
        """Have queued copies wait."""
        self.library.fake_hold(int(on))

    def lose(self, on: bool = True) -> None:
        """Let the GPU fall off its bus."""
        self.library.fake_lose(int(on))

    @property
    def open_things(self) -> int:
        """Allocations, handles, pins, queues, marks and contexts that are open."""
        return int(self.library.fake_open())

    def queued(self) -> int:
        """Return how many copies were not made yet."""
        return int(self.library.fake_queued())

    def share(self, on: bool) -> None:
        """Let CUDA say whether allocations can be opened by other processes."""
        self.library.fake_share(int(on))

    def copies(self, *, pinned: bool) -> int:
        """Return how many copies were made since this was asked last."""
        return int(self.library.fake_copies(int(pinned)))

    def flushes(self) -> int:
        """Return how often NICs' writes were flushed since this was asked last."""
        return int(self.library.fake_flushes())

    def is_like(self, *, ordering: int = 0, flush: bool = True, dma_buf: bool = True, pcie: bool = True) -> None:
        """Set what the GPU and its driver can do; `ordering` and `pcie` are CUDA's."""
        if self.vendor == "cuda":
            self.library.fake_cuda(ordering, int(flush), int(dma_buf), int(pcie))
            self.share(True)
        else:
            self.library.fake_hip(int(flush), int(dma_buf))


@cache
def load(vendor: str) -> ctypes.CDLL:
    """Load a vendor's library, which who asks for it by name finds from then on, as it has that name."""
    for name in filter(None, (_ALSO.get(vendor), LIBRARIES[vendor])):
        library = ctypes.CDLL(str(folder(vendor) / name))
    return library


class Job:
    """Another process that has memory on the GPU."""

    def __init__(self, vendor: str, length: int) -> None:
        path = folder(vendor) / LIBRARIES[vendor]
        command = [sys.executable, "-I", str(_SOURCES / "job.py"), str(path), vendor, str(length)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.handle = bytes.fromhex(self._ask(""))
        """By which this process opens its memory."""

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes as the job has them."""
        return bytes.fromhex(self._ask(f"read {offset} {length}"))

    def write(self, offset: int, data: bytes) -> None:
        """Have the job write bytes."""
        self._ask(f"write {offset} {data.hex()}")

    def end(self) -> None:
        """End the process."""
        self._process.communicate(timeout=10)

    def _ask(self, request: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if request:
            print(request, file=self._process.stdin, flush=True)
        return self._process.stdout.readline().strip()
