"""What the lab takes from Debian: root filesystems and a kernel. Rules of this file:

* Releases that the host does not know are fetched with an apt of their own, in a folder of its own: nothing of the
  host's apt changes, and signatures are checked with Debian's own keys.
* The kernel is the newest of trixie-backports, found by the meta package's dependency: that suite drops old ones.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.lab import host

_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
_PACKAGES = (
    "e2fsprogs",
    "fio",
    "ibverbs-utils",
    "iproute2",
    "iputils-ping",
    "kmod",
    "nvme-cli",
    "pciutils",
    "perftest",
    "procps",
    "python3",
    "python3-pyverbs",
    "rdma-core",
)
# What no test reads, and would only make the archive bigger that the guest's kernel unpacks.
_UNREAD = (
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    "/usr/share/zoneinfo/*",
    "/usr/lib/udev/hwdb.d/*",
    "/lib/udev/hwdb.d/*",
)
_UNREAD_AFTERWARDS = ("var/cache/apt", "var/cache/debconf", "var/lib/apt/lists")
# What it mounts and starts ends with it, also when it is killed.
_ALONE = ("unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc")
_KERNEL_SUITE = "trixie-backports"
_KERNEL_META = "linux-image-amd64"
_KERNEL_PARTS = ("base", "binary", "modules")
_MODULES = (
    "rdma_rxe",
    "ib_uverbs",
    "rdma_ucm",
    "virtio_blk",
    "nvme",
    "vfio-pci",
    "vfio_iommu_type1",
    "veth",
    "sch_netem",
    "loop",
    "ext4",
)


@dataclass(frozen=True)
class Release:
    """A Debian release that a guest runs, with its Python."""

    name: str
    python: str


RELEASES = {release.name: release for release in (Release("trixie", "3.13"), Release("bookworm", "3.11"))}


def root_filesystem(release: Release, tree: Path) -> None:
    """Build a release's root filesystem at `tree`."""
    settings = tree.parent / "apt.conf"
    settings.write_text(_lines(host.download_settings()))
    command = [*_ALONE, "mmdebstrap", "--quiet", "--variant=minbase", "--architectures=amd64", f"--aptopt={settings}"]
    command += [f"--keyring={_KEYS}", f"--include={','.join(_PACKAGES)}"]
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in _UNREAD]
    subprocess.run([*command, release.name, str(tree), host.mirror()], check=True)
    for folder in _UNREAD_AFTERWARDS:
        shutil.rmtree(tree / folder, ignore_errors=True)


def kernel(folder: Path) -> None:
    """Fetch the kernel: `folder` gets the file `vmlinuz` and a `tree` with the modules that the lab uses."""
    apt = _PrivateApt(folder / "apt")
    depends = apt.ask("show", _KERNEL_META)
    found = re.search(r"^Depends: .*\blinux-image-(\d\S*)", depends, re.MULTILINE)
    if not found:
        raise RuntimeError(f"{_KERNEL_META} of {_KERNEL_SUITE} names no kernel that it depends on:\n{depends}")
    version = found[1]
    whole = folder / "whole"
    for archive in apt.download(*(f"linux-{part}-{version}" for part in _KERNEL_PARTS)):
        subprocess.run(["dpkg", "-x", archive, whole], check=True)
    shutil.copy(whole / "usr/lib/modules" / version / "vmlinuz", folder)
    _take_modules(whole, folder / "tree", version)
    shutil.rmtree(whole)
    apt.remove()


def _take_modules(whole: Path, tree: Path, version: str) -> None:
    """Copy the modules that the lab uses and all that they need, unpacked: the guest is slow at that."""
    _index_modules(whole, version)
    for path in _modules_needed(whole, version):
        copy = tree / path.relative_to(whole)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
        if copy.suffix == ".xz":
            subprocess.run(["xz", "--decompress", copy], check=True)
    for kept in ("order", "builtin", "builtin.modinfo"):
        place = f"usr/lib/modules/{version}/modules.{kept}"
        shutil.copy(whole / place, tree / place)
    _index_modules(tree, version)


def _index_modules(tree: Path, version: str) -> None:
    subprocess.run(["/sbin/depmod", "--basedir", tree / "usr", version], check=True)


def _modules_needed(whole: Path, version: str) -> Iterable[Path]:
    ask = ["/sbin/modprobe", "--set-version", version, "--dirname", str(whole / "usr"), "--show-depends", "--all"]
    shown = subprocess.run([*ask, *_MODULES], stdout=subprocess.PIPE, text=True, check=True).stdout
    return sorted({Path(line.split()[1]) for line in shown.splitlines() if line.startswith("insmod ")})


class _PrivateApt:
    """An apt that knows the kernel's suite, and of the host's apt only how to reach the network."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        for name in ("lists/partial", "cache/archives/partial", "packages"):
            (self._folder / name).mkdir(parents=True)
        (self._folder / "status").touch()
        source = f"deb [signed-by={_KEYS}] {host.mirror()} {_KERNEL_SUITE} main\n"
        (self._folder / "sources.list").write_text(source)
        (self._folder / "apt.conf").write_text(_lines([*host.download_settings(), *self._settings()]))
        self._run("apt-get", "--quiet=2", "update")

    def _settings(self) -> Iterable[str]:
        settings = {
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::sourcelist": f"{self._folder}/sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State::lists": f"{self._folder}/lists",
            "Dir::State::status": f"{self._folder}/status",
            "Dir::Cache": f"{self._folder}/cache",
            "APT::Architecture": "amd64",
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
        }
        return (f'{name} "{value}";' for name, value in settings.items())

    def ask(self, *words: str) -> str:
        return self._run("apt-cache", *words)

    def download(self, *packages: str) -> list[Path]:
        self._run("apt-get", "--quiet=2", "download", *packages)
        return sorted((self._folder / "packages").iterdir())

    def remove(self) -> None:
        shutil.rmtree(self._folder)

    def _run(self, *command: str) -> str:
        environment = {**os.environ, "APT_CONFIG": f"{self._folder}/apt.conf", "LC_ALL": "C.UTF-8"}
        place = self._folder / "packages"
        done = subprocess.run(command, cwd=place, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
