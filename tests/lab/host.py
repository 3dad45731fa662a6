"""What the lab needs of the machine it runs on. Rules of this file:

* What is missing is one sentence, with the command that mends it.
* Nothing of the machine is altered: the host's apt is only asked.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Debian's packages, and a file or command of each that the lab uses.
_NEEDS = {
    "qemu-system-x86": "qemu-system-x86_64",
    "seabios": "/usr/share/seabios/bios-256k.bin",
    "mmdebstrap": "mmdebstrap",
    "debian-archive-keyring": "/usr/share/keyrings/debian-archive-keyring.gpg",
    "buildah": "buildah",
    "cpio": "cpio",
    "e2fsprogs": "mke2fs",
    "kmod": "depmod",
    "xz-utils": "xz",
}
_RELEASES = {"12": "bookworm", "13": "trixie"}
_MIRROR = "http://deb.debian.org/debian"


@dataclass(frozen=True)
class Host:
    """What was found."""

    root: bool
    machine: str
    distribution: str
    release: str
    missing: tuple[str, ...]


def look() -> Host:
    """Look at this machine."""
    facts = platform.freedesktop_os_release()
    missing = tuple(package for package, proof in _NEEDS.items() if not _there(proof))
    return Host(os.geteuid() == 0, platform.machine(), facts.get("ID", ""), facts.get("VERSION_ID", ""), missing)


def lack(host: Host) -> str | None:
    """Return the sentence that says why the lab can't run on `host`, None where it can."""
    if host.machine != "x86_64":
        return f"The lab runs x86-64 systems, and this machine is {host.machine}: use an x86-64 one."
    if host.distribution != "debian" or host.release not in _RELEASES:
        found = f"{host.distribution} {host.release}".strip() or "not known"
        return f"The lab is built with the tools of Debian 12 or 13, and this system is {found}: use one of these."
    if host.missing:
        return (
            f"The lab needs Debian's {', '.join(host.missing)}, not installed here: run "
            f"'apt-get install --no-install-recommends {' '.join(host.missing)}' as root, then this again."
        )
    if not host.root:
        return "The lab builds root filesystems, which takes root, and this user is not: run this as root."
    return None


def mirror() -> str:
    """Return the Debian mirror that this host's apt uses for its own release."""
    release = _RELEASES[look().release]
    targets = ["apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Created-By: Packages"]
    listed = subprocess.run(targets, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [uri for suite, _, uri in (line.partition(" ") for line in listed) if suite == release]
    return found[0].rstrip("/") if found else _MIRROR


def download_settings() -> list[str]:
    """Return this host's settings for apt's downloads (proxies, certificates), as lines of an apt.conf."""
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    return [line for line in dump.splitlines() if line.startswith("Acquire::http")]


def _there(proof: str) -> bool:
    return Path(proof).exists() if proof.startswith("/") else shutil.which(proof, path=_command_path()) is not None


def _command_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
