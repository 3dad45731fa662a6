"""The dashboard: that it is what the code makes, and the rules of Grafana's dashboard-linter.

None is left out. Some are held for every panel, where the linter looks at some kinds of panel only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import promql_parser
import pytest

from deploy.grafana import dashboard
from tests.deploy.prometheus.files import RUNBOOKS
from tests.deploy.prometheus.promql import nodes, parsed

DASHBOARD: dict[str, Any] = json.loads(dashboard.TARGET.read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
UNITS = {"short", "percentunit", "string", "bytes", "binBps", "s", "ops"}
"""Those in use, each of which Grafana knows (packages/grafana-data/src/valueFormats/categories.ts)."""
RATES = {"rate", "irate", "increase"}

panels = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])


def queries(panel: dict[str, Any]) -> Iterator[promql_parser.Expr]:
    for target in panel["targets"]:
        yield parsed(target["expr"])


def selectors(panel: dict[str, Any]) -> Iterator[promql_parser.VectorSelector]:
    for query in queries(panel):
        yield from (node for node in nodes(query) if isinstance(node, promql_parser.VectorSelector))


def test_the_json_is_what_the_code_makes() -> None:
    assert dashboard.TARGET.read_text() == dashboard.text(), "run `make dashboard`"


def test_it_belongs_to_no_grafana() -> None:
    assert DASHBOARD["uid"] == "peermem"
    assert DASHBOARD.get("id") is None
    assert "__inputs" not in DASHBOARD
    assert DASHBOARD["schemaVersion"] >= 38


def test_uneditable_dashboard_rule() -> None:
    assert DASHBOARD["editable"] is False


def test_template_datasource_rule() -> None:
    (source,) = [variable for variable in VARIABLES.values() if variable["type"] == "datasource"]
    assert (source["name"], source["label"], source["query"]) == ("datasource", "Data source", "prometheus")


@pytest.mark.parametrize("name", ["job", "instance"])
def test_template_job_and_instance_rules(name: str) -> None:
    variable = VARIABLES[name]
    assert variable["datasource"]["uid"] == "${datasource}"
    assert (variable["type"], variable["label"]) == ("query", name.title())
    assert (variable["multi"], variable["allValue"]) == (True, ".+")


@pytest.mark.parametrize("name", ["cluster", "job", "instance"])
def test_template_label_promql_and_reload_rules(name: str) -> None:
    found = re.fullmatch(r"label_values\((.+), (\w+)\)", VARIABLES[name]["query"])
    assert found
    assert found[2] == name
    assert parsed(found[1])
    assert VARIABLES[name]["refresh"] == 2


@panels
def test_panel_rules(panel: dict[str, Any]) -> None:
    assert panel["datasource"]["uid"] == "${datasource}"
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert panel["targets"]
    assert panel["type"] in {"timeseries", "stat", "heatmap", "table"}
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}


@panels
def test_target_promql_job_and_instance_rules(panel: dict[str, Any]) -> None:
    for selector in selectors(panel):
        matched = {matcher.name: (matcher.op, matcher.value) for matcher in selector.matchers.matchers}
        for name in ("cluster", "job", "instance"):
            assert matched[name] == (promql_parser.MatchOp.Re, f"${name}")


@panels
def test_target_rate_interval_rule(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        assert set(re.findall(r"\[([^]]+)\]", target["expr"])) <= {"$__rate_interval"}


@panels
def test_target_counter_agg_and_histogram_rules(panel: dict[str, Any]) -> None:
    for query in queries(panel):
        rated = {
            selector.name
            for call in nodes(query)
            if isinstance(call, promql_parser.Call) and call.func.name in RATES
            for selector in nodes(call)
            if isinstance(selector, promql_parser.VectorSelector)
        }
        for node in nodes(query):
            if isinstance(node, promql_parser.VectorSelector) and re.search(
                "_(total|bucket|sum|count)$", node.name or ""
            ):
                assert node.name in rated


def test_latencies_ask_for_exemplars() -> None:
    asked = {panel["title"] for panel in PANELS for target in panel["targets"] if target.get("exemplar")}
    assert asked == {"Latency", "Latency by fabric"}


def test_panels_have_ids_and_places_of_their_own() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for one, other in combinations([panel["gridPos"] for panel in DASHBOARD["panels"]], 2):
        apart_across = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_down = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_across or apart_down, (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in DASHBOARD["panels"])


def test_every_alert_is_linked_from_a_panel() -> None:
    links = [link["url"] for panel in PANELS for link in panel.get("links", ())]
    assert {link.removeprefix("${runbooks}/") for link in links} == {page.name for page in RUNBOOKS.iterdir()}


def test_the_rows_are_those_that_an_operator_looks_for() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == list(dashboard.ROWS)
    assert len(rows) == 7
