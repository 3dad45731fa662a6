"""The rules: what promtool says, that none lacks a case of each kind, and what the alerts say of themselves."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.deploy.prometheus.files import CASES, FOLDER, MISSING_PROMTOOL, RULES, RUNBOOKS, cases, rules

ALERTS = {rule["alert"]: rule for rule in rules("alert")}
RECORDS = {rule["record"]: rule for rule in rules("record")}

needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason=MISSING_PROMTOOL)


def promtool(*arguments: str) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_promtool_takes_the_rules() -> None:
    assert f"{len(ALERTS) + len(RECORDS)} rules found" in promtool("check", "rules", "--lint-fatal", str(RULES))


@needs_promtool
def test_every_case_holds() -> None:
    assert promtool("test", "rules", *map(str, CASES)).count("SUCCESS") == len(CASES)


def test_every_alert_has_a_case_that_fires_and_one_that_stays_silent() -> None:
    tried = Counter(
        (test["alertname"], bool(test["exp_alerts"])) for case in cases() for test in case.get("alert_rule_test", ())
    )
    assert tried == {(name, fires): 1 for name in ALERTS for fires in (True, False)}


def test_what_stays_silent_has_the_series_that_could_fire() -> None:
    series: dict[tuple[str, bool], set[str]] = {}
    for case in cases():
        for test in case.get("alert_rule_test", ()):
            given = {each["series"].partition("{")[0] for each in case["input_series"]}
            series[test["alertname"], bool(test["exp_alerts"])] = given
    for name in ALERTS:
        assert series[name, False] >= series[name, True], name


def test_every_recorded_series_has_a_case_with_and_one_without_it() -> None:
    tried = Counter(
        (test["expr"], bool(test["exp_samples"])) for case in cases() for test in case.get("promql_expr_test", ())
    )
    assert tried == {(name, there): 1 for name in RECORDS for there in (True, False)}


def test_recorded_names_say_level_metric_and_operations() -> None:
    for name in RECORDS:
        level, metric, operations = name.split(":")
        assert level.split("_")[0] in ("instance", "job"), name
        assert metric.startswith("peermem_"), name
        assert operations, name


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_bad_what_where_and_what_to_do(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"] in [{"severity": severity} for severity in ("critical", "warning", "info")]
    annotations = alert["annotations"]
    assert annotations.keys() == {"summary", "description", "runbook_url"}
    assert annotations["runbook_url"].endswith(f"}}}}/{name}.md")
    if name != "PeermemUnseen":  # there is no object
        assert "{{ $labels.instance }}" in annotations["summary"]
        assert "{{ $labels.instance }}" in annotations["description"]


def test_every_alert_has_its_page_and_every_page_its_alert() -> None:
    assert {page.stem for page in RUNBOOKS.iterdir()} == ALERTS.keys()


@needs_promtool
def test_promtool_takes_the_configuration_for_nodes_known_by_name() -> None:
    assert "1 rule files found" in promtool("check", "config", str(FOLDER / "prometheus.yaml"))


@needs_promtool
def test_promtool_takes_the_rest_of_the_configuration_for_kubernetes(tmp_path: Path) -> None:
    """Debian's is built without the discovery."""
    config = yaml.safe_load((FOLDER / "prometheus-kubernetes.yaml").read_text())
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "peermem"
    assert job.pop("kubernetes_sd_configs")[0]["role"] == "pod"
    (tmp_path / RULES.name).write_text(RULES.read_text())
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    assert "1 rule files found" in promtool("check", "config", str(tmp_path / "prometheus.yaml"))
