"""Machines in small: sysfs trees that tests build from descriptions, to read as a daemon reads /sys.

Each `.toml` beside this file describes one machine: which PCI functions are below which, as `lspci -t` draws them,
and its NICs. What real trees have and nobody reads is left out; what is read is spelled as the kernel spells it.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peermem.core.topology import Topology
from peermem.device.sysfs import read_topology

MACHINES = ("gpu_server", "cloud_vm", "lab_guest", "epyc")
NO_GID = ":".join(["0000"] * 8)
FAILS = "/proc/self/mem"
"""What a file that can be opened and not read links to."""


@dataclass(frozen=True)
class Machine:
    """A built tree."""

    root: Path
    """Stands for /sys."""
    proc: Path
    """Stands for /proc."""

    def read(self) -> Topology:
        return read_topology(self.root, self.proc)

    def function(self, address: str) -> Path:
        """Return the real folder of a PCI function."""
        return (self.root / "bus/pci/devices" / address).resolve()

    def write(self, address: str, attribute: str, text: str) -> None:
        """Change an attribute of a PCI function."""
        (self.function(address) / attribute).write_text(f"{text}\n")

    def without_privilege(self) -> Machine:
        """Cut every configuration space as the kernel does for a reader without CAP_SYS_ADMIN."""
        for config in self.root.glob("bus/pci/devices/*/config"):
            config.write_bytes(config.read_bytes()[:64])
        return self


def build(name: str, folder: Path) -> Machine:
    """Build the machine that `name`.toml describes below `folder`."""
    described = tomllib.loads((Path(__file__).parent / f"{name}.toml").read_text())
    machine = Machine(folder / "sys", folder / "proc")
    files(machine.proc, cpuinfo=described["cpuinfo"])
    for node in range(described["numa_nodes"]):
        (machine.root / f"devices/system/node/node{node}").mkdir(parents=True)
    files(machine.root / "kernel/security", lockdown=described["lockdown"])
    build_functions(machine.root, described["pci"])
    for number, (device, facts) in enumerate(described["nics"].items()):
        build_nic(machine.root, device, number, described["every_nic"] | facts)
    return machine


def build_functions(root: Path, drawing: str) -> None:
    """Build what `drawing` shows: host bridges, and the functions below with their indentation.

    A function's line is its address, vendor:device, class, and what else counts as name=value.
    """
    above: list[tuple[int, Path]] = []
    numa = "-1"
    for line in filter(str.strip, drawing.splitlines()):
        indent = len(line) - len(line.lstrip())
        name, *words = line.split()
        above = [entry for entry in above if entry[0] < indent]
        folder = (above[-1][1] if above else root / "devices") / name
        above.append((indent, folder))
        if indent == 0:
            numa = next((word.removeprefix("numa=") for word in words), "-1")
        else:
            build_function(root, folder, words[0], words[1], numa, dict(word.split("=", 1) for word in words[2:]))


def build_function(root: Path, folder: Path, ids: str, kind: str, numa: str, facts: dict[str, str]) -> None:
    vendor, device = ids.split(":")
    files(folder, vendor=f"0x{vendor}", device=f"0x{device}", numa_node=numa, resource=resource(facts.get("bars", "")))
    files(folder, **{"class": f"0x{kind}"})
    acs = int(facts["acs"], 16) if "acs" in facts else None
    (folder / "config").write_bytes(config(command=0 if facts.get("memory") == "off" else 0x0406, acs=acs))
    if "driver" in facts:
        link(root / "bus/pci/drivers" / facts["driver"], folder / "driver", directory=True)
    if "p2pmem" in facts:
        size, available, published = facts["p2pmem"].split(":")
        files(folder / "p2pmem", size=size, available=available, published=published, allocate="")
    link(folder, root / "bus/pci/devices" / folder.name)


def resource(described: str) -> str:
    """Return the attribute of that name for BARs described as index:start:size:flags, all hexadecimal."""
    lines = [f"0x{0:016x} 0x{0:016x} 0x{0:016x}\n"] * 13
    for bar in filter(None, described.split(",")):
        index, start, size, flags = (int(word, 16) for word in bar.split(":"))
        lines[index] = f"0x{start:016x} 0x{start + size - 1:016x} 0x{flags:016x}\n"
    return "".join(lines)


def build_nic(root: Path, device: str, number: int, facts: dict[str, Any]) -> None:
    function = facts.get("function")
    parent = (root / "bus/pci/devices" / function).resolve() if function else root / "devices/virtual"
    folder = parent / "infiniband" / device
    port = folder / "ports/1"
    files(folder, node_guid=facts["node_guid"], fw_ver=facts.get("fw_ver", ""))
    files(port, **{name: facts[name] for name in ("state", "phys_state", "link_layer", "rate")})
    if function:
        link(parent, folder / "device")
    else:
        files(folder, parent=facts["parent"])
    for index in range(facts["gid_slots"]):
        value, kind, netdev = (*facts["gids"], *[[]] * facts["gid_slots"])[index] or (NO_GID, "", "")
        files(port / "gids", **{str(index): value})
        for attribute, text in (("types", kind), ("ndevs", netdev)):
            place(port / "gid_attrs" / attribute / str(index), text)
    for kind in ("counters", "hw_counters"):
        files(port / kind, **{name: str(value) for name, value in facts.get(kind, {}).items()})
    link(folder, root / "class/infiniband" / device)
    verbs = parent / "infiniband_verbs" / f"uverbs{number}"
    files(verbs, ibdev=device)
    link(verbs, root / "class/infiniband_verbs" / verbs.name)


def place(path: Path, text: str) -> None:
    """Write an attribute; an empty one can't be read, as those of empty GID slots can't."""
    if text:
        files(path.parent, **{path.name: text})
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(FAILS)


def files(folder: Path, /, **texts: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text if text.endswith("\n") else f"{text}\n")


def link(target: Path, name: Path, *, directory: bool = False) -> None:
    """Make a relative link, as sysfs does."""
    if directory:
        target.mkdir(parents=True, exist_ok=True)
    name.parent.mkdir(parents=True, exist_ok=True)
    name.symlink_to(os.path.relpath(target, name.parent))


def config(command: int, acs: int | None) -> bytes:
    """Return a configuration space whose extended part has AER and, unless it is None, ACS with this control."""
    space = bytearray(4096)
    space[4:6] = command.to_bytes(2, "little")
    space[0x100:0x104] = (0x0001 | 2 << 16 | (0x148 << 20 if acs is not None else 0)).to_bytes(4, "little")
    if acs is not None:
        space[0x148:0x14C] = (0x000D | 1 << 16).to_bytes(4, "little")
        space[0x14C:0x150] = (0x005F | acs << 16).to_bytes(4, "little")
    return bytes(space)
