"""A daemon's start, and what it says, where somebody could be believed who should not be."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest
from structlog.testing import capture_logs

import peermem
from peermem.app import App
from peermem.config import Config, Grpc, Http, ListenAddress, Policy, SocketPath, Tcp, Tls
from peermem.config_values import FilePath, NodeIds
from peermem.telemetry import logs
from tests.certificates import HOUR, NOW, PATTERN, Authority
from tests.policies import rule, tenant
from tests.trusting import Node, free_ports

AUTHORITY = Authority()
ANY = ListenAddress("127.0.0.1:0")


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node("a", tmp_path, free_ports(1)[0], AUTHORITY)


async def refusal(config: Config) -> str:
    app = App(config)
    with pytest.raises(OSError, match=r"\[tls\] can't be put in force: ") as caught:
        await app.start()
    return str(caught.value)


async def test_a_daemon_does_not_start_with_credentials_that_can_not_be_put_in_force(node: Node) -> None:
    assert "its SPIFFE ID is spiffe://example.org/peermem/a, and this node's is" in await refusal(
        node.config({}, tls=node.tls(nodes=NodeIds("spiffe://example.org/else/{node}")))
    )
    node.denied.write_text("job 7")
    assert f"{node.denied}: line 1 is neither" in await refusal(node.config({}))
    node.denied.unlink()
    assert "No such file" in await refusal(node.config({}))
    (node.files / "key.pem").unlink()
    assert "No such file" in await refusal(node.config({}))
    agent = Tls(workload_api=SocketPath("/proc/none.sock"), nodes=NodeIds(PATTERN))
    assert "the SPIFFE Workload API at /proc/none.sock gives no certificate" in await refusal(
        node.config({}, tls=agent)
    )


async def test_a_daemon_whose_certificate_is_over_is_not_ready(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    app = App(node.config({}, http=Http(address=ListenAddress(address))))
    await app.start()
    try:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://{address}/readyz") as answer:
                assert answer.status == 200
            async with session.get(f"http://{address}/metrics") as answer:
                page = await answer.text()
            later = (NOW + 25 * HOUR).timestamp()
            monkeypatch.setattr("time.time", lambda: later)
            async with session.get(f"http://{address}/readyz") as answer:
                assert answer.status == 503
                assert "The certificate of spiffe://example.org/peermem/a ended" in await answer.text()
        for whose, end in {"node": NOW + 24 * HOUR, "authority": NOW + 240 * HOUR}.items():
            name = f'peermem_tls_certificate_expiry_timestamp_seconds{{certificate="{whose}"}} '
            (told,) = (float(line.removeprefix(name)) for line in page.splitlines() if line.startswith(name))
            assert told == int(end.timestamp())
    finally:
        monkeypatch.undo()
        await app.stop()


async def test_health_and_metrics_name_no_region_owner_label_or_tenant(node: Node, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    policy = tmp_path / "policy.toml"
    policy.write_text(rule("a-rule", "uid:*", "create") + tenant("a-tenant", "uid:*", "regions = 2"))
    http, rules = Http(address=ListenAddress(address)), Policy(file=FilePath(str(policy)))
    app = App(node.config({}, http=http, policy=rules))
    await app.start()
    try:
        async with await peermem.aio.connect(node.target) as job, aiohttp.ClientSession() as session:
            made = [await job.create_region(device="bar0", length=1, name="a-region", labels={"a-label": "a-value"})]
            made.append(await job.create_region(device="bar0", length=1, name="another-region"))
            transfer = await (await job.transfer(*made)).wait()
            told = ""
            for path in ("/", "/healthz", "/readyz", "/metrics"):
                async with session.get(f"http://{address}{path}") as answer:
                    told += await answer.text()
    finally:
        await app.stop()
    for name in ("a-region", "another-region", "a-label", "a-value", "uid:", "a-tenant", transfer.name.split("/")[-1]):
        assert name not in told
    assert 'device="bar0"' in told


@pytest.mark.parametrize("insecure", [False, True])
async def test_that_anybody_gets_in_is_said_at_each_start(tmp_path: Path, insecure: bool) -> None:
    config = Config(
        insecure_network=insecure,
        grpc=Grpc(socket=SocketPath(f"{tmp_path}/peermem.sock"), address=ANY),
        http=Http(address=None),
        tcp=Tcp(address=ANY),
        fabric="tcp",
        p2pmem=False,
    )
    app = App(config)
    with capture_logs() as seen:
        await app.start()
        await app.stop()
    told = [line for line in seen if line["event"] == "insecure_network"]
    assert bool(told) == insecure
    assert all(line["log_level"] == "error" and "NO AUTHENTICATION" in line["warning"] for line in told)


async def test_where_it_listens_is_in_the_log(node: Node) -> None:
    app = App(node.config({}, token_address=ANY, anonymous=True))
    with capture_logs() as seen:
        await app.start()
        await app.stop()
    (ready,) = [logs.mask_secrets(None, "info", line) for line in seen if line["event"] == "ready"]
    assert ready["grpc"] == node.address
    assert ready["tcp"].startswith("127.0.0.1:")
    assert ready["without_certificate"].startswith("127.0.0.1:")
