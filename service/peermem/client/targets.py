"""Where a daemon is: the target that a program names, and the attach socket beside it.

Rules of this file:

* The only place of the client that reads the environment, and only PEERMEM_TARGET and PEERMEM_CLIENT_....
* A target is `unix:///path` or `host:port`; anything else is refused with what was expected.
"""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath

from peermem.client.tls import Tls
from peermem.core.errors import InvalidField

TLS_VARIABLES = {
    "ca": "PEERMEM_CLIENT_CA",
    "certificate": "PEERMEM_CLIENT_CERTIFICATE",
    "key": "PEERMEM_CLIENT_KEY",
    "token": "PEERMEM_CLIENT_TOKEN",
    "server": "PEERMEM_CLIENT_SERVER",
}
"""For each field of Tls."""
DEFAULT = "unix:///run/peermem/peermem.sock"
VARIABLE = "PEERMEM_TARGET"

_ADDRESS = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}", re.ASCII)


def resolve(target: str | None) -> str:
    """Return the target to use: `target`, else PEERMEM_TARGET, else the default socket. Raises InvalidField."""
    # The one variable that the client reads: a job must be able to choose its daemon without code.
    chosen = target or os.environ.get(VARIABLE) or DEFAULT  # noqa: TID251
    if not re.fullmatch(r"unix:///.+", chosen) and not _ADDRESS.fullmatch(chosen):
        raise InvalidField(f"Target {chosen[:200]!r} must be unix:///PATH or HOST:PORT.", field="target")
    return chosen


def proof(tls: Tls | None, target: str) -> Tls | None:
    """Return what to show to a target: `tls`, else what PEERMEM_CLIENT_ variables name, else nothing.

    Raises InvalidField.
    """
    # as above: a job must be able to show its certificate or token without code
    named = {name: os.environ.get(variable, "") for name, variable in TLS_VARIABLES.items()}  # noqa: TID251
    chosen = tls if tls is not None else Tls(**{name: value for name, value in named.items() if value})
    if chosen == Tls():
        return None
    chosen.check(target)
    return chosen


def attach_path(target: str) -> str | None:
    """Return where the attach socket of a local daemon is; None for a daemon reached over TCP."""
    if not target.startswith("unix://"):
        return None
    return str(PurePosixPath(target.removeprefix("unix://")).with_name("attach.sock"))
