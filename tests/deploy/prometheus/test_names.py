"""Every name of rules, cases, dashboard and pages is on the metrics page of a daemon that runs.

What only a NIC shows is looked for on a page that is made of a NIC's facts.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path as FilePath

import pytest
from deploy.grafana.dashboard import TARGET as DASHBOARD

from peermem.core.errors import Code, PeermemError
from peermem.core.node import NicPort
from peermem.core.plan import Direction
from peermem.core.types import FabricKind, Path
from peermem.telemetry.directory import DirectoryUse
from peermem.telemetry.metrics import OUTCOMES, Metrics
from peermem.telemetry.nics import _PORT_COUNTERS, NicUse
from tests.deploy.prometheus.files import ROOT, RUNBOOKS, cases, rules
from tests.deploy.prometheus.promql import TARGET, Pages, names
from tests.telemetry.test_metrics import SNAPSHOT

NICS = {
    "peermem_nic_works",
    "peermem_path_works",
    "peermem_nic_events_total",
    "peermem_directory_lease_remaining_seconds",
}
"""What only a NIC shows, beside node_exporter's names and objects of the verbs fabric; and, with etcd, its lease."""


def of(kind: type[Enum]) -> set[str]:
    return {member.value for member in kind}


VALUES: Mapping[str, set[str]] = {
    "code": {code.name for code in Code},
    "grpc_code": {code.name for code in Code},
    "reason": set(PeermemError.by_reason),
    "path": of(Path),
    "fabric": of(FabricKind),
    "direction": of(Direction),
    "outcome": set(OUTCOMES.values()),
    "counter": {"resp_remote_access_errors", "req_remote_access_errors"},
}
"""Values of labels from closed lists, which nothing here may have led to. The counters are mlx5's."""


@pytest.fixture(scope="module")
def nic_page() -> str:
    """A page with NICs, made in this process."""
    metrics = Metrics("1", node="a")
    leased = DirectoryUse("etcd", 0.0, True, False, 9.0, 1, 1, 1, 1, 1, 1, 1, 1, 1)
    metrics.observe(lambda: replace(SNAPSHOT, directory=leased))
    port = NicPort("mlx5_0/1", "ACTIVE", "InfiniBand", 8 * 50_000_000_000, 0, phys_state="LinkUp")
    counters = dict.fromkeys((*_PORT_COUNTERS, "out_of_sequence"), 1)
    metrics.observe_nics(lambda: [NicUse(port, counters)])
    asyncio.run(metrics.refresh())
    return metrics.render()[0].decode()


@pytest.fixture(scope="module")
def known(pages: list[str], nic_page: str) -> Pages:
    """All that there is, recorded series included."""
    found = Pages(*pages, "\n".join(_of_nics(nic_page)) + "\n")
    found.add_records(rules("record"))
    return found


def _of_nics(page: str) -> Iterator[str]:
    for line in page.splitlines():
        name = re.split("[ {]", line.removeprefix("# HELP ").removeprefix("# TYPE "))[0]
        if name in NICS or name.startswith(
            ("node_infiniband_", "peermem_verbs_objects", "peermem_directory_lease_remaining")
        ):
            yield line


def missing(known: Pages, queries: Mapping[str, str]) -> dict[str, list[str]]:
    found = {where: list(known.missing(query, VALUES)) for where, query in queries.items()}
    return {where: each for where, each in found.items() if each}


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ("peermem_regionz", "peermem_regionz"),
        ("rate(peermem_transfers_total{outcom='failed'}[5m])", "peermem_transfers_total{outcom}"),
        ("peermem_leases{kind=~'ttl|forever'}", 'peermem_leases{kind="forever"}'),
        ("sum by (kind, colour) (peermem_leases)", "label colour"),
        ("peermem_ready / on (node) peermem_ready", "label node"),
        ("instance:peermem_transfers:rate5m{outcome='failed'}", "instance:peermem_transfers:rate5m{outcome}"),
    ],
)
def test_what_is_not_there_is_noticed(known: Pages, query: str, wrong: str) -> None:
    assert list(known.missing(query, VALUES)) == [wrong]


def test_rules(known: Pages) -> None:
    queries = {rule.get("record") or rule["alert"]: rule["expr"] for rule in (*rules("record"), *rules("alert"))}
    assert missing(known, queries) == {}


def test_series_of_the_cases_have_all_their_labels(known: Pages) -> None:
    given = {each["series"] for case in cases() for each in case["input_series"]}
    for series in given:
        ((name, labels),) = names(series).series.items()
        assert name in known.series.keys() | {"up"}, series
        assert labels.keys() - {"rack"} | TARGET == known.series[name].keys() | TARGET, series  # a site's own


def test_dashboard(known: Pages) -> None:
    text = json.loads(DASHBOARD.read_text())
    queries = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in text["panels"]
        for target in panel.get("targets", ())
        if not target["expr"].startswith("sum by (alertname, severity) (ALERTS{")  # Prometheus' own
    }
    assert len(queries) > 50
    assert missing(known, queries) == {}


def test_legends_and_hidden_columns_of_the_dashboard_are_labels(known: Pages) -> None:
    labels = {label for series in known.series.values() for label in series} | TARGET | {"__name__", "le"}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels, panel["title"]


@pytest.mark.parametrize("page", sorted(RUNBOOKS.iterdir()), ids=lambda page: page.stem)
def test_runbooks(known: Pages, page: FilePath) -> None:
    text = " ".join(page.read_text().split())
    spans = re.findall(r"`((?:peermem|node|process|grpc)_[a-z0-9_]+(?:\{[^}]*\})?)`", text)
    assert missing(known, {span: span for span in spans}) == {}


def test_the_table_of_metrics_is_that_of_the_pages(known: Pages) -> None:
    cells = r"^\| `(\w+)` \| (\w+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$"
    rows = re.findall(cells, (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    listed = {name: (kind, set(re.findall("`(.+?)`", labels))) for name, kind, labels, _, _ in rows}
    there = {name: (kind, _labels(known, name, kind)) for name, kind in known.families.items()}
    assert listed == there
    assert all(unit.strip() and meaning.strip().endswith(".") for *_, unit, meaning in rows)


def _labels(known: Pages, name: str, kind: str) -> set[str]:
    return set(known.series[f"{name}_count" if kind == "histogram" else name])
