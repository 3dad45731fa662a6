"""Moves a region from one node to another and back, and checks every byte: `move.py HOST:PORT...`.

A host that stands for several nodes, as the name of a Service without a cluster address does, counts as all of them.
Where the daemons use TLS, PEERMEM_CLIENT_ variables name the authorities and the token, as for any job.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys

import peermem

LENGTH = 16 << 20


def main(names: list[str]) -> int:
    """Return 0 where all bytes came back."""
    targets = sorted({target for name in names for target in addresses(name)})
    if len(targets) < 2:
        print(f"Two nodes are needed, and {', '.join(names)} is {', '.join(targets) or 'none'}.", file=sys.stderr)
        return 2
    data = os.urandom(LENGTH)
    with (
        peermem.connect(targets[0]) as here,
        peermem.connect(targets[1]) as there,
        region(here) as source,
        region(there) as middle,
        region(here) as back,
    ):
        source.write(data)
        for first, second in ((source, middle), (middle, back)):
            info = here.transfer(first, second, checksum=True).wait("60s")
            fabric = info.fabric.value if info.fabric else "none"
            print(f"{first.name} to {second.name}: {info.bytes_done} bytes over {fabric}", flush=True)
        same = back.read() == data
    print(f"SHA-256 {hashlib.sha256(data).hexdigest()}: {'the same' if same else 'DIFFERENT'}")
    return 0 if same else 1


def addresses(name: str) -> list[str]:
    """Return host:port of each node that a name stands for."""
    host, _, port = name.rpartition(":")
    found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    return [f"[{where[0]}]:{port}" if ":" in str(where[0]) else f"{where[0]}:{port}" for *_, where in found]


def region(node: peermem.Node) -> peermem.Region:
    """Make a region on the node's first device with room for it; its lease ends it if this Job can't."""
    device = next(each for each in node.devices() if each.available >= LENGTH and each.kind != "adopted")
    return node.create_region(device=device.name, length=LENGTH, lease="5min")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
