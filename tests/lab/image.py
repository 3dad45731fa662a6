"""What a guest boots from. Rules of this file:

* A guest's initramfs is archives put one after another, which the kernel unpacks in this order: a root filesystem,
  the kernel's modules, the Python libraries of the lock, the project as it is in the checkout, and the plan.
* All but the last two come from the cache.
* Byte code is made here, by the guest's own Python at the guest's own paths: an emulated processor is slow at that.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.lab import debian
from tests.lab.cache import Cache
from tests.lab.debian import Release

ROOT = Path(__file__).resolve().parents[2]
GUEST_TESTS = ROOT / "tests" / "lab" / "guest"
PROJECT_PLACE = "project"
_LOCK = ROOT / "requirements" / "lab.txt"
_PROJECT_FILES = ("pyproject.toml", "Makefile", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")
_PROJECT_FOLDERS = ("service", "tests", "bench", "deploy", "protos", "requirements")
_COMPILE = ("python3", "-m", "compileall", "-q", "-j", "2", "--invalidation-mode", "unchecked-hash")
# Collecting tests leaves the byte code of everything whose assertions pytest rewrites.
_COLLECT = ("python3", "-m", "pytest", "--quiet", "--collect-only", "-p", "no:cacheprovider")
_MOUNT_AND_CHROOT = 'while [ "$1" != -- ]; do mount --bind "$1" "$2" || exit; shift 2; done; shift; exec chroot "$@"'


@dataclass(frozen=True)
class Image:
    """What QEMU boots."""

    kernel: Path
    initramfs: Path


@dataclass(frozen=True)
class _Parts:
    """The parts that the cache holds: folders, each with an archive `cpio`."""

    system: Path
    kernel: Path
    libraries: Path


def assemble(cache: Cache, release: Release, plan: str, folder: Path) -> Image:
    """Put a guest's image together in `folder`, of which nothing in the cache is part afterwards."""
    with cache.locked():
        parts = _parts(cache, release)
        _make_project(release, parts, folder / "project")
        _make_plan(plan, folder / "plan")
        archives = [part / "cpio" for part in (parts.system, parts.kernel, parts.libraries)]
        archives += [folder / "project" / "cpio", folder / "plan" / "cpio"]
        image = Image(folder / "vmlinuz", folder / "initramfs")
        shutil.copy(parts.kernel / "vmlinuz", image.kernel)
        with image.initramfs.open("wb") as whole:
            for archive in archives:
                with archive.open("rb") as part:
                    shutil.copyfileobj(part, whole, 1 << 20)
    return image


def _parts(cache: Cache, release: Release) -> _Parts:
    recipe = Path(debian.__file__).read_text()
    system = cache.get(f"system-{release.name}", (release.name, recipe), lambda at: _build_system(release, at))
    kernel = cache.get("kernel", (recipe,), _build_kernel)
    inputs = (system.name, _LOCK.read_text())
    libraries = cache.get(
        f"libraries-{release.name}", inputs, lambda at: _build_libraries(release, system / "tree", at)
    )
    return _Parts(system, kernel, libraries)


def _build_system(release: Release, folder: Path) -> None:
    tell(f"Building the root filesystem of {release.name}: half a minute, the first time.")
    debian.root_filesystem(release, folder / "tree")
    for place in (PROJECT_PLACE, _site(release)):
        (folder / "tree" / place).mkdir(parents=True, exist_ok=True)
    _pack(folder)


def _build_kernel(folder: Path) -> None:
    tell("Fetching the kernel: 120 MB, the first time.")
    debian.kernel(folder)
    _pack(folder)


def _build_libraries(release: Release, system: Path, folder: Path) -> None:
    """Install the lock's wheels for the guest's Python; no code of theirs runs but pytest and its plugins."""
    tell(f"Installing the Python libraries of {release.name}: a quarter of a minute, the first time.")
    site = folder / "tree" / _site(release)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--no-deps"]
    pip += ["--no-compile", "--require-hashes", "--only-binary=:all:", "--implementation=cp"]
    pip += [f"--python-version={release.python}", "--platform=manylinux2014_x86_64"]
    pip += [f"--platform=manylinux_2_{minor}_x86_64" for minor in range(36, 16, -1)]
    subprocess.run([*pip, "--target", site, "--requirement", _LOCK], check=True)
    for tests in site.glob("numpy/**/tests"):
        shutil.rmtree(tests)
    (site / "peermem.pth").write_text(f"/{PROJECT_PLACE}/service\n")
    place = f"/{_site(release)}"
    _run_inside(system, {place: site}, "/tmp", *_COMPILE, place)
    _run_inside(system, {place: site}, "/tmp", *_COLLECT)
    _pack(folder)


def _make_project(release: Release, parts: _Parts, folder: Path) -> None:
    project = folder / "tree" / PROJECT_PLACE
    project.mkdir(parents=True)
    for name in _PROJECT_FILES:
        shutil.copy(ROOT / name, project)
    for name in _PROJECT_FOLDERS:
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    place = f"/{PROJECT_PLACE}"
    mounts = {place: project, f"/{_site(release)}": parts.libraries / "tree" / _site(release)}
    _run_inside(parts.system / "tree", mounts, place, *_COMPILE, "service", "tests", "bench")
    _run_inside(parts.system / "tree", mounts, place, *_COLLECT, str(GUEST_TESTS.relative_to(ROOT)))
    _pack(folder)


def _make_plan(plan: str, folder: Path) -> None:
    tree = folder / "tree"
    tree.mkdir(parents=True)
    (tree / "plan").write_text(plan)
    shutil.copy(GUEST_TESTS / "init.sh", tree / "init")
    (tree / "init").chmod(0o755)
    _pack(folder)


def _site(release: Release) -> str:
    """Return where a release's Python looks for libraries that are not Debian's."""
    return f"usr/local/lib/python{release.python}/dist-packages"


def _run_inside(system: Path, mounts: dict[str, Path], place: str, *command: str) -> None:
    """Run a command at `place` in a root filesystem, with `mounts` in it that nobody else sees.

    Only byte code comes of it. Where it fails, the guest makes its own, and says there what is wrong with a test.
    """
    binds = [str(word) for at, tree in mounts.items() for word in (tree, f"{system}{at}")]
    inside = ["sh", "-c", 'cd "$0" && exec "$@"', place, *command]
    alone = ["timeout", "60", "unshare", "--mount", "--propagation", "private", "sh", "-c", _MOUNT_AND_CHROOT, "sh"]
    subprocess.run(
        [*alone, *binds, "--", str(system), *inside],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "PEERMEM_LAB_OUT": "/tmp"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )


def _pack(folder: Path) -> None:
    """Pack the tree in `folder` beside it."""
    tree = folder / "tree"
    listed = subprocess.run(["find", ".", "-print0"], cwd=tree, stdout=subprocess.PIPE, check=True).stdout
    with (folder / "cpio").open("wb") as archive:
        pack = ["cpio", "--create", "--null", "--format=newc", "--owner=0:0", "--quiet"]
        subprocess.run(pack, input=listed, cwd=tree, stdout=archive, check=True)


def tell(line: str) -> None:
    """Say something on the terminal."""
    print(line, flush=True)  # noqa: T201 -- the lab is a command
