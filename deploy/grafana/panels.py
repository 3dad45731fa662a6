"""What a panel of the dashboard is, and how it becomes one of Grafana's.

Rules of this file:

* Each panel says what it shows, in a description, with a unit; its runbooks are a click away.
* A query's `@` stands for the matchers of the dashboard's variables, so that none lacks them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

MATCHERS = 'cluster=~"$cluster", job=~"$job", instance=~"$instance"'
SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
HEIGHT = 8

Builder = timeseries.Panel | stat.Panel | table.Panel | heatmap.Panel


class Kind(Enum):
    """How a panel draws."""

    LINES = "lines"
    STACK = "stack"
    NUMBER = "number"
    HEAT = "heat"
    TABLE = "table"


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel."""

    expr: str
    legend: str = ""
    exemplars: bool = False
    """Ask for the traces of single observations."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel."""

    title: str
    description: str
    unit: str
    queries: Sequence[Query]
    kind: Kind = Kind.LINES
    width: int = 8
    """Of 24 columns."""
    alerts: Sequence[str] = ()
    """Alerts whose runbooks it links to."""
    hidden: Sequence[str] = ()
    """Columns that a table leaves out."""

    def build(self) -> Builder:
        """Return it in Grafana's form, to be built."""
        panel = self._drawn()
        panel.title(self.title).description(self.description).unit(self.unit)
        panel.datasource(SOURCE).span(self.width).height(HEIGHT if self.kind is not Kind.NUMBER else HEIGHT // 2)
        panel.links([_runbook(alert) for alert in self.alerts])
        for letter, query in zip("ABCDEFGH", self.queries, strict=False):
            panel.with_target(self._target(query, letter))
        return panel

    def _drawn(self) -> Builder:
        match self.kind:
            case Kind.NUMBER:
                last = common_builders.ReduceDataOptions().calcs(["lastNotNull"])
                return stat.Panel().graph_mode(common.BigValueGraphMode.AREA).reduce_options(last)
            case Kind.HEAT:
                scale = common_builders.ScaleDistributionConfig().type(common.ScaleDistribution.LINEAR)
                return (
                    heatmap.Panel()
                    .calculate(False)
                    .color(heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme("Oranges"))
                    .y_axis(heatmap.YAxisConfig().unit(self.unit).scale_distribution(scale))
                )
            case Kind.TABLE:
                organize = dashboard.DataTransformerConfig(
                    id_val="organize", options={"excludeByName": dict.fromkeys(("Time", "Value", *self.hidden), True)}
                )
                return table.Panel().with_transformation(organize)
        lines = timeseries.Panel().min(0).fill_opacity(10).show_points(common.VisibilityMode.NEVER)
        if self.kind is Kind.STACK:
            lines.fill_opacity(40).stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
        return lines

    def _target(self, query: Query, letter: str) -> prometheus.Dataquery:
        target = prometheus.Dataquery().expr(query.expr.replace("@", MATCHERS)).ref_id(letter).datasource(SOURCE)
        target.legend_format(query.legend or "__auto")
        if self.kind is Kind.HEAT:
            target.format(PromQueryFormat.HEATMAP)
        if self.kind is Kind.TABLE:
            target.format(PromQueryFormat.TABLE).instant()
        else:
            target.range()
        if query.exemplars:
            target.exemplar(True)
        return target


def _runbook(alert: str) -> builders.DashboardLink:
    return (
        builders.DashboardLink(alert)
        .type(dashboard.DashboardLinkType.LINK)
        .url(f"${{runbooks}}/{alert}.md")
        .target_blank(True)
    )
