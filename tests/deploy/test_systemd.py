"""The units for bare metal, as systemd's own tools and the daemon's configuration see them."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from peermem.broker.ending import MARGIN
from peermem.config import Config

UNITS = Path(__file__).resolve().parents[2] / "deploy" / "systemd"
NOT_WRONG = ("is not executable", "/dev/null")

analyzer = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="Debian's package systemd is not installed"
)


def unit(name: str) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False, comment_prefixes=("#",), interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNITS / name)
    return parser


def seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+)s", text)
    assert found
    return float(found[1])


@analyzer
def test_systemd_finds_no_fault(tmp_path: Path) -> None:
    """With a program in the daemon's place, since systemd looks whether there is one."""
    program = tmp_path / "peermemd"
    program.touch(0o755)
    for path in UNITS.iterdir():
        (tmp_path / path.name).write_text(path.read_text().replace("/opt/peermem/bin/peermemd", str(program)))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / "peermemd.service", tmp_path / "peermemd.socket"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (verified.returncode, verified.stderr) == (0, "")


@analyzer
def test_little_is_exposed() -> None:
    judged = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=30", "--no-pager", UNITS / "peermemd.service"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert judged.returncode == 0, judged.stdout


def test_units_and_configuration_agree() -> None:
    config, service = Config(), unit("peermemd.service")["Service"]
    assert unit("peermemd.socket")["Socket"]["ListenSequentialPacket"] == config.attach.socket
    assert config.attach.socket.startswith(f"/run/{service['RuntimeDirectory']}/")
    assert seconds(service["TimeoutStopSec"]) >= config.shutdown.grace + config.transfer.grant_ttl + 4 * MARGIN
    assert service["Type"] == "notify"
    assert service["LimitMEMLOCK"] == "infinity"


def test_a_daemon_that_can_t_start_yet_is_tried_again_without_end() -> None:
    """systemd gives up what starts more than so often in a while, and the socket with it."""
    limits, service = unit("peermemd.service")["Unit"], unit("peermemd.service")["Service"]
    pauses = int(limits["StartLimitBurst"]) * seconds(service["RestartSec"])
    assert pauses > seconds(limits["StartLimitIntervalSec"])


def test_loads_and_stores_have_the_system_call_that_keeps_them_in_their_folders() -> None:
    """RestrictSUIDSGID= answers openat2 with ENOSYS, because its filter can't see the mode of a new file."""
    assert "RestrictSUIDSGID" not in unit("peermemd.service")["Service"]


def test_each_way_to_open_a_vfio_function_is_allowed() -> None:
    """The daemon takes iommufd wherever the kernel has it; names of groups are those of /proc/devices."""
    text = (UNITS / "peermemd.service").read_text()
    allowed = set(re.findall(r"(?m)^DeviceAllow=(\S+) rw$", text))
    assert {"char-vfio", "/dev/vfio/vfio"} <= allowed, "by its group"
    assert {"char-vfio-dev", "/dev/iommu"} <= allowed, "by its own file"
