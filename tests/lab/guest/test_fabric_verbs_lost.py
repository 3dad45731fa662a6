"""A NIC is removed under a link. Runs in the initial namespace, from which the NIC is put back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

NIC, NETDEV, NAMESPACE = "rxe1b", "v1b", "n1"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    inside = ["ip", "netns", "exec", NAMESPACE]
    if NIC not in subprocess.run([*inside, "rdma", "link"], capture_output=True, text=True, check=True).stdout:
        subprocess.run([*inside, "rdma", "link", "add", NIC, "type", "rxe", "netdev", NETDEV], check=True)
        subprocess.run(["rdma", "dev", "set", NIC, "netns", NAMESPACE], check=True)


def test_a_link_lives_on_its_other_nic_and_one_without_another_ends() -> None:
    subprocess.run(
        ["ip", "netns", "exec", NAMESPACE, sys.executable, "-m", "tests.lab.guest.losing_nic", NIC],
        check=True,
        timeout=100,
    )
