"""The command preflight, and what else the tool shows of NICs, against a broker whose NICs fail on cue."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path as FilePath

import pytest
from click.testing import CliRunner, Result

from peermem.cli import tool
from peermem.core.errors import PortDown
from peermem.core.types import Path
from tests.broker.conftest import NicHost, nic_hosts
from tests.serving import NodeFacts, node_service

Run = Callable[..., Awaitable[Result]]


@pytest.fixture
async def host() -> AsyncIterator[NicHost]:
    async with nic_hosts("a") as made:
        yield made[0]


@pytest.fixture
def facts() -> NodeFacts:
    return NodeFacts()


@pytest.fixture
async def run(host: NicHost, facts: NodeFacts, tmp_path: FilePath) -> AsyncIterator[Run]:
    async with node_service(host, tmp_path, facts) as target:

        async def invoke(*words: str, **env: str) -> Result:
            return await asyncio.to_thread(
                CliRunner().invoke, tool, words, prog_name="peermemctl", env={"PEERMEM_TARGET": target, **env}
            )

        yield invoke


async def test_all_works(run: Run) -> None:
    done = await run("preflight")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if line.isupper()] == ["NODE", "NIC", "DEVICE", "ADVICE"]
    assert lines[-1] == "All works."
    assert any(line.split()[:4] == ["bar1", "nic0/1", "STAGED", "works"] for line in lines)
    assert "  It is a software NIC, for tests: the CPU moves its bytes." in lines


async def test_a_failure_is_told_once_with_all_that_it_is_of(run: Run, host: NicHost, facts: NodeFacts) -> None:
    host.nic.unreachable = {Path.HOST, Path.P2PDMA}
    facts.host = replace(facts.host, memlock=4096, capabilities=frozenset())
    done = await run("preflight")
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    below = lines[lines.index("FAILURES") + 1 :]
    assert below[0] == "memlock:"
    assert below[1].endswith("(MEMLOCK_TOO_SMALL)")
    assert below[2:4] == [
        "adopted with nic0/1 by HOST, bar0 with nic0/1 by HOST, bar1 with nic0/1 by STAGED, "
        "bar2 with nic0/1 by P2PDMA, bar2 with nic0/1 by STAGED:",
        "  The NIC does not reach it. (PROBE_FAILED)",
    ]
    assert lines[-1] == "6 of 15 findings failed."


async def test_a_path_is_no_failure_where_another_one_works(run: Run, host: NicHost) -> None:
    host.nic.unreachable = {Path.P2PDMA}
    done = await run("preflight", "--device", "bar2")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    below = lines[lines.index("NOT BY THIS PATH") + 1 :]
    assert below[:2] == ["bar2 with nic0/1 by P2PDMA:", "  The NIC does not reach it. (PROBE_FAILED)"]
    assert "FAILURES" not in lines
    assert lines[-1] == "All works."


async def test_one_device(run: Run) -> None:
    done = await run("preflight", "--device", "bar0")
    assert done.exit_code == 0
    assert "bar1" not in done.stdout
    missing = await run("preflight", "--device", "none")
    assert (missing.exit_code, missing.stdout) == (4, "")
    assert "(DEVICE_NOT_FOUND)" in missing.stderr


async def test_json(run: Run, host: NicHost) -> None:
    host.nic.unreachable.add(Path.HOST)
    done = await run("preflight", "--json", "--device", "bar0")
    assert (done.exit_code, done.stderr) == (1, "")
    verdicts = json.loads(done.stdout)["verdicts"]
    assert verdicts[0]["check"] == "kernel"
    assert verdicts[-1] == {
        "check": None,
        "nic": "nic0/1",
        "device": "bar0",
        "fabric": "verbs",
        "path": "HOST",
        "works": False,
        "error": {
            "reason": "PROBE_FAILED",
            "code": "FAILED_PRECONDITION",
            "message": "The NIC does not reach it.",
            "metadata": {},
        },
        "detail": "Host memory.",
        "advice": "",
        "latency": None,
        "write_bandwidth": None,
        "read_bandwidth": None,
    }


async def test_completion_offers_devices(run: Run) -> None:
    words = "peermemctl preflight --device b"
    done = await run(_PEERMEMCTL_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD="3")
    assert done.stdout.splitlines() == ["plain,bar0", "plain,bar1", "plain,bar2"]


async def test_nics_and_devices(run: Run, host: NicHost) -> None:
    shown = (await run("nics")).stdout.splitlines()[1].split()
    assert shown[:2] == ["nic0/1", "ACTIVE"]
    assert "::ffff:10.0.0.1" in shown
    assert shown[-2:] == ["in", "use"]
    host.nic.ports["nic0/1"] = PortDown("The port nic0/1 is not active.")
    assert "The port nic0/1 is not active." in (await run("nics")).stdout
    assert json.loads((await run("nics", "--json")).stdout)["nics"][0]["error"]["reason"] == "PORT_DOWN"
    assert "No NIC reaches it: The port nic0/1 is not active." in (await run("devices")).stdout
