"""A real Prometheus scrapes two real daemons: the project's own queries return the bandwidth that a client saw.

Both sides are compared over the same time, from one scrape to another, however fast this machine is just then.
"""

from __future__ import annotations

import json
import shutil
import time
from bisect import bisect_left
from collections.abc import Iterator

import pytest
from bench.daemons import Daemon
from deploy.grafana.dashboard import TARGET as DASHBOARD

import peermem
from tests.deploy.prometheus.files import MISSING_PROMETHEUS, rules
from tests.deploy.prometheus.server import Prometheus, Sample, eventually, prometheus

pytestmark = pytest.mark.skipif(not shutil.which("prometheus"), reason=MISSING_PROMETHEUS)

EVERY = "500ms"
WINDOW = 8
"""Seconds over which bandwidth is taken."""
LOAD = 10.0
"""Seconds that bytes move."""
CLOSE = 0.05
EMPTY = {
    "Alerts that fire",
    "Transfers that fail",
    "Failures by reason",
    "Staged bytes",
    "Staged share by device",
    "Device and NIC pairs that work",
    "What each pair of device and NIC did in its last trial",
    "Utilisation",
    "Bytes",
    "Ports",
    "Errors of ports",
    "What else drivers count",
    "Verbs objects",
    "Remote accesses that NICs refused",
    "Loads and stores that end",
    "Calls",  # the client has one, which has not ended
    "Calls that failed",
}
"""Panels that are empty where there is no NIC and nothing fails."""
BYTES = 'peermem_transfer_bytes_total{instance="b", device="bar0", direction="push", fabric="tcp", path="HOST"}'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, pair: dict[str, Daemon]) -> Iterator[Prometheus]:
    with prometheus(tmp_path_factory.mktemp("prometheus"), pair, EVERY) as running:
        eventually(lambda: running.value("sum(up)", time.time()) == 2, "both daemons were not scraped")
        yield running


@pytest.fixture(scope="module")
def moved(server: Prometheus, pair: dict[str, Daemon]) -> list[Sample]:
    """What a client saw: when a transfer ended, and how many bytes had been moved by then."""
    with (
        peermem.connect(pair["a"].target) as a,
        peermem.connect(pair["b"].target) as b,
        a.create_region(device="bar0", length="4MiB") as here,
        b.create_region(device="bar0", length="4MiB") as there,
    ):
        b.transfer(there, here).wait("30s")  # the link is opened, and memory is there
        seen = [(time.time(), float(here.length))]
        while seen[-1][0] < seen[0][0] + LOAD:
            b.transfer(there, here).wait("30s")
            seen.append((time.time(), seen[-1][1] + here.length))
    eventually(
        lambda: server.samples(BYTES, 30, time.time())[-2][0] > seen[-1][0], "the end of the load was not scraped"
    )
    return seen


def panel(title: str) -> str:
    """Return the query of the panel with this title."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    (found,) = [each for each in panels if each["title"] == title and each["type"] != "row"]
    return panel_query(found["targets"][0]["expr"])


def panel_query(query: str) -> str:
    """Return a query with the values of a dashboard's variables that show everything."""
    values = {"$cluster": ".*", "$job": ".+", "$instance": ".+", "$__rate_interval": f"{WINDOW}s"}
    for variable, value in values.items():
        query = query.replace(variable, value)
    return query


def record(name: str) -> str:
    """Return the expression of a recording rule."""
    (found,) = [rule["expr"] for rule in rules("record") if rule["record"] == name]
    return str(found)


def at(moved: list[Sample], when: float) -> float:
    """Return how many bytes the client had seen move by a time, between two ends of transfers in proportion."""
    after = bisect_left(moved, (when, 0.0))
    (start, low), (end, high) = moved[after - 1], moved[after]
    return low + (high - low) * (when - start) / (end - start)


@pytest.mark.parametrize("title", ["Bandwidth", "Bandwidth by fabric and path", "Bandwidth by node"])
def test_the_dashboard_shows_the_bandwidth_that_a_client_saw(
    server: Prometheus, moved: list[Sample], title: str
) -> None:
    during = [when for when, _ in server.samples(BYTES, 60, time.time()) if moved[0][0] < when < moved[-1][0]]
    last = during[-1]
    first = next(when for when in during if when >= last - WINDOW)
    saw = (at(moved, last) - at(moved, first)) / (last - first)
    series = server.get("query", query=panel(title), time=last)["result"]
    assert sum(float(each["value"][1]) for each in series) == pytest.approx(saw, rel=CLOSE)


def test_the_recorded_bandwidth_adds_up_to_the_bytes_that_the_client_moved(
    server: Prometheus, moved: list[Sample]
) -> None:
    """Of 5 minutes the daemons have lived some seconds: their rate, times 5 minutes, is what has moved since."""
    scraped = server.samples(BYTES, 300, time.time())
    assert scraped[0][1] == 0
    rule = record("instance_fabric_path:peermem_transfer_bytes:rate5m")
    found = server.get("query", query=rule, time=scraped[-1][0])["result"]
    (rate,) = [each["value"][1] for each in found if each["metric"]["instance"] == "b" and float(each["value"][1])]
    assert float(rate) * 300 == pytest.approx(moved[-1][1], rel=CLOSE)


def test_what_is_recorded_is_what_the_rules_say(server: Prometheus, moved: list[Sample]) -> None:
    name = "job:peermem_transfer_bytes:rate5m"
    when, value = server.samples(name, 10, time.time())[-1]
    assert value * 300 == pytest.approx(moved[-1][1], rel=2 * CLOSE)  # from a time between two scrapes
    assert server.value(record(name), when) == pytest.approx(value, rel=CLOSE)


def test_no_rule_fails_on_real_pages(server: Prometheus, moved: list[Sample]) -> None:
    def evaluated() -> list[dict[str, str]]:
        groups = server.get("rules")["groups"]
        found = [rule for group in groups for rule in group["rules"]]
        return found if all(rule["health"] != "unknown" for rule in found) else []

    found = eventually(evaluated, "not every rule was evaluated")
    assert len(found) == len(rules("record")) + len(rules("alert"))
    assert {rule["name"]: rule["lastError"] for rule in found if rule["health"] != "ok"} == {}
    assert moved


def test_daemons_that_are_well_raise_no_alert(server: Prometheus, moved: list[Sample]) -> None:
    alerts = server.get("alerts")["alerts"]
    assert moved
    assert [alert["labels"] for alert in alerts if alert["state"] == "firing"] == []


def test_every_panel_has_something_to_show_but_what_needs_a_nic_or_a_fault(
    server: Prometheus, moved: list[Sample]
) -> None:
    empty = set()
    for each in json.loads(DASHBOARD.read_text())["panels"]:
        queries = [panel_query(target["expr"]) for target in each.get("targets", ())]
        if queries and not any(server.get("query", query=query, time=moved[-1][0])["result"] for query in queries):
            empty.add(each["title"])
    assert empty - EMPTY == set()
