"""The emulated machine. Rules of this file:

* It ends: by itself, or killed when a mark is late or the lab's time is over, or with this process.
* It needs no KVM, with which a stock kernel's early boot fails on some hosts.
* It has an IOMMU, which vfio needs; DMA passes through it untranslated for everybody else.
* The guest's second serial line is its progress. A line "@SECONDS WORD..." there is a mark: the next one is to come
  within so many seconds.
* What has BAR memory sits in slots of its own, so that it can be pulled out and put back (`plugs.py`).
"""

from __future__ import annotations

import json
import os
import re
import selectors
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from tests.lab.image import Image

_CMB_MIB = 64
_BAR_MIB = 16
_DISKS = {"results": 256 << 20, "nvme": 512 << 20}
PLUGS: Mapping[str, Mapping[str, str | int]] = {
    "nvme": {"driver": "nvme", "serial": "cmb0", "drive": "disk", "bus": "slot0", "cmb_size_mb": _CMB_MIB},
    "ivshmem": {"driver": "ivshmem-plain", "memdev": "bar", "bus": "slot1"},
}
"""The devices that can be pulled out, by name, with QEMU's words for each."""
_READY_SECONDS = 240
_BOOTS, _BOOT_SECONDS = 3, 60
"""How often a guest is booted, and only while so much time is left."""
_KERNEL_ARGUMENTS = (
    "console=ttyS0 loglevel=5 panic=-1 mitigations=off log_buf_len=4M rdinit=/init intel_iommu=on iommu=pt"
)
CONTAINER_IMAGE = "container"
"""The file of the disk that holds the container image's root filesystem, where there is one."""
_PANIC = re.compile(r"Kernel panic - .*")


@dataclass(frozen=True)
class Boot:
    """How a guest's life went; `trouble` is a sentence that says why it ended, empty if as planned."""

    trouble: str
    seconds: float
    ready: float | None
    first_suite: float | None
    number: int = 1
    """Which boot it was, from 1 on: before it, guests did not come up."""


class _LateError(Exception):
    """A mark or the end did not come in time."""


class Clock:
    """The time that the whole lab has."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._end = time.monotonic() + limit

    def left(self) -> float:
        """Return the seconds left, negative when it is over."""
        return self._end - time.monotonic()


def bar_memory(folder: Path) -> dict[str, str | int | bool]:
    """Return QEMU's words for the memory behind the plain BAR: a file in `folder`."""
    where = {"id": "bar", "mem-path": f"{folder}/bar"}
    return {"qom-type": "memory-backend-file", **where, "size": _BAR_MIB << 20, "share": True}


def monitor(folder: Path) -> Path:
    """Return the socket of the machine's monitor (QMP)."""
    return folder / "monitor"


def command(image: Image, folder: Path, console: Path) -> list[str]:
    """Return the command line of the machine, whose disks are files in `folder`."""
    container = [
        ("-drive", f"file={folder}/{CONTAINER_IMAGE},if=none,id=container,format=raw,readonly=on"),
        ("-device", "virtio-blk-pci,drive=container"),
    ]
    devices = [
        ("-qmp", f"unix:{monitor(folder)},server=on,wait=off"),
        ("-drive", f"file={folder}/results,if=none,id=results,format=raw,cache=unsafe"),
        ("-device", "virtio-blk-pci,drive=results"),
        *(container if (folder / CONTAINER_IMAGE).exists() else ()),
        ("-drive", f"file={folder}/nvme,if=none,id=disk,format=raw,cache=unsafe"),
        ("-object", json.dumps(bar_memory(folder))),
        *(
            ("-device", f"pcie-root-port,id=slot{number},chassis={number},slot={number}")
            for number in range(len(PLUGS))
        ),
        *(("-device", ",".join(f"{key}={value}" for key, value in _words(name).items())) for name in PLUGS),
    ]
    return [
        *("setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-nodefaults", "-no-reboot", "-display", "none"),
        *("-machine", "q35,kernel-irqchip=split", "-device", "intel-iommu,intremap=on"),
        *("-accel", "tcg,thread=multi", "-cpu", "max,la57=off", "-smp", "2", "-m", "3G"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", _KERNEL_ARGUMENTS),
        *("-serial", f"file:{console}", "-serial", "stdio"),
        *(word for device in devices for word in device),
    ]


def _words(name: str) -> dict[str, str | int]:
    driver, *others = PLUGS[name].items()
    return dict([driver, ("id", name), *others])


def make_disks(folder: Path) -> Path:
    """Make the machine's disks in `folder`; return the one that the results come out on."""
    for name, size in _DISKS.items():
        with (folder / name).open("wb") as disk:
            disk.truncate(size)
    return folder / "results"


def run(arguments: list[str], clock: Clock, console: Path, hear: Callable[[str], None]) -> Boot:
    """Run the machine until it powers off or is late; `hear` gets every line of its progress."""
    begun = time.monotonic()
    marks: dict[str, float] = {}
    trouble = ""
    null, pipe, same = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(arguments, stdin=null, stdout=pipe, stderr=same) as machine:
        assert machine.stdout is not None
        try:
            for line in _follow(machine.stdout, clock):
                hear(line)
                if line.startswith("@"):
                    marks.setdefault(line.split(" ")[1], time.monotonic() - begun)
        except _LateError as late:
            trouble = f"{late} It was ended."
        finally:
            machine.kill()
    if not trouble and "over" not in marks:
        panic = _PANIC.search(console.read_text(errors="replace")) if console.exists() else None
        trouble = f"The guest ended by itself before its plan was over{f': {panic[0].strip()}' if panic else ''}."
    return Boot(trouble, time.monotonic() - begun, marks.get("ready"), marks.get("suite"))


def until_up(boot: Callable[[], Boot], clock: Clock, tell: Callable[[str], None]) -> Boot:
    """Boot until a guest comes up, a few times; return how the last one's life went."""
    number, last = 1, boot()
    while last.ready is None and number < _BOOTS and clock.left() > _BOOT_SECONDS:
        tell(f"{last.trouble} It had not come up: once more.")
        number, last = number + 1, boot()
    return replace(last, number=number)


def _follow(progress: IO[bytes], clock: Clock) -> Iterator[str]:
    """Yield lines until the machine ends; raises _LateError when a mark is late or the lab's time is over."""
    lines = _Lines(progress)
    latest, allowed = "its start", _READY_SECONDS
    deadline = time.monotonic() + allowed
    while not lines.ended:
        left = min(deadline - time.monotonic(), clock.left())
        if left <= 0:
            whole = clock.left() <= 0
            told = f"The lab's limit of {clock.limit} s passed while the guest ran (last: {latest})."
            raise _LateError(told if whole else f"The guest had {allowed} s after '{latest}', and got no further.")
        for line in lines.wait(left):
            yield line
            if line.startswith("@"):
                seconds, _, latest = line[1:].partition(" ")
                allowed = int(seconds)
                deadline = time.monotonic() + allowed


class _Lines:
    """The lines of a stream, as they come."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.ended = False
        self._stream = stream
        self._rest = b""

    def wait(self, seconds: float) -> list[str]:
        """Return the lines that have come whole, waiting for more to come if there is none."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._stream, selectors.EVENT_READ)
            if not selector.select(seconds):
                return []
        got = os.read(self._stream.fileno(), 65536)
        self.ended = not got
        *whole, self._rest = (self._rest + got).split(b"\n")
        return [line.decode(errors="replace").rstrip("\r") for line in whole]
