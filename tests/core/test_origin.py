"""Which Slurm job or pod a control group is of."""

from __future__ import annotations

import pytest

from peermem.core.origin import Origin, parse_origin

POD = "0f3c2b1a-1234-4abc-9def-0123456789ab"
FLAT = POD.replace("-", "_")


@pytest.mark.parametrize(
    ("path", "origin"),
    [
        ("/system.slice/slurmstepd.scope/job_42/step_0/user/task_0", Origin(slurm_job="42")),
        ("/system.slice/node7_slurmstepd.scope/job_42/step_batch", Origin(slurm_job="42")),
        ("/slurm/uid_1000/job_7/step_0", Origin(slurm_job="7")),
        ("/slurm_node7/uid_1000/job_7", Origin(slurm_job="7")),
        ("/../../slurmstepd.scope/job_42/step_0", Origin(slurm_job="42")),
        (f"/kubepods/pod{POD}/abc", Origin(pod=POD)),
        (f"/kubepods/burstable/pod{POD}/abc", Origin(pod=POD)),
        (
            f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{FLAT}.slice/cri-containerd-abc.scope",
            Origin(pod=POD),
        ),
        (f"/kubepods.slice/kubepods-pod{FLAT}.slice", Origin(pod=POD)),
        (
            f"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/"
            f"kubelet-kubepods-burstable-pod{FLAT}.slice/x",
            Origin(pod=POD),
        ),
        (f"/../../kubepods-burstable.slice/kubepods-burstable-pod{FLAT}.slice/x", Origin(pod=POD)),
        (f"/../pod{POD}/x", Origin(pod=POD)),
        ("/", Origin()),
        ("/user.slice/user-1000.slice/user@1000.service/slurmstepd.scope/job_42", Origin()),
        (f"/user.slice/user-1000.slice/user@1000.service/kubepods/pod{POD}", Origin()),
        (f"/user.slice/kubepods-pod{FLAT}.slice", Origin()),
        ("/system.slice/slurmstepd.scope/job_x", Origin()),
        ("/system.slice/slurmd.service", Origin()),
        ("/system.slice/slurmstepd.scope/job_" + "1" * 30, Origin()),
    ],
)
def test_only_what_slurm_and_the_kubelet_make_tells(path: str, origin: Origin) -> None:
    assert parse_origin(f"0::{path}\n") == origin
    assert parse_origin(f"9:name=systemd:/\n1:cpu,cpuacct:{path}\n0::/\n") == origin


def test_a_job_that_nests_control_groups_stays_where_it_is() -> None:
    nested = f"0::/slurm/uid_1000/job_7/step_0/slurm/uid_0/job_8/kubepods/pod{POD}\n"
    assert parse_origin(nested) == Origin(slurm_job="7")


@pytest.mark.parametrize("text", ["", "\n", "nonsense", "1:2", ":::"])
def test_what_makes_no_sense_tells_nothing(text: str) -> None:
    assert parse_origin(text) == Origin()
