"""What monitoring in Kubernetes gets: objects of the Prometheus operator and the dashboard, rendered by kustomize.

Kubernetes' schemas don't know the operator's objects. `SCHEMAS` holds what these use of them, field by field after the
operator's own definitions (0.84): whatever else is in them is refused.
"""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.manifests import K8S, Manifest, container, find, render

DURATION = "^(0|(([0-9]+)y)?(([0-9]+)w)?(([0-9]+)d)?(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?(([0-9]+)ms)?)$"
TEXT, TEXTS = {"type": "string"}, {"type": "object", "additionalProperties": {"type": "string"}}
TIME = {"type": "string", "pattern": DURATION}


def table(required: str = "", **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def some(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


METADATA = table("name namespace", name=TEXT, namespace=TEXT, labels=TEXTS)
SCHEMAS = {
    "PodMonitor": table(
        "selector podMetricsEndpoints",
        jobLabel=TEXT,
        selector=table("matchLabels", matchLabels=TEXTS),
        podMetricsEndpoints=some(
            table(
                "port",
                port=TEXT,
                path=TEXT,
                interval=TIME,
                scrapeTimeout=TIME,
                relabelings=some(
                    table(
                        sourceLabels=some(TEXT),
                        targetLabel=TEXT,
                        regex=TEXT,
                        action={"enum": ["replace", "labeldrop"]},
                    )
                ),
            )
        ),
    ),
    "PrometheusRule": table(
        "groups",
        groups=some(
            table(
                "name rules",
                name={"type": "string", "minLength": 1},
                interval=TIME,
                rules=some(
                    table("expr", record=TEXT, alert=TEXT, expr=TEXT, labels=TEXTS, annotations=TEXTS)
                    | {"oneOf": [{"required": ["record"]}, {"required": ["alert"]}]}
                ),
            )
        ),
    ),
}
_RULE = SCHEMAS["PrometheusRule"]["properties"]["groups"]["items"]["properties"]["rules"]["items"]["properties"]
_RULE |= {"for": TIME, "keep_firing_for": TIME}


@pytest.fixture(scope="module")
def objects() -> list[Manifest]:
    return render(K8S / "monitoring")


def test_every_object_is_one_that_the_cluster_takes(objects: list[Manifest]) -> None:
    kinds = {each["kind"] for each in objects}
    assert kinds == {"PodMonitor", "PrometheusRule", "ConfigMap"}
    for each in objects:
        if each["kind"] in SCHEMAS:
            head = table("apiVersion kind metadata spec", metadata=METADATA, spec=SCHEMAS[each["kind"]])
            head["properties"] |= {"apiVersion": {"const": "monitoring.coreos.com/v1"}, "kind": TEXT}
            jsonschema.validate(each, head)
        else:
            assert kubernetes_validate.validate(each, "1.37", strict=True) == "1.37"


def test_rules_are_those_that_promtool_tests(objects: list[Manifest]) -> None:
    rules = yaml.safe_load((K8S.parent / "prometheus/peermem.rules.yaml").read_text())
    assert find(objects, "PrometheusRule")["spec"] == rules


def test_the_dashboard_is_whole_and_is_found_by_grafana(objects: list[Manifest]) -> None:
    dashboard = find(objects, "ConfigMap")
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(dashboard["data"]["peermem.json"]) == json.loads(
        (K8S.parent / "grafana/peermem.json").read_text()
    )
    assert len(json.dumps(dashboard)) < 250_000  # what `kubectl apply` can keep in an annotation


def test_the_monitor_finds_the_daemons(objects: list[Manifest]) -> None:
    monitor = find(objects, "PodMonitor")["spec"]
    daemon = find(render(K8S / "overlays/bare-metal"), "DaemonSet")
    labels = daemon["spec"]["template"]["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    assert labels[monitor["jobLabel"]] == "peermem"  # the job that rules and dashboard name
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in container(daemon)["ports"]}


def test_a_node_has_the_same_series_after_its_pod_was_replaced(objects: list[Manifest]) -> None:
    """Rules sum over `instance` alone, and look back a day."""
    (endpoint,) = find(objects, "PodMonitor")["spec"]["podMetricsEndpoints"]
    labels = {"__meta_kubernetes_pod_node_name": "worker-7", "job": "peermem", "namespace": "peermem"}
    labels |= {"pod": "peermemd-x7k2p", "container": "peermemd", "endpoint": "http"}  # the operator's own come first
    for step in endpoint["relabelings"]:
        if step.get("action") == "labeldrop":
            labels = {name: value for name, value in labels.items() if not re.fullmatch(step["regex"], name)}
        else:
            labels[step["targetLabel"]] = ";".join(labels[name] for name in step["sourceLabels"])
    kept = {name: value for name, value in labels.items() if not name.startswith("__")}
    assert kept == {"job": "peermem", "namespace": "peermem", "instance": "worker-7"}
