"""The container image, built for real and without a container engine's daemon. Rules of this file:

* Debian's base is built by mmdebstrap, as small as the official slim one; the rest is `make image`, through buildah.
* All of it stays below `build/image`: nothing of the machine's own images is touched.
* The result is a folder with the image's `root` filesystem and what `buildah inspect` says of it, `inspect.json`. It is
  built again when anything changes that goes into it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.lab import host
from tests.lab.cache import Cache

ROOT = Path(__file__).resolve().parents[2]
CACHE = Cache(ROOT / "build" / "image")
BASE = "docker.io/library/debian:trixie-slim"
_FILES = (
    "Dockerfile",
    ".dockerignore",
    "Makefile",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "requirements/image.txt",
)
_NEEDS = ("buildah", "mmdebstrap")
_KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_UNREAD = ("doc", "groff", "info", "linda", "lintian/overrides", "locale", "man")
"""Folders of /usr/share that Debian's slim image has not, but for what they say of copyright."""
_DISK_BYTES = 400 << 20
_ALONE = ("unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc")


def missing() -> list[str]:
    """Return Debian's packages that are needed here and not installed."""
    lacks = [package for package in _NEEDS if not shutil.which(package)]
    return [*lacks, *([] if _KEYS.exists() else ["debian-archive-keyring"])]


def built() -> Path:
    """Return the folder with the image of this checkout; hold `CACHE.locked()` while it is used."""
    recipe = Path(__file__).read_text()
    base = CACHE.get("debian", (recipe,), _build_base)
    sources = tuple(path.read_text() for path in _sources())
    return CACHE.get("image", (recipe, base.name, *sources), lambda folder: _build(base / "tar", folder))


def make_disk(disk: Path) -> None:
    """Write a disk with the image's root filesystem on it, as ext4."""
    with CACHE.locked():
        size = f"{_DISK_BYTES >> 10}K"
        make = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(built() / "root"), str(disk), size]
        environ = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        subprocess.run(make, env=environ, check=True)


def inspected(folder: Path) -> dict[str, Any]:
    """Return the image's configuration, as in OCI's specification."""
    found: dict[str, Any] = json.loads((folder / "inspect.json").read_text())["OCIv1"]["config"]
    return found


def _sources() -> Iterator[Path]:
    yield from (ROOT / name for name in _FILES)
    yield from sorted(path for path in (ROOT / "service").rglob("*") if path.suffix in (".py", ".pyi", ".typed"))


def _build_base(folder: Path) -> None:
    settings = folder / "apt.conf"
    settings.write_text("".join(f"{line}\n" for line in host.download_settings()))
    command = [*_ALONE, "mmdebstrap", "--quiet", "--variant=minbase", f"--keyring={_KEYS}", f"--aptopt={settings}"]
    command += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in _UNREAD]
    command += ["--dpkgopt=path-include=/usr/share/doc/*/copyright", "--format=tar"]
    subprocess.run([*command, "trixie", str(folder / "tar"), host.mirror()], check=True)


def _build(base: Path, folder: Path) -> None:
    store = [f"--root={folder}/store", f"--runroot={folder}/running", "--storage-driver=vfs"]
    buildah = ["buildah", *store]
    empty = _said(*buildah, "from", "scratch")
    subprocess.run([*buildah, "add", "--quiet", empty, base, "/"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*buildah, "commit", "--quiet", "--rm", empty, BASE], check=True, stdout=subprocess.DEVNULL)
    options = "--pull-never --isolation chroot --network host"
    named = f"--tag localhost/peermem:built {options}"
    subprocess.run(["make", "image", f"ENGINE={' '.join(buildah)}", f"ARGS={named}"], cwd=ROOT, check=True)
    container = _said(*buildah, "from", "--pull-never", "localhost/peermem:built")
    (folder / "inspect.json").write_text(_said(*buildah, "inspect", "--type", "image", "localhost/peermem:built"))
    subprocess.run(["cp", "--archive", _said(*buildah, "mount", container), folder / "root"], check=True)
    _said(*buildah, "umount", container)
    shutil.rmtree(folder / "store")
    shutil.rmtree(folder / "running", ignore_errors=True)


def _said(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ).stdout.strip()
