"""A real Prometheus that scrapes real daemons, for one test."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

import yaml
from bench.daemons import Daemon, free_ports

from tests.deploy.prometheus.files import RULES

_OPENER = build_opener(ProxyHandler({}))
Sample = tuple[float, float]
"""When, in seconds since 1970, and how much."""


class Prometheus:
    """Asks a Prometheus."""

    def __init__(self, address: str) -> None:
        self._address = address

    def get(self, path: str, **parameters: str | float) -> Any:
        """Return the data of an answer."""
        url = f"http://{self._address}/api/v1/{path}?{urlencode(parameters)}"
        with _OPENER.open(url, timeout=10.0) as answer:
            return json.load(answer)["data"]

    def value(self, query: str, at: float) -> float:
        """Return the one value of a query at a time."""
        (found,) = self.get("query", query=query, time=at)["result"]
        return float(found["value"][1])

    def samples(self, series: str, seconds: int, at: float) -> list[Sample]:
        """Return what was scraped of one series within so many seconds before a time."""
        (found,) = self.get("query", query=f"{series}[{seconds}s]", time=at)["result"]
        return [(when, float(value)) for when, value in found["values"]]


def eventually(condition: Any, what: str, seconds: float = 30.0) -> Any:
    """Ask until something holds; return it."""
    end = time.monotonic() + seconds
    while True:
        try:
            if found := condition():
                return found
        except (URLError, OSError, ValueError):
            pass  # it is not up yet, or has no sample yet
        assert time.monotonic() < end, what
        time.sleep(0.1)


@contextmanager
def prometheus(folder: Path, nodes: Mapping[str, Daemon], every: str) -> Iterator[Prometheus]:
    """Run a Prometheus with the project's rules, each of them evaluated `every` so often, as daemons are scraped."""
    rules = yaml.safe_load(RULES.read_text())
    for group in rules["groups"]:
        group["interval"] = every
    (folder / RULES.name).write_text(yaml.safe_dump(rules))
    targets = [{"targets": [daemon.http], "labels": {"instance": node}} for node, daemon in nodes.items()]
    job = {"job_name": "peermem", "scrape_interval": every, "scrape_timeout": every, "static_configs": targets}
    config = {"rule_files": [RULES.name], "scrape_configs": [job]}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    command = [
        "prometheus",
        f"--config.file={folder}/prometheus.yaml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    log = folder / "log"
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, cwd=folder) as process:
        server = Prometheus(f"127.0.0.1:{port}")
        try:
            eventually(lambda: server.get("query", query="1"), f"Prometheus did not start: {folder}/log")
            yield server
        finally:
            process.terminate()
            process.wait(30.0)
