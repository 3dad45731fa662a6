"""What systemd in the guest runs to look at the units from inside: `systemd_job.py RESULT`, a file that becomes JSON.

Each key of the result is one thing that was seen; the test that started systemd says what it should be.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peermem

SERVICE = "peermemd.service"
TARGET = "unix:///run/peermem/peermem.sock"
PATIENCE = 120.0


def property_of(name: str) -> str:
    shown = ["systemctl", "show", SERVICE, "--value", "--property", name]
    return subprocess.run(shown, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def job() -> dict[str, Any]:
    """Do what a job does, by the NIC's side too."""
    with (
        peermem.connect(TARGET) as node,
        node.create_region(device="memfd0", length=1 << 20) as source,
        node.create_region(device="memfd0", length=1 << 20) as sink,
    ):
        source.map()[:5] = b"hello"
        info = node.transfer(source, sink, checksum=True).wait("60s")
        return {"state": info.state, "read": sink.read(0, 5).decode(), "nics": source.nics, "owner": source.owner}


def restarted(before: str) -> bool:
    end = time.monotonic() + PATIENCE
    while property_of("NRestarts") == before and time.monotonic() < end:
        time.sleep(0.5)
    return property_of("NRestarts") != before


def main() -> int:
    seen: dict[str, Any] = {}
    try:
        seen["before"] = property_of("ActiveState")
        seen["job"] = job()
        seen["active"] = property_of("ActiveState")
        seen["status"] = property_of("StatusText")
        pid = int(property_of("MainPID"))
        facts = Path(f"/proc/{pid}/status").read_text().splitlines()
        seen["rights"] = {
            line.split(":")[0]: line.split()[1] for line in facts if line.startswith(("CapEff", "Seccomp:"))
        }
        os.kill(pid, signal.SIGSTOP)
        seen["restarted"] = restarted("0")
        seen["job again"] = job()
        subprocess.run(["systemctl", "stop", SERVICE], check=True)
        seen["result"] = property_of("Result")
        seen["socket"] = Path("/run/peermem/attach.sock").is_socket()
        seen["log"] = subprocess.run(["journalctl", "-u", SERVICE], stdout=subprocess.PIPE, text=True).stdout
    finally:
        Path(sys.argv[1]).write_text(json.dumps(seen))
        subprocess.run(["systemctl", "exit", "0"], check=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
