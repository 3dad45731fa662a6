"""`make screenshots`: the pictures of the page in docs/.

Rules of this file:

* `page.png` and `page-dark.png` are of three real daemons under a load of real transfers, for a minute and a half.
* `page-pci.png` is the drawing of a machine of the tests (`doubled.py`), because this one has no NIC.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog
from bench.daemons import Daemon, daemons

import peermem
from tests.api.page.doubled import GPUS, shown
from tests.chromium import BINARY, browser

DOCS = Path(__file__).parents[3] / "docs"
LOADED_FOR = float(sys.argv[1]) if len(sys.argv) > 1 else 90.0
MIB = 1 << 20
EXTRA = '[[device]]\nname = "bar0"\nsize = "2GiB"\n[[device]]\nname = "bar1"\nsize = "512MiB"\n'
POLICY = """
[[rule]]
name = "everybody"
subjects = ["anyone", "anyone@*"]
rights = ["read", "write", "manage", "create"]

[[tenant]]
name = "backup"
subjects = ["anonymous", "anonymous@*"]
bytes_per_second = "20MiB"
"""


def main() -> int:
    if BINARY is None:
        print("Chromium is missing: install the package chromium.", file=sys.stderr)
        return 1
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    DOCS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="peermem-page-") as name:
        folder = Path(name)
        asyncio.run(drawing(folder / "machine"))
        policy = folder / "policy.toml"
        policy.write_text(POLICY)
        settings = {"PEERMEM_POLICY_FILE": str(policy)}
        with daemons(folder, ("a", "b", "c"), EXTRA, settings) as nodes:
            stop = threading.Event()
            with ThreadPoolExecutor() as pool:
                jobs = [pool.submit(job, nodes, stop) for job in (training, backup)]
                try:
                    asyncio.run(pages(nodes["a"]))
                finally:
                    stop.set()
                for job in jobs:
                    job.result()
    return 0


async def drawing(folder: Path) -> None:
    """The drawing of a server with GPUs, with the verdict that there is most to say of."""
    async with shown("gpu_server", folder, (*GPUS[:3], GPUS[-1])) as it, browser() as tab:
        await it.prove(*(name for name in it.host.devices if name != "gpu3"))
        await tab.look(1600)
        await tab.open(it.url)
        await tab.until("document.querySelectorAll('.cell').length > 50")
        await tab.picture(DOCS / "page-pci.png", "section:has(#drawing)")


async def pages(daemon: Daemon) -> None:
    """The page under load, light and dark."""
    async with browser() as tab:
        await tab.look(1400, 900)
        await tab.open(f"http://{daemon.http}/")
        await asyncio.sleep(LOADED_FOR)
        await tab.until("document.querySelector('#transfers progress') && !document.body.className")
        await tab.picture(DOCS / "page.png")
        await tab.look(1400, 900, dark=True)
        await asyncio.sleep(2)
        await tab.picture(DOCS / "page-dark.png")


def training(nodes: dict[str, Daemon], stop: threading.Event) -> None:
    """A job that moves layers of some sizes from node a to node b and back, with pauses, until told to stop."""
    with peermem.connect(nodes["a"].target) as a, peermem.connect(nodes["b"].target) as b:
        labels = {"job": "llama-70b", "team": "research"}
        layers = [
            a.create_region(device="bar0", length=(4 << at % 5) * MIB, name=f"layer-{at:02}", labels=labels)
            for at in range(8)
        ]
        inboxes = [
            b.create_region(device="bar0", length=layer.length, name=f"inbox-{at:02}")
            for at, layer in enumerate(layers)
        ]
        began = time.monotonic()
        while not stop.is_set():
            for layer, inbox in zip(layers, inboxes, strict=True):
                a.transfer(layer, inbox).wait()
                b.transfer(inbox, layer).wait()
            stop.wait(0.1 if (time.monotonic() - began) % 30 < 20 else 1.0)


def backup(nodes: dict[str, Daemon], stop: threading.Event) -> None:
    """A job within a limit of bytes per second, one of whose transfers is cancelled."""
    with peermem.connect(nodes["a"].grpc) as a, peermem.connect(nodes["c"].grpc) as c:
        source = a.create_region(device="bar1", length="256MiB", name="checkpoint", labels={"keep": "7d"})
        target = c.create_region(device="bar1", length="256MiB", name="checkpoint-copy")
        a.transfer(source, target).cancel()
        while not stop.is_set():
            running = a.transfer(source, target)
            for _ in running.watch():
                if stop.is_set():
                    running.cancel()


if __name__ == "__main__":
    sys.exit(main())
