"""Directories behind etcd's own gRPC proxy, which makes one watch of many that are alike."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import create_connection

from bench.daemons import free_ports

from tests.directory.conformance import A, B, written
from tests.directory.etcd_server import PATIENCE, etcd_server, needs_etcd
from tests.directory.support import opened, region, settings, until

pytestmark = needs_etcd
C = b'{"v": 1, "address": "10.0.0.3:1"}'


@contextmanager
def proxied(endpoint: str, log: Path) -> Iterator[str]:
    """Run a proxy for the time of a block; gives its address."""
    (port,) = free_ports(1)
    command = ["etcd", "grpc-proxy", "start", f"--endpoints={endpoint}", f"--listen-addr=127.0.0.1:{port}"]
    with log.open("wb") as written:
        process = subprocess.Popen(command, stdout=written, stderr=written, env={})
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


async def test_nodes_are_read_once_and_followed(tmp_path: Path) -> None:
    with etcd_server(tmp_path / "etcd") as etcd, proxied(etcd.endpoint, tmp_path / "log") as proxy:
        chosen = settings(proxy, "x", lease=600)
        async with opened(chosen, A) as a, opened(chosen, B) as b:
            await until(a, lambda: "b" in a.nodes())
            etcd.put("/peermem/v1/x/nodes/c", C)
            for each in (a, b):
                await until(each, lambda each=each: "c" in each.nodes())  # type: ignore[misc]
                counts = each.status().counts
                assert (counts.listings, counts.resumes, each.status().away_for) == (1, 0, None)


async def test_a_lease_is_renewed_in_time_again_and_again(tmp_path: Path) -> None:
    with etcd_server(tmp_path / "etcd") as etcd, proxied(etcd.endpoint, tmp_path / "log") as proxy:
        async with opened(settings(proxy, "x", lease=3), A) as a:
            for _ in range(12):  # longer than the proxy and the node take to be out of step
                before = a.status().counts.renewals
                await until(a, lambda before=before: a.status().counts.renewals > before)  # type: ignore[misc]
            assert (a.status().counts.failed_renewals, a.status().away_for) == (0, None)


async def test_regions_that_others_publish_past_the_proxy_are_found(tmp_path: Path) -> None:
    with etcd_server(tmp_path / "etcd") as etcd, proxied(etcd.endpoint, tmp_path / "log") as proxy:
        near, far = (settings(endpoint, "x", lease=600) for endpoint in (proxy, etcd.endpoint))
        async with opened(near, A) as a, opened(far, B) as b:
            for labels in ({}, {"step": "1"}):
                assert await a.find(labels, None, 10) == ([], None)
            b.publish(region("y", "b", step="1"))
            await written(b)
            for labels in ({}, {"step": "1"}):
                assert [each.name.id for each in (await a.find(labels, None, 10))[0]] == ["y"]
            b.withdraw(region("y", "b").name)
            await written(b)
            assert await a.find({}, None, 10) == ([], None)
