"""The container image, built from Debian's packages and the lock, and run.

A container here is the image's root filesystem, read-only, in a mount namespace of its own, with the image's own user
and no capability. Building takes two minutes, the first time: `make image-test` runs this, `make test` does not.
"""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from bench.daemons import Daemon, Place, daemons
from bench.demo import move

from tests.deploy import container_image
from tests.deploy.containers import USER, container
from tests.e2e.support import MIB, noise

if "PEERMEM_BUILD_IMAGE" not in os.environ:
    pytest.skip("it builds a container image: run `make image-test`", allow_module_level=True)
if os.geteuid() != 0 or container_image.missing():
    lacks = ", ".join(container_image.missing()) or "root"
    pytest.skip(f"building a container image needs {lacks}", allow_module_level=True)

pytestmark = pytest.mark.timeout(600)  # for the first, which builds

MOST_BYTES = 250 * MIB
"""Of the root filesystem, unpacked; most of it is Debian, Python and gRPC."""
TOOLCHAIN = {"cc", "gcc", "g++", "c++", "clang", "ld", "as", "make", "pip", "pip3", "cargo", "go"}
RDMA = "from pyverbs import device, mr, qp, cq, wr; from pyverbs.libibverbs_enums import IBV_WR_RDMA_WRITE"


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    with container_image.CACHE.locked():
        yield container_image.built()


@pytest.fixture(scope="module")
def root(image: Path) -> Path:
    return image / "root"


@pytest.fixture(scope="module")
def config(image: Path) -> dict[str, Any]:
    return container_image.inspected(image)


@contextmanager
def containers(root: Path, folder: Path) -> Iterator[dict[str, Daemon]]:
    """Run the daemons of nodes a, b and c, each in a container."""
    place = Place(prefix=container(root, folder), program=("/usr/local/bin/peermemd",))
    names = ("a", "b", "c")
    with daemons(
        folder, names, '[[device]]\nname = "bar0"\nsize = "128MiB"', places=dict.fromkeys(names, place)
    ) as nodes:
        yield nodes


def said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_says_what_it_is(config: dict[str, Any]) -> None:
    labels = config["Labels"]
    stem = "org.opencontainers.image."
    assert (labels[f"{stem}title"], labels[f"{stem}licenses"]) == ("peermem", "Apache-2.0")
    assert f'version = "{labels[f"{stem}version"]}"' in (container_image.ROOT / "pyproject.toml").read_text()
    assert len(labels[f"{stem}revision"]) == 40


def test_it_starts_the_daemon_itself_and_without_rights(config: dict[str, Any]) -> None:
    assert config["Entrypoint"] == ["/usr/local/bin/peermemd"]
    assert config.get("Cmd") is None
    assert config["User"] == f"{USER}:{USER}"


def test_no_program_gives_its_caller_other_rights(root: Path) -> None:
    risen = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink() if _gives_rights(path)]
    assert risen == []


def _gives_rights(path: Path) -> bool:
    try:
        os.getxattr(path, "security.capability")
    except OSError:
        return bool(path.stat().st_mode & (stat.S_ISUID | stat.S_ISGID))
    return True


def test_nothing_in_it_builds_software(root: Path) -> None:
    programs = {path.name for place in ("bin", "sbin", "local/bin") for path in (root / "usr" / place).iterdir()}
    assert programs & TOOLCHAIN == set()
    assert list(root.glob("usr/lib/python3*/**/pip")) == []


def test_it_is_small(root: Path) -> None:
    assert sum(path.lstat().st_blocks * 512 for path in root.rglob("*")) < MOST_BYTES


def test_nothing_of_the_machine_that_built_it_is_left(root: Path) -> None:
    found = subprocess.run(
        [
            "grep",
            "-rlI",
            "-e",
            "PIP_CERT",
            "-e",
            str(container_image.ROOT),
            "--exclude-dir=proc",
            root / "etc",
            root / "usr/local",
        ],
        capture_output=True,
        text=True,
    )
    assert found.stdout == ""


def test_pyverbs_finds_the_libraries_of_its_own_release(root: Path, tmp_path: Path) -> None:
    assert said(*container(root, tmp_path), "python3", "-c", f"{RDMA}; print('here')") == "here\n"
    assert list(root.glob("usr/lib/x86_64-linux-gnu/libibverbs/libmlx5-rdmav*.so"))


def test_containers_of_it_move_what_the_demo_moves(root: Path, tmp_path: Path) -> None:
    data = noise(16 * MIB + 1)
    source = tmp_path / "file"
    source.write_bytes(data)
    with containers(root, tmp_path) as nodes:
        assert move(nodes, source, data)
        for node in nodes.values():
            assert Path(f"/proc/{node.pid}/status").read_text().split("Uid:")[1].split()[0] == str(USER)
            assert node.stop() == 0
            assert "Traceback" not in node.log.read_text()


def test_its_own_tool_moves_bytes(root: Path, tmp_path: Path) -> None:
    data = noise(MIB + 3)
    (tmp_path / "in").write_bytes(data)
    with containers(root, tmp_path) as nodes:

        def tool(node: str, *words: str) -> None:
            said(*container(root, tmp_path), "peermemctl", "--target", nodes[node].target, *words)

        length = str(len(data))
        tool("a", "regions", "create", "--device", "bar0", "--length", length, "--name", "here")
        tool("b", "regions", "create", "--device", "bar0", "--length", length, "--name", "there")
        tool("a", "regions", "put", str(tmp_path / "in"), "here")
        tool("a", "transfer", "nodes/a/regions/here", "nodes/b/regions/there", "--checksum")
        tool("b", "regions", "get", "there", str(nodes["b"].folder / "out"))
        assert (nodes["b"].folder / "out").read_bytes() == data
