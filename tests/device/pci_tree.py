"""A sysfs tree with one PCI function, made of ordinary files: its BAR is a file in memory, so that it can be mapped,
look vanished by being cut off, and be compared with what the daemon says of it."""

from __future__ import annotations

import os
from pathlib import Path

ADDRESS = "0000:41:00.0"
_MEMORY_64_PREFETCH = 0x14220C
_ON = b"\xf4\x1a\x10\x11\x07\x00"  # vendor, device, command: I/O, memory and bus mastering
_OFF = b"\xf4\x1a\x10\x11\x04\x00"
_NOBODY = b"\xff" * 6


class PciTree:
    """A function with memory in BAR 2."""

    def __init__(self, root: Path, bar_size: int) -> None:
        """`root` is on a file system whose files can be mapped and cut off, such as tmpfs."""
        self.root = root
        self.folder = root / "devices/pci0000:40" / ADDRESS
        self.folder.mkdir(parents=True)
        (root / "bus/pci/devices").mkdir(parents=True)
        (root / "bus/pci/devices" / ADDRESS).symlink_to(self.folder)
        bars = [(0, 0, 0), (0, 0, 0), (0x1000000000, 0x1000000000 + bar_size - 1, _MEMORY_64_PREFETCH)]
        (self.folder / "resource").write_text("".join(f"{a:#018x} {b:#018x} {c:#018x}\n" for a, b, c in bars))
        for name, value in (("vendor", "0x1af4"), ("device", "0x1110"), ("class", "0x050000"), ("enable", "1")):
            (self.folder / name).write_text(f"{value}\n")
        self.bar = self.folder / "resource2"
        self.bar.touch()
        os.truncate(self.bar, bar_size)
        self.bar_size = bar_size
        self.switch_on()

    def switch_on(self) -> None:
        """Let the function answer."""
        self._config(_ON)

    def switch_off(self) -> None:
        """Have the function ignore accesses to its memory."""
        self._config(_OFF)

    def silence(self) -> None:
        """Have nobody answer at the function's address."""
        self._config(_NOBODY)

    def vanish(self) -> None:
        """Take the memory away from those who have it mapped: accesses are SIGBUS from now on."""
        os.truncate(self.bar, 0)

    def bind(self, driver: str) -> None:
        """Have a driver."""
        folder = self.root / "bus/pci/drivers" / driver
        folder.mkdir(parents=True)
        (self.folder / "driver").symlink_to(folder)

    def lock_down(self, levels: str) -> None:
        """Have the kernel's lockdown be, such as "none [integrity] confidentiality"."""
        folder = self.root / "kernel/security"
        folder.mkdir(parents=True)
        (folder / "lockdown").write_text(levels + "\n")

    def add_pool(self, size: int, *, with_allocate: bool = True) -> Path:
        """Publish p2pmem, and return its folder."""
        folder = self.folder / "p2pmem"
        folder.mkdir()
        for name, value in (("size", size), ("available", size), ("published", 1)):
            (folder / name).write_text(f"{value}\n")
        if with_allocate:
            (folder / "allocate").touch()
            os.truncate(folder / "allocate", size)
        return folder

    def _config(self, head: bytes) -> None:
        config = self.folder / "config"
        if not config.exists():
            config.write_bytes(bytes(64))
        with config.open("r+b") as file:
            file.write(head)
