"""The Kubernetes manifests, as the real kustomize renders them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

K8S = Path(__file__).resolve().parents[2] / "deploy" / "k8s"
KUBECTL = Path(sys.executable).with_name("kubectl")
FIELDS = {
    "status.hostIP": "10.0.0.7",
    "status.podIP": "10.1.0.9",
    "spec.nodeName": "worker-7",
    "metadata.name": "pod-0",
}
"""What the kubelet would put into a pod."""

Manifest = dict[str, Any]


def render(folder: Path) -> list[Manifest]:
    """Return the objects of a kustomization; raises AssertionError with what is wrong with it."""
    rendered = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert rendered.returncode == 0, rendered.stderr
    return list(yaml.safe_load_all(rendered.stdout))


def find(objects: list[Manifest], kind: str, name: str = "") -> Manifest:
    """Return the one object of this kind whose name begins so."""
    found = [each for each in objects if each["kind"] == kind and each["metadata"]["name"].startswith(name)]
    assert len(found) == 1, [each["metadata"]["name"] for each in found]
    return found[0]


def pod(workload: Manifest) -> Manifest:
    spec: Manifest = workload["spec"]["template"]["spec"]
    return spec


def container(workload: Manifest) -> Manifest:
    (only,) = pod(workload)["containers"]
    result: Manifest = only
    return result


def environment(workload: Manifest, fields: Mapping[str, str] = FIELDS) -> dict[str, str]:
    """Return a container's variables as the kubelet would set them, `$(NAME)` put in."""
    values: dict[str, str] = {}
    for variable in container(workload).get("env", []):
        if "valueFrom" in variable:
            values[variable["name"]] = fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        else:
            values[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda name: values[name[1]], variable["value"])
    return values
