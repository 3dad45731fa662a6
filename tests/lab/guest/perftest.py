"""perftest between the nodes: the server in n2, the client in n1, on their first NICs."""

from __future__ import annotations

import subprocess

_MIB = 1 << 20
_ADDRESS = "10.0.0.2"
_TIMEOUT = 120


def bandwidth(tool: str, size: int, iterations: int) -> float:
    """Return the average of `ib_write_bw` or `ib_read_bw` in bytes per second, of one queue pair and as it is set."""
    return _row(tool, size, iterations)[3] * _MIB


def typical_latency(tool: str, size: int, iterations: int) -> float:
    """Return the typical one-way time of `ib_write_lat` in seconds."""
    return _row(tool, size, iterations)[4] * 1e-6


def _row(tool: str, size: int, iterations: int) -> list[float]:
    """Run both ends, and return the numbers of the client's line: size and iterations, then what was measured."""
    command = [tool, "--gid-index=1", f"--size={size}", f"--iters={iterations}"]
    listen = ["ip", "netns", "exec", "n2", "stdbuf", "--output=L", *command, "--ib-dev=rxe2"]
    ask = ["ip", "netns", "exec", "n1", *command, "--ib-dev=rxe1", _ADDRESS]
    with subprocess.Popen(listen, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            assert any("Waiting for client" in line for line in server.stdout)
            text = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=_TIMEOUT).stdout
            server.communicate(timeout=_TIMEOUT)
        finally:
            server.kill()
    (row,) = (line.split() for line in text.splitlines() if line.split()[:2] == [str(size), str(iterations)])
    return [float(number) for number in row]
