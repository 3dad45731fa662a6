"""Where a local job comes from: the Slurm job or the pod whose control group its process is in.

Rules of this file:

* Only a path that begins as Slurm or the kubelet begins theirs is believed: a job that may make control groups of its
  own makes them below the one that it is in.
* Pure; the text is that of /proc/PID/cgroup (cgroups(7)), as it looks from the daemon's own control group.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_UID = r"([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12})"
_OUTSIDE = r"(?:/\.\.)+"
"""Out of the control group that the daemon is confined to."""
_PODS = r"/(?:kubelet-)?kubepods[a-z.-]*"
_POD = re.compile(
    rf"(?:{_OUTSIDE}|(?:/kubelet(?:\.slice)?)?{_PODS})(?:{_PODS}|/burstable|/besteffort)*/(?:[a-z-]*-)?pod{_UID}(?:\.slice)?"
    r"(?:/|$)",
    re.ASCII,
)
_SLURM = re.compile(
    rf"(?:{_OUTSIDE})?(?:/system\.slice)?/(?:[A-Za-z0-9_.-]*slurmstepd\.scope|slurm(?:_[A-Za-z0-9_.-]+)?)"
    r"(?:/uid_[0-9]+)?/job_([0-9]{1,20})(?:/|$)",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Origin:
    """What started a process, as far as its control group tells."""

    slurm_job: str = ""
    """Number of the Slurm job; empty for none."""
    pod: str = ""
    """UID of the pod; empty for none."""


NOWHERE = Origin()


def parse_origin(text: str) -> Origin:
    """Return where a process comes from, by the content of its /proc/PID/cgroup."""
    paths = [line.split(":", 2)[2] for line in text.splitlines() if line.count(":") >= 2]
    job, pod = (next((found[1] for path in paths if (found := form.match(path))), "") for form in (_SLURM, _POD))
    return Origin(job, pod.replace("_", "-"))
