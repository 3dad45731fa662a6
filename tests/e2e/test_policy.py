"""A daemon with a policy file, asked by this user and by nobody in particular, while the file changes."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import pytest
from bench.daemons import Daemon, daemons

import peermem
from peermem import errors
from tests.e2e.conftest import DEVICE, check_log
from tests.e2e.support import MIB, eventually, metric
from tests.policies import rule, tenant

ME = f"uid:{os.getuid()}"
MINE = "root = false\n" + rule("me", ME, "create", "devices = ['bar*']")
GUESTS = rule("guests", "anonymous anonymous@*", "read", "labels = { public = 'yes' }")
FIELDS = {
    "timestamp": r"[0-9T:.-]+Z",
    "logger": "audit",
    "level": "info",
    "event": "decision",
    "outcome": "allowed|denied",
    "subject": rf"({ME}|anonymous)(@b)?",
    "action": "read|write|manage|create|see",
    "resource": r"nodes/[ab]/(regions|transfers|devices)/[a-z0-9-]+",
    "rule": "me|guests|built-in:owner|built-in:deny",
    "remote": r"unix:|attach|ipv4:127\.0\.0\.1:\d+",
    "pid": r"\d+",
    "call": "map|ExchangeGrants|PipelineTransfers|(Create|Get|Delete|Write|Read)Region|(Create|Get|Cancel)Transfer",
    "request": r"[0-9a-f-]*",
}


@dataclass
class Governed:
    """Node a, which has a policy and an audit log, and b, which is open."""

    a: Daemon
    b: Daemon
    policy: Path
    audit: Path
    mine: peermem.Node
    guest: peermem.Node

    def put(self, text: str) -> None:
        """Put another policy in its place, and have it read now."""
        fresh = self.policy.with_suffix(".new")
        fresh.write_text(text)
        fresh.rename(self.policy)
        os.kill(self.a.pid, signal.SIGHUP)

    def readiness(self) -> str:
        with build_opener(ProxyHandler({})).open(f"http://{self.a.http}/readyz", timeout=10.0) as page:
            text: str = page.read().decode()
            return text


@pytest.fixture
def governed(tmp_path: Path) -> Iterator[Governed]:
    policy, audit = tmp_path / "policy.toml", tmp_path / "audit.log"
    policy.write_text(MINE + GUESTS)
    environ = {"PEERMEM_POLICY_FILE": str(policy), "PEERMEM_AUDIT_FILE": str(audit)}
    with daemons(tmp_path, ("a", "b"), DEVICE) as nodes:
        nodes["a"].stop()
        nodes["a"].environ = environ
        nodes["a"].start()
        nodes["a"].ready()
        with peermem.connect(nodes["a"].target) as mine, peermem.connect(nodes["a"].grpc, attach=False) as guest:
            yield Governed(nodes["a"], nodes["b"], policy, audit, mine, guest)
        for daemon in nodes.values():
            assert daemon.stop() == 0
            check_log(daemon)


def test_a_policy_decides_and_is_read_again(governed: Governed) -> None:
    mine, guest = governed.mine, governed.guest
    hidden = mine.create_region(device="bar0", length=MIB)
    shown = mine.create_region(device="bar0", length=MIB, labels={"public": "yes"})
    shown.write(b"hello", 0)
    assert [region.name for region in guest.regions()] == [shown.name]
    assert guest.region(shown.name).read(0, 5) == b"hello"
    with pytest.raises(errors.RegionNotFound):
        guest.region(hidden.name).read(0, 5)
    with pytest.raises(errors.AccessDenied, match="anonymous may not write it"):
        guest.region(shown.name).write(b"x", 0)
    with pytest.raises(errors.AccessDenied, match="may not make regions on device bar0"):
        guest.create_region(device="bar0", length=MIB)

    governed.put("[[rule]]\nname = 'broken'")
    eventually(lambda: "its file is refused" in governed.readiness(), "the refusal")
    assert governed.readiness().startswith("ready\n")
    assert "rule[0].subjects is missing" in governed.readiness()
    assert metric(governed.a, "peermem_policy_reload_failures_total") == 1
    assert [region.name for region in guest.regions()] == [shown.name]

    governed.put(MINE + tenant("me", ME, "regions = 2"))
    eventually(lambda: governed.readiness() == "ready\n", "the new policy")
    assert list(guest.regions()) == []
    with pytest.raises(errors.QuotaExceeded, match="Tenant me holds 2 regions; 1 region more"):
        mine.create_region(device="bar0", length=MIB)
    assert metric(governed.a, "peermem_quota_rejections_total") == 1
    assert metric(governed.a, "peermem_authorization_denials_total") >= 3


def test_the_audit_log_holds_what_was_decided_and_no_secret(governed: Governed) -> None:
    mine, guest = governed.mine, governed.guest
    region = mine.create_region(device="bar0", length=MIB, labels={"public": "yes"})
    other = mine.create_region(device="bar0", length=MIB)
    assert bytes(region.map()[:1]) == b"\0"
    mine.transfer(region, other).wait()
    with peermem.connect(governed.b.target) as b:
        inbox = b.create_region(device="bar0", length=MIB)
        mine.transfer(region, inbox).wait()
        with pytest.raises(errors.RegionNotFound):
            b.transfer(region, inbox).wait()  # by a subject that only b vouches for
    with pytest.raises(errors.TransferNotFound):
        guest.cancel_transfer("nodes/a/transfers/t-000000000000")
    with pytest.raises(errors.AccessDenied):
        guest.region(region.name).delete()
    decisions = [json.loads(line) for line in governed.audit.read_text().splitlines()]
    for decision in decisions:
        assert set(decision) == set(FIELDS)
        for field, form in FIELDS.items():
            assert re.fullmatch(form, str(decision[field])), (field, decision[field])
    told = {(each["outcome"], each["subject"], each["action"], each["resource"], each["rule"]) for each in decisions}
    assert ("allowed", ME, "create", "nodes/a/devices/bar0", "me") in told
    assert ("allowed", ME, "read", region.name, "built-in:owner") in told
    assert ("denied", f"{ME}@b", "read", region.name, "built-in:deny") in told
    assert ("denied", "anonymous", "manage", region.name, "built-in:deny") in told
    assert {each["pid"] for each in decisions if each["subject"] == ME} == {os.getpid()}
    assert "decision" not in governed.a.log.read_text()
