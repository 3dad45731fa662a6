"""The policies of a run's daemons, and certificates of nodes and of a guest.

Rules of this file:

* Whether guests may read what is shared is all that changes. So what a job does is always allowed, and nothing else
  that is tried ever is.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.certificates import PATTERN, Authority
from tests.chaos.strangers import GUEST
from tests.policies import rule, tenant

QUOTA = 24
"""Regions of one user on one node."""
BROKEN = "[[rule]]\nname = "
"""A file that is just being written."""


def policy(*, guests_read: bool) -> str:
    """Return a policy."""
    quota = QUOTA if os.geteuid() == 0 else 2 * QUOTA  # all jobs are one user where they can't be several
    return (
        "root = false\n"
        + rule("jobs", "uid:*", "create", 'devices = ["bar0"]')
        + rule("jobs-everywhere", "uid:*@*", "read write manage", 'owners = ["namesake"]')
        + (rule("guests", GUEST, "read", 'labels = { shared = "yes" }') if guests_read else "")
        + tenant("jobs", "uid:* uid:*@*", f"each = true\nregions = {quota}\ntransfers = 200")
        + tenant("guests", GUEST, "weight = 1")
    )


OPEN = rule("all", "anyone anyone@*", "read write manage create")
"""A policy that is none."""


class Certificates:
    """Files of each node and of a guest, signed by an authority of the run's own."""

    def __init__(self, folder: Path, nodes: tuple[str, ...]) -> None:
        self.folder = folder
        self._authority = Authority()
        folder.mkdir()
        for node in nodes:
            self.renew(node)
        self._authority.issue(GUEST).write(folder / "guest")

    def renew(self, node: str) -> None:
        """Give a node another certificate."""
        self._authority.node(node).write(self.folder / node)

    def table(self, node: str) -> str:
        """Return the [tls] table of a node."""
        files = {"certificate": "cert.pem", "key": "key.pem", "ca": "ca.pem"}
        lines = [f'{name} = "{self.folder / node / file}"' for name, file in files.items()]
        return "\n".join(("[tls]", *lines, f'nodes = "{PATTERN}"'))
