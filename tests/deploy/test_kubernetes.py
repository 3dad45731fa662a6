"""The Kubernetes manifests, rendered by the real kustomize, held against Kubernetes' schemas, their configuration
read by the real daemon. None of it ran in a cluster.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import textwrap
from contextlib import AsyncExitStack
from functools import cache
from pathlib import Path

import kubernetes_validate
import pytest
from bench.daemons import daemons

import peermem
from peermem import errors
from peermem.app import App
from peermem.broker.ending import MARGIN
from peermem.config import Kubernetes, ListenAddress, Policy, load
from peermem.config_values import FilePath, HttpsUrl
from tests.api_server import FakeApiServer, token
from tests.certificates import Authority
from tests.deploy.manifests import K8S, Manifest, container, environment, find, pod, render
from tests.trusting import Node, free_ports

OVERLAYS = ("device-plugin", "dra", "bare-metal", "lab")
KUSTOMIZATIONS = (*(f"overlays/{name}" for name in OVERLAYS), "example", "example-lab")
RELEASES = ("1.34", "1.37")
SERVICE = K8S.parents[1] / "service"

overlays = pytest.mark.parametrize("overlay", OVERLAYS)


@cache
def objects(kustomization: str) -> list[Manifest]:
    return render(K8S / kustomization)


def daemon_set(overlay: str) -> Manifest:
    return find(objects(f"overlays/{overlay}"), "DaemonSet")


def checked(folder: Path, overlay: str, *, toml: str | None = None, **changes: str) -> subprocess.CompletedProcess[str]:
    """Have the daemon check the configuration of an overlay, as its container would get it."""
    config = folder / "peermem.toml"
    data = find(objects(f"overlays/{overlay}"), "ConfigMap", "peermem-")["data"]
    config.write_text(toml if toml is not None else data["peermem.toml"])
    if "policy.toml" in data:
        (folder / "policy.toml").write_text(data["policy.toml"])
        changes = {"PEERMEM_POLICY_FILE": str(folder / "policy.toml")} | changes
    workload = daemon_set(overlay)
    (argument,) = container(workload)["args"]
    return subprocess.run(
        [sys.executable, "-m", "peermem", argument.replace("/etc/peermem", str(folder)), "--check"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(SERVICE), **environment(workload), **changes},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
@pytest.mark.parametrize("release", RELEASES)
def test_every_object_fits_the_strict_schema(kustomization: str, release: str) -> None:
    found = [kubernetes_validate.validate(each, release, strict=True) for each in objects(kustomization)]
    assert found == [release] * len(found)


@overlays
def test_the_daemon_takes_its_configuration(overlay: str, tmp_path: Path) -> None:
    done = checked(tmp_path, overlay)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("PEERMEM_TCP_RAILS", "17", "PEERMEM_TCP_RAILS: tcp.rails is 17: expected a whole number from 1 to 16."),
        ("PEERMEM_GRPC_ADDRESS", "10.0.0.7:74700", "expected host:port with a port from 0 to 65535"),
        ("PEERMEM_NODE", "ip-10-0-0-1.ec2.internal", "expected 1 to 63 of a-z, 0-9 and -"),
        ("PEERMEM_PORT_7470_TCP", "tcp://10.0.0.1:7470", "PEERMEM_PORT_7470_TCP is no option"),
    ],
)
def test_a_value_that_can_t_be_is_refused_with_its_place(tmp_path: Path, variable: str, value: str, said: str) -> None:
    done = checked(tmp_path, "bare-metal", **{variable: value})
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_value_out_of_range_in_the_file_is_refused_with_its_place(tmp_path: Path) -> None:
    toml = find(objects("overlays/lab"), "ConfigMap", "peermem-")["data"]["peermem.toml"]
    done = checked(tmp_path, "lab", toml=toml.replace('size = "512MiB"', 'size = "1KiB"'))
    assert done.returncode == 2
    assert "device[0].size is '1KiB': expected a size from 4KiB to 1024TiB" in done.stderr


@overlays
def test_the_container_has_no_rights_but_those_that_are_named(overlay: str) -> None:
    spec, security = pod(daemon_set(overlay)), container(daemon_set(overlay))["securityContext"]
    assert security["privileged"] is (overlay == "bare-metal")
    assert security["allowPrivilegeEscalation"] is (overlay == "bare-metal")
    assert security["readOnlyRootFilesystem"] is True
    assert security["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert not spec.get("hostPID")


@overlays
def test_what_it_mounts_of_the_host_is_little(overlay: str) -> None:
    paths = {volume["hostPath"]["path"] for volume in pod(daemon_set(overlay))["volumes"] if "hostPath" in volume}
    assert paths == {"/run/peermem"} | ({"/dev/infiniband", "/dev/vfio"} if overlay == "bare-metal" else set())
    mounted = {mount["name"] for mount in container(daemon_set(overlay))["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod(daemon_set(overlay))["volumes"]}


@overlays
def test_each_node_has_one_daemon_on_its_network(overlay: str) -> None:
    workload, spec = daemon_set(overlay), pod(daemon_set(overlay))
    on_host = overlay != "dra"
    assert spec["hostNetwork"] is on_host
    assert spec["dnsPolicy"] == ("ClusterFirstWithHostNet" if on_host else "ClusterFirst")
    for port in container(workload)["ports"]:
        assert port.get("hostPort") == (port["containerPort"] if on_host else None)
    assert spec["tolerations"] == [{"operator": "Exists"}]
    assert spec["priorityClassName"] == "system-node-critical"
    assert workload["spec"]["updateStrategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0},
    }
    assert ("feature.node.kubernetes.io/rdma.available" in spec["nodeSelector"]) is (overlay != "lab")


@overlays
def test_manifest_and_configuration_agree(overlay: str, tmp_path: Path) -> None:
    assert checked(tmp_path, overlay).returncode == 0
    workload = daemon_set(overlay)
    config = load(tmp_path / "peermem.toml", environment(workload))
    ports = {port["name"]: port["containerPort"] for port in container(workload)["ports"]}
    assert config.grpc.address
    assert config.http.address
    served = {"grpc": config.grpc.address, "tcp": config.tcp.address, "http": config.http.address}
    assert {name: address.port for name, address in served.items()} == {name: ports[name] for name in served}
    assert {address.host for address in served.values()} == {"10.1.0.9" if overlay == "dra" else "10.0.0.7"}
    assert config.node == "worker-7"
    slowest = config.shutdown.grace + config.transfer.grant_ttl + 4 * MARGIN
    assert pod(workload)["terminationGracePeriodSeconds"] >= slowest
    memory = container(workload)["resources"]
    assert memory["limits"]["memory"] == memory["requests"]["memory"] == "2Gi"
    assert sum(device.size for device in config.devices if device.kind == "memfd") <= 1 << 30
    assert config.tls.on is (overlay != "lab")
    assert config.insecure_network is (overlay == "lab")
    if config.tls.on:
        assert config.policy.file == "/etc/peermem/policy.toml"
        assert config.grpc.token_address
        assert config.grpc.token_address.port == ports["tokens"]
        assert config.kubernetes.token == f"{mounted(workload, 'own-token')}/token"
        assert str(config.tls.workload_api).startswith(f"{mounted(workload, 'certificates')}/")


def mounted(workload: Manifest, volume: str) -> str:
    (mount,) = (mount for mount in container(workload)["volumeMounts"] if mount["name"] == volume)
    return str(mount["mountPath"])


@overlays
def test_health_is_asked_over_http(overlay: str) -> None:
    only = container(daemon_set(overlay))
    paths = {name: only[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}


@overlays
def test_no_pod_that_claims_nics_is_on_the_hosts_network(overlay: str) -> None:
    """DRANET lets none of them start: it would move the host's NICs away from the host, to the host."""
    if pod(daemon_set(overlay)).get("resourceClaims"):
        assert not pod(daemon_set(overlay))["hostNetwork"]


@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
def test_no_pod_gets_variables_that_the_daemon_does_not_know(kustomization: str) -> None:
    """Kubernetes makes PEERMEM_… variables of a Service whose name begins so, and the daemon refuses them."""
    for each in objects(kustomization):
        if each["kind"] in ("DaemonSet", "StatefulSet"):
            assert pod(each)["enableServiceLinks"] is False


@overlays
def test_it_may_ask_the_api_server_for_little(overlay: str) -> None:
    everything = objects(f"overlays/{overlay}")
    rules = [rule for each in everything if each["kind"] in ("ClusterRole", "Role") for rule in each["rules"]]
    may = {resource: set(rule["verbs"]) for rule in rules for resource in rule["resources"]}
    published = {"resourceslices": {"get", "create", "update", "delete"}, "nodes": {"get"}}
    assert may == {"tokenreviews": {"create"}} | (published if overlay == "dra" else {})
    account = find(everything, "ServiceAccount")["metadata"]
    for binding in (each for each in everything if each["kind"] == "ClusterRoleBinding"):
        (subject,) = binding["subjects"]
        assert (subject["name"], subject["namespace"]) == (account["name"], account["namespace"])


@overlays
def test_selectors_find_what_they_are_for(overlay: str) -> None:
    everything = objects(f"overlays/{overlay}")
    pods = [each["spec"]["template"]["metadata"]["labels"] for each in everything if "template" in each.get("spec", {})]
    for each in everything:
        selector = each.get("spec", {}).get("selector")
        if selector:
            wanted = selector.get("matchLabels", selector).items()
            assert sum(wanted <= labels.items() for labels in pods) == 1, each["metadata"]["name"]


@overlays
def test_the_members_of_etcd_know_each_other(overlay: str) -> None:
    members = find(objects(f"overlays/{overlay}"), "StatefulSet")
    (known,) = (word for word in container(members)["args"] if word.startswith("--initial-cluster="))
    names = [part.partition("=")[0] for part in known.removeprefix("--initial-cluster=").split(",")]
    assert names == [f"peermem-etcd-{number}" for number in range(members["spec"]["replicas"])]
    assert find(objects(f"overlays/{overlay}"), "Service", members["spec"]["serviceName"])


def test_a_change_of_the_configuration_makes_another_config_map(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    changed = tmp_path / "k8s/overlays/lab/peermem.toml"
    changed.write_text(changed.read_text().replace("20s", "25s"))
    names = [
        find(rendered, "ConfigMap", "peermem-")["metadata"]["name"]
        for rendered in (objects("overlays/lab"), render(tmp_path / "k8s/overlays/lab"))
    ]
    assert names[0] != names[1]
    volumes = pod(find(render(tmp_path / "k8s/overlays/lab"), "DaemonSet"))["volumes"]
    assert names[1] in [volume["configMap"]["name"] for volume in volumes if "configMap" in volume]


def test_nodes_can_go_by_the_names_of_their_hosts(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    kustomization = tmp_path / "k8s/overlays/lab/kustomization.yaml"
    kustomization.write_text(
        kustomization.read_text().replace("components:\n", "components:\n  - ../../components/host-names\n")
    )
    assert "PEERMEM_NODE" not in environment(find(render(kustomization.parent), "DaemonSet"))


@pytest.mark.parametrize("kustomization", ["example", "example-lab"])
def test_the_example_needs_no_rights(kustomization: str) -> None:
    job = find(objects(kustomization), "Job")
    namespace = find(objects(kustomization), "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert container(job)["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert pod(job)["securityContext"]["runAsNonRoot"] is True
    assert {volume["name"] for volume in pod(job)["volumes"]} == {
        mount["name"] for mount in container(job)["volumeMounts"]
    }
    audiences = [
        source["serviceAccountToken"]["audience"]
        for volume in pod(job)["volumes"]
        for source in volume.get("projected", {}).get("sources", ())
    ]
    assert audiences == (["peermem"] if kustomization == "example" else [])


def test_the_example_moves_a_region_between_two_nodes(tmp_path: Path) -> None:
    with daemons(tmp_path, ("a", "b"), '[[device]]\nname = "host0"\nsize = "64MiB"\n') as nodes:
        done = run_example(*(node.grpc for node in nodes.values()))
    assert done.returncode == 0, done.stderr
    assert "16777216 bytes over tcp" in done.stdout
    assert done.stdout.endswith(": the same\n")


async def test_the_example_moves_a_region_over_tls_with_a_token_by_the_policy(tmp_path: Path) -> None:
    """And who only mounts the node's sockets, be it as root, makes nothing."""
    authority = Authority()
    data = find(objects("overlays/bare-metal"), "ConfigMap", "peermem-")["data"]
    (tmp_path / "policy.toml").write_text(data["policy.toml"])
    ports = free_ports(4)
    made = []
    for name, port in zip("ab", ports, strict=False):
        (tmp_path / name).mkdir()
        made.append(Node(name, tmp_path / name, port, authority))
    async with FakeApiServer(tmp_path, authority).serving() as server, AsyncExitStack() as stack:
        table = Kubernetes(
            api_server=HttpsUrl(server.url), ca=FilePath(f"{tmp_path}/ca.pem"), token=FilePath(f"{tmp_path}/own")
        )
        targets = [f"127.0.0.1:{port}" for port in ports[2:]]
        for node, target in zip(made, targets, strict=True):
            config = node.config(
                {other.name: other.address for other in made if other is not node},
                token_address=ListenAddress(target),
                kubernetes=table,
                policy=Policy(file=FilePath(f"{tmp_path}/policy.toml")),
            )
            app = App(config)
            await app.start()
            stack.push_async_callback(app.stop)
        (tmp_path / "token").write_text(server.knows(token()))
        shown = {"CA": tmp_path / "a/tls/ca.pem", "TOKEN_FILE": tmp_path / "token", "SERVER": "peermem.test"}
        environ = {f"PEERMEM_CLIENT_{name}": str(value) for name, value in shown.items()}
        done = await asyncio.to_thread(run_example, *targets, **environ)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(": the same\n")
        with pytest.raises(errors.AccessDenied):
            await asyncio.to_thread(make_region, made[0])


def make_region(node: Node) -> None:
    with peermem.connect(node.target, attach=f"{node.folder}/attach.sock") as here:
        here.create_region(device="bar0", length=1)


def test_the_example_says_when_there_is_one_node_only() -> None:
    done = run_example("127.0.0.1:7470")
    assert done.returncode == 2
    assert "Two nodes are needed, and 127.0.0.1:7470 is 127.0.0.1:7470." in done.stderr


def run_example(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, K8S / "example/move.py", *words],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(SERVICE), **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_overlay_that_the_readme_shows_is_one(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    shown = (K8S.parent / "README.md").read_text().partition("```yaml\n")[2].partition("   ```")[0]
    (tmp_path / "k8s/mine").mkdir()
    (tmp_path / "k8s/mine/kustomization.yaml").write_text(textwrap.dedent(shown))
    daemon = find(render(tmp_path / "k8s/mine"), "DaemonSet")
    assert container(daemon)["image"] == "registry.example.com/peermem:0.1.0"
    assert environment(daemon)["PEERMEM_TLS_NODES"] == "spiffe://your.domain/peermem/{node}"
    assert environment(daemon)["PEERMEM_GRPC_ADDRESS"] == "10.0.0.7:7470"
