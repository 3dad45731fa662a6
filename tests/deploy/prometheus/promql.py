"""What queries name: series, labels and values; and what there is on metrics pages for them to find."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import promql_parser
from prometheus_client.parser import text_string_to_metric_families

TARGET = frozenset({"cluster", "job", "instance"})
"""Labels that Prometheus gives each series of a target, or a site all of its series."""
_VARIABLES = {"$__rate_interval": "5m", "$__range": "1h", "$__interval": "1m"}
"""Grafana's, where a duration stands."""


def parsed(query: str) -> promql_parser.Expr:
    """Return the tree of a query, which may have Grafana's variables. Raises ValueError."""
    for variable, value in _VARIABLES.items():
        query = query.replace(variable, value)
    return promql_parser.parse(query)


@dataclass
class Names:
    """What a query names."""

    series: dict[str, dict[str, set[str]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))
    """Names of series, each with the labels that are matched and the values that these are asked for."""
    grouped: set[str] = field(default_factory=set)
    """Labels of by, without, on, ignoring and group_left."""


def names(query: str) -> Names:
    """Return all that a query names."""
    found = Names()
    for node in nodes(parsed(query)):
        if isinstance(node, promql_parser.VectorSelector):
            assert node.name, query
            matched = found.series[node.name]
            for matcher in node.matchers.matchers:
                matched[matcher.name] |= _values(matcher)
        elif isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            found.grouped |= set(node.modifier.labels)
        elif isinstance(node, promql_parser.BinaryExpr) and node.modifier is not None:
            matching = node.modifier.matching
            found.grouped |= set(matching.labels if matching is not None else ())
            found.grouped |= set(node.modifier.group_labels or ())
    return found


def nodes(tree: promql_parser.Expr) -> list[Any]:
    """Return each node of a tree once, those above others first."""
    found: list[Any] = []
    promql_parser.walk(tree, found.append)
    return [node for index, node in enumerate(found) if index == 0 or node is not found[index - 1]]


def _values(matcher: promql_parser.Matcher) -> set[str]:
    """Return the values that a matcher asks for or rules out; none where it holds a variable or is a real pattern."""
    if "$" in matcher.value:
        return set()
    return {value for value in matcher.value.split("|") if re.fullmatch(r"\w+", value)}


class Pages:
    """What metrics pages have: each sample's name with its labels, each label with its values."""

    def __init__(self, *pages: str) -> None:
        self.families: dict[str, str] = {}
        """Type of each family, by its name."""
        self.series: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for page in pages:
            for family in text_string_to_metric_families(page):
                if family.samples:
                    self.families[_family(family.name, family.type)] = family.type
                for sample in family.samples:
                    labels = self.series[sample.name]
                    for label, value in sample.labels.items():
                        labels[label].add(value)

    def add_records(self, rules: Iterable[Mapping[str, str]]) -> None:
        """Add what recording rules make, in order: what they are made of, less what is taken away."""
        for rule in rules:
            found = names(rule["expr"])
            labels = self.series[rule["record"]]
            for name in found.series:
                for label, values in self.series[name].items():
                    if label not in _taken_away(rule["expr"]):
                        labels[label] |= values

    def missing(self, query: str, values: Mapping[str, set[str]]) -> Iterator[str]:
        """Yield what a query names and nothing has. `values` are those that labels may have beside those seen."""
        found = names(query)
        known: set[str] = set(TARGET)
        for name, matched in found.series.items():
            if name not in self.series and name != "up":
                yield name
            known |= self.series[name].keys()
            for label, asked in matched.items():
                if label not in self.series[name].keys() | TARGET:
                    yield f"{name}{{{label}}}"
                elif label not in TARGET:
                    yield from (
                        f'{name}{{{label}="{value}"}}'
                        for value in asked - self.series[name][label] - values.get(label, set())
                    )
        yield from (f"label {label}" for label in found.grouped - known)


def _family(name: str, kind: str) -> str:
    return f"{name}_total" if kind == "counter" else name


def _taken_away(query: str) -> set[str]:
    tree = parsed(query)
    found: set[str] = set()
    for node in nodes(tree):
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            found |= set(node.modifier.labels)
        if isinstance(node, promql_parser.Call) and node.func.name == "histogram_quantile":
            found.add("le")
    return found
