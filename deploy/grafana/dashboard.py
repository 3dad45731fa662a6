"""Writes the dashboard: `make dashboard`. The JSON is committed, and a test sees that it is what this makes.

Rules of this file:

* Variables choose the data source, the cluster (a label of the site's, if it has one), the job and the nodes.
* Nothing of one Grafana is in it: no id, no data source of its own, no user.
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

from deploy.grafana.panels import SOURCE
from deploy.grafana.rows_jobs import OVERVIEW, PATHS, REGIONS, TRANSFERS
from deploy.grafana.rows_nodes import CONTROL, NICS, SECURITY
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard

ROWS = {
    "Fleet overview": OVERVIEW,
    "Transfers": TRANSFERS,
    "Path quality: direct or staged, and why": PATHS,
    "Regions and leases": REGIONS,
    "NIC ports": NICS,
    "Security": SECURITY,
    "Control plane": CONTROL,
}
"""From what a glance is for down to the daemon itself."""
TARGET = Path(__file__).with_name("peermem.json")


def text() -> str:
    """Return the dashboard as JSON."""
    made = (
        builders.Dashboard("peermem")
        .uid("peermem")
        .description("Device memory over RDMA: how fast, by which path, and why not by a better one.")
        .tags(["peermem", "rdma"])
        .readonly()
        .timezone("browser")
        .refresh("30s")
        .time("now-1h", "now")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .variables(
            [
                builders.DatasourceVariable("datasource").label("Data source").type("prometheus"),
                _labels("cluster", "Cluster", "peermem_build_info", all_value=".*"),
                _labels("job", "Job", 'peermem_build_info{cluster=~"$cluster"}', all_value=".+"),
                _labels("instance", "Instance", 'peermem_build_info{cluster=~"$cluster", job=~"$job"}', all_value=".+"),
                builders.TextBoxVariable("runbooks")
                .label("Runbooks at")
                .default_value("https://example.org/peermem/docs/runbooks"),
            ]
        )
    )
    ids = count(1)
    for title, panels in ROWS.items():
        made.with_row(builders.Row(title).id(next(ids)))
        for panel in panels:
            made.with_panel(panel.build().id(next(ids)))
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def _labels(name: str, label: str, series: str, all_value: str) -> builders.QueryVariable:
    everything = dashboard.VariableOption(selected=True, text="All", value="$__all")
    return (
        builders.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(f"label_values({series}, {name})")
        .multi(True)
        .include_all(True)
        .all_value(all_value)
        .current(everything)
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
    )


if __name__ == "__main__":
    TARGET.write_text(text())
    sys.stdout.write(f"{TARGET} is written.\n")
