"""The tool against real daemons."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import peermem
from peermem.cli import output, tool
from tests.client.processes import Cluster, eventually
from tests.policies import rule

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that the daemons load from and store into."""
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def cluster(files: Path) -> Iterator[Cluster]:
    with Cluster(files, "a", "b") as cluster:
        yield cluster


@pytest.fixture
def run(cluster: Cluster) -> Run:
    def invoke(*words: str, code: int = 0, target: str = "a", stdin: bytes | None = None) -> Result:
        done = CliRunner().invoke(tool, words, env={"PEERMEM_TARGET": cluster.target(target)}, input=stdin)
        assert done.exit_code == code, done.output
        return done

    return invoke


@pytest.fixture
def region(run: Run) -> Iterator[str]:
    name = facts(run("regions", "create", "--device", "bar0", "--length", "1MiB", "--json"))["name"]
    yield name
    run("regions", "delete", name, "--force")


def facts(done: Result) -> Any:
    return json.loads(done.stdout)


def test_nodes_and_devices(run: Run) -> None:
    assert facts(run("node", "--json"))["name"] == "nodes/a"
    assert facts(run("node", "nodes/b", "--json"))["name"] == "nodes/b"
    assert [node["name"] for node in facts(run("nodes", "--json"))["nodes"]] == ["nodes/a", "nodes/b"]
    assert {device["name"]: device["size"] for device in facts(run("devices", "--json"))["devices"]}["bar0"] == 1 << 30
    assert facts(run("nics", "--json")) == {"nics": []}
    assert "nodes/a" in run("node").stdout
    assert "this node" in run("nodes").stdout
    assert "1GiB" in run("devices").stdout
    run("nics")


def test_regions_are_deleted_by_name_or_by_job(run: Run) -> None:
    assert "Name regions, or a Slurm job" in run("regions", "delete", code=2).stderr
    assert "Name regions, or a Slurm job" in run("regions", "delete", "life", "--slurm-job", "7", code=2).stderr
    assert facts(run("regions", "delete", "--slurm-job", "7", "--json")) == {"deleted": []}
    assert facts(run("regions", "list", "--slurm-job", "7", "--json")) == {"regions": []}


def test_the_life_of_a_region(run: Run) -> None:
    made = facts(
        run("regions", "create", "--device", "bar0", "--length", "4KiB", "--name", "life", "--label", "k=v", "--json")
    )
    assert (made["name"], made["length"], made["labels"], made["lease"]["kind"]) == (
        "nodes/a/regions/life",
        4096,
        {"k": "v"},
        "none",
    )
    assert facts(run("regions", "show", "life", "--json")) == made
    assert facts(run("regions", "list", "--label", "k=v", "--json")) == {"regions": [made]}
    assert "life" in run("regions", "list").stdout
    assert "4KiB" in run("regions", "show", made["name"]).stdout
    assert facts(run("regions", "delete", "life", "--json")) == {"deleted": ["life"]}
    assert "REGION_NOT_FOUND" in run("regions", "show", "life", code=4).stderr


def test_a_published_region_is_found(run: Run) -> None:
    run("regions", "create", "--device", "bar0", "--length", "4KiB", "--name", "told", "-l", "k=told", "--publish")
    run("regions", "create", "--device", "bar0", "--length", "4KiB", "--name", "untold", "-l", "k=told")
    assert "yes" in run("regions", "show", "told").stdout
    (found,) = facts(run("regions", "find", "-l", "k=told", "--json"))["regions"]
    assert (found["name"], found["device_kind"], found["labels"]) == ("nodes/a/regions/told", "memfd", {"k": "told"})
    assert "nodes/a/regions/told" in run("regions", "find").stdout
    run("regions", "delete", "told", "untold")
    assert facts(run("regions", "find", "--json")) == {"regions": []}


def test_a_lease_may_have_a_time(run: Run) -> None:
    made = facts(run("regions", "create", "--device", "bar0", "--length", "1", "--lease", "10min", "--json"))
    assert (made["lease"]["kind"], made["lease"]["ttl"]) == ("ttl", 600.0)
    run("regions", "delete", made["name"])


def test_files_go_in_and_come_out(run: Run, region: str, tmp_path: Path) -> None:
    data = os.urandom(10_000)
    (tmp_path / "in").write_bytes(data)
    assert facts(run("regions", "put", str(tmp_path / "in"), region, "--json"))["bytes"] == 10_000
    run("regions", "put", "-", f"{region}:100+5", stdin=b"stdin")
    run("regions", "get", f"{region}:0+10000", str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == data[:100] + b"stdin" + data[105:]
    assert run("regions", "get", f"{region}:100+5", "-").stdout_bytes == b"stdin"
    assert "OUT_OF_RANGE" in run("regions", "put", str(tmp_path / "in"), f"{region}:0+9999", code=1).stderr
    assert "OUT_OF_RANGE" in run("regions", "put", "-", f"{region}:0+4", code=1, stdin=b"stdin").stderr


def test_the_node_loads_and_stores_its_own_files(run: Run, region: str, files: Path) -> None:
    data = os.urandom(10_000)
    (files / "in").write_bytes(data)
    loaded = facts(run("regions", "load", str(files / "in"), f"{region}:5+9000", "--file-offset", "500", "--json"))
    assert (loaded["region"], loaded["bytes_done"], loaded["crc32c"]) == (region, 9000, None)
    assert loaded["way"] in ("DIRECT", "STAGED", "BUFFERED")
    assert loaded["why"]
    assert loaded["bandwidth"] > 0
    stored = run("regions", "store", f"{region}:5+9000", str(files / "out"), "--checksum").stdout
    assert "crc32c:" in stored
    assert (files / "out").read_bytes() == data[500:9500]
    run("regions", "store", f"{region}:5+3", str(files / "out"), "--file-offset", "1")
    assert (files / "out").read_bytes()[:5] == data[500:501] + data[500:503] + data[504:505]
    run("regions", "load", str(files / "in"), region)
    assert run("regions", "get", f"{region}:0+10000", "-").stdout_bytes == data
    assert "FILE_NOT_FOUND" in run("regions", "load", str(files / "none"), region, code=4).stderr
    assert "STORAGE_FORBIDDEN" in run("regions", "store", region, "/etc/passwd", code=5).stderr
    assert "FILE_TOO_SHORT" in run("regions", "load", str(files / "in"), f"{region}:0+10001", code=1).stderr


def test_a_region_of_another_node_is_loaded_there(run: Run, files: Path) -> None:
    name = facts(run("regions", "create", "--device", "bar0", "--length", "4KiB", "--json", target="b"))["name"]
    (files / "in").write_bytes(b"far")
    assert facts(run("regions", "load", str(files / "in"), name, "--json"))["bytes_done"] == 3
    assert run("regions", "get", f"{name}:0+3", "-").stdout_bytes == b"far"
    run("regions", "delete", name, target="b")


def test_get_tells_how_fast_it_is_from_its_first_piece_on(
    run: Run, region: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_PLAIN_INTERVAL", 0.0)
    told, *_ = run("regions", "get", region, str(tmp_path / "got")).stderr.splitlines()
    assert told.startswith(f"get {region}: 1MiB of 1MiB, ")
    assert "B/s" in told
    assert ", 0B/s" not in told


def test_a_region_of_another_node_is_found_by_its_name(run: Run, tmp_path: Path) -> None:
    run("regions", "create", "--device", "bar0", "--length", "4KiB", "--name", "far", target="b")
    name = "nodes/b/regions/far"
    assert facts(run("regions", "show", name, "--json"))["name"] == name
    run("regions", "put", "-", f"{name}:0+3", stdin=b"far")
    assert run("regions", "get", f"{name}:0+3", "-").stdout_bytes == b"far"
    run("regions", "delete", "far", target="b")


def test_a_transfer_and_its_trace(run: Run, region: str) -> None:
    run("regions", "put", "-", region, stdin=b"hello")
    run("transfer", f"{region}:0+5", f"{region}:512KiB+5")
    done = facts(run("transfer", f"{region}:0+5", f"{region}:8+5", "--checksum", "--fabric", "local", "--json"))
    assert (done["state"], done["bytes_done"], done["fabric"], done["error"]) == ("SUCCEEDED", 5, "local", None)
    assert run("regions", "get", f"{region}:8+5", "-").stdout_bytes == b"hello"
    assert done["name"] in [transfer["name"] for transfer in facts(run("transfers", "--json"))["transfers"]]
    heads, *rows = run("transfers").stdout.splitlines()
    assert heads.split()[-1] == "OWNER"
    (row,) = [row.split() for row in rows if done["name"] in row]
    assert row[-1] == done["owner"]
    assert facts(run("transfers", "--running", "--json")) == {"transfers": []}
    assert facts(run("cancel", done["name"].split("/")[-1], "--json"))["state"] == "SUCCEEDED"
    assert run("cancel", "none", code=4).stderr.endswith("(TRANSFER_NOT_FOUND)\n")


def test_two_names_of_other_nodes_are_enough(run: Run, region: str) -> None:
    made = facts(run("regions", "create", "--device", "bar0", "--length", "1MiB", "--json", target="b"))
    assert facts(run("transfer", made["name"], region, "--json"))["direction"] == "PULL"
    assert facts(run("transfer", region, made["name"], "--json", target="b"))["direction"] == "PULL"
    run("regions", "delete", made["name"], target="b")


def test_faults_have_their_codes(run: Run, region: str) -> None:
    done = run("transfer", f"{region}:0+5", f"{region}:8+6", code=1)
    assert done.stderr.startswith("error: ")
    assert "SEGMENTS_MISMATCH" in done.stderr
    done = run("--json", "transfer", f"{region}:0+5", f"{region}:3+5", code=1)
    assert json.loads(done.stderr)["error"]["reason"] == "SEGMENTS_OVERLAP"
    run("regions", "create", "--device", "none", "--length", "1", code=4)
    run("node", "nodes/none", code=4)
    run("regions", "show", "Not-A-Name", code=2)


def test_bench(run: Run) -> None:
    words = ("bench", "--iterations", "3", "--sizes", "4KiB,64KiB", "--segments", "1,4")
    done = facts(run(*words, "nodes/a", "nodes/b", "--json"))
    assert [(row["size"], row["segments"], row["iterations"], row["fabric"]) for row in done["rows"]] == [
        (4096, 1, 3, "tcp"),
        (65536, 1, 3, "tcp"),
        (4096, 4, 3, "tcp"),
        (65536, 4, 3, "tcp"),
    ]
    assert all(0 < row["p50"] <= row["p99"] and row["bandwidth"] > 0 for row in done["rows"])
    assert done["round_trip"]["p50"] > 0
    assert "LIMITED BY" in run(*words).stdout
    assert facts(run("regions", "list", "--json")) == {"regions": []}


def test_bench_between_given_regions(run: Run, region: str) -> None:
    words = ("bench", region, "nodes/b/devices/bar0", "--iterations", "1", "--json")
    done = facts(run(*words, "--sizes", "4KiB,1GiB"))
    assert (done["source"], len(done["rows"]), done["skipped"]) == (region, 1, 1)
    run(*words, "--sizes", "1GiB", code=2)
    run("bench", "nodes/b/devices/none", code=4)
    run("bench", "a/b/c", code=2)


def test_which_rule_of_a_policy_decides_about_a_region(run: Run, region: str, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(rule("boxes", "uid:7", "read", "devices = ['bar0']"))
    done = facts(run("policy", "explain", "uid:7", "read", region, "--file", str(policy), "--json"))
    assert (done["allowed"], done["rule"], done["tenant"]) == (True, "boxes", "uid:7")
    run("policy", "explain", "uid:8", "read", region, "--file", str(policy), code=5)
    run("policy", "explain", "uid:8", "read", "nodes/a/regions/none", "--file", str(policy), code=4)


def test_completion_offers_regions_and_devices(cluster: Cluster, region: str) -> None:
    def complete(line: str) -> str:
        words = {"_PEERMEMCTL_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        return CliRunner().invoke(tool, prog_name="peermemctl", env=words).output

    assert f"plain,{region}" in complete(f"peermemctl --target {cluster.target('a')} regions show nodes/a")
    assert "plain,bar0" in complete(f"peermemctl --target {cluster.target('a')} regions create --device b")


def _interruptible() -> None:
    """Be interrupted by SIGINT, which whoever started the tests in the background may have had ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_interrupt_cancels_the_transfer(cluster: Cluster, run: Run) -> None:
    words = ("regions", "create", "--device", "bar0", "--length", "400MiB", "--json")
    names = facts(run(*words))["name"], facts(run(*words, target="b"))["name"]
    with peermem.connect(cluster.target("a")) as node:
        before = len(list(node.transfers()))
        # Stopped, the destination's daemon keeps the transfer from ending before the interrupt.
        cluster.pause("b")
        asked = subprocess.Popen(
            [sys.executable, "-c", "from peermem.cli import main; main()", "--target", cluster.target("a"), "transfer"]
            + [f"{name}:0+400MiB" for name in names],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_interruptible,
        )
        try:
            eventually(lambda: len(list(node.transfers())) > before)
            asked.send_signal(signal.SIGINT)
        finally:
            cluster.resume("b")
        _, stderr = asked.communicate(timeout=60)
        assert (asked.returncode, stderr) == (130, "interrupted\n")
        assert next(node.transfers()).state in ("CANCELLED", "SUCCEEDED")
    run("regions", "delete", names[0])
    run("regions", "delete", names[1], target="b")
