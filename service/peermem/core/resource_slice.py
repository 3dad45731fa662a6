"""What Kubernetes is told of a node's devices: a ResourceSlice (resource.k8s.io/v1) as plain data.

Rules of this file:

* Pure, and within the API's bounds: so many devices, and so many characters in a text.
* Devices are told about, not handed out: no driver prepares them for a pod, so that each has a taint that keeps claims
  away.
* A device's verdict is that of preflight: the best path by which bytes moved, the NICs by which they did, or none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peermem.core.node import ADOPTED, ADOPTED_DMABUF, DeviceFacts
from peermem.core.topology import PciFunction

DRIVER = "peermem"
API_VERSION, KIND = "resource.k8s.io/v1", "ResourceSlice"
MAX_DEVICES = 64
"""Of one slice in which devices have taints."""
_LONGEST = 64
"""Characters of an attribute's text."""
_TAINT = {"key": f"{DRIVER}/not-allocatable", "effect": "NoSchedule"}
_OF_JOBS = frozenset((ADOPTED, ADOPTED_DMABUF))
_STANDARD = "resource.kubernetes.io/"


def slice_name(node: str) -> str:
    """Return the name of a node's slice."""
    return f"{node}-{DRIVER}"


def slice_spec(node: str, devices: Iterable[DeviceFacts], functions: Mapping[str, PciFunction]) -> dict[str, Any]:
    """Return the spec for a node's own devices, without the pool's generation; memory that jobs handed in is none."""
    own = sorted((each for each in devices if each.name not in _OF_JOBS), key=lambda each: each.name)
    return {
        "driver": DRIVER,
        "nodeName": node,
        "pool": {"name": node, "resourceSliceCount": 1},
        "devices": [_device(each, functions.get(each.pci_address)) for each in own[:MAX_DEVICES]],
    }


def slice_object(node: str, uid: str, spec: Mapping[str, Any], generation: int, version: str = "") -> dict[str, Any]:
    """Return the object for a spec. It ends with the node of this UID; `version` is that of the object that it
    replaces."""
    owner = {"apiVersion": "v1", "kind": "Node", "name": node, "uid": uid, "controller": True}
    metadata = {"name": slice_name(node), "ownerReferences": [owner]}
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": metadata | ({"resourceVersion": version} if version else {}),
        "spec": {**spec, "pool": {**spec["pool"], "generation": generation}},
    }


def _device(facts: DeviceFacts, function: PciFunction | None) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "kind": _text(facts.kind),
        "path": _text(facts.path.value),
        "reached": {"bool": bool(facts.nics)},
    }
    if facts.nics:
        attributes["nics"] = _text(_joined(facts.nics))
    if function is not None:
        attributes[f"{_STANDARD}pcieRoot"] = _text(function.host_bridge)
        attributes[f"{_STANDARD}pciBusID"] = _text(function.address)
        if function.numa_node >= 0:
            attributes[f"{_STANDARD}numaNode"] = {"int": function.numa_node}
    return {
        "name": facts.name,
        "attributes": attributes,
        "capacity": {"memory": {"value": str(facts.size)}},
        "taints": [_TAINT],
    }


def _text(value: str) -> dict[str, str]:
    return {"string": value[:_LONGEST]}


def _joined(names: Sequence[str]) -> str:
    """Return as many whole names as there is room for, nearest first."""
    text = names[0]
    for name in names[1:]:
        if len(text) + 1 + len(name) > _LONGEST:
            break
        text += f" {name}"
    return text
