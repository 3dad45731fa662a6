"""The files of deploy/prometheus, as tests read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deploy/prometheus"
RULES = FOLDER / "peermem.rules.yaml"
CASES = FOLDER / "peermem.rules.test.yaml", FOLDER / "peermem.rules.days.test.yaml"
RUNBOOKS = ROOT / "docs/runbooks"

MISSING_PROMTOOL = "promtool is not installed (Debian: prometheus)"
MISSING_PROMETHEUS = "prometheus is not installed (Debian: prometheus)"


def rules(kind: str) -> list[dict[str, Any]]:
    """Return all rules of a kind, `record` or `alert`."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def cases() -> list[dict[str, Any]]:
    """Return the cases of the rules."""
    return [case for file in CASES for case in yaml.safe_load(file.read_text())["tests"]]
