"""The runbook pages: their parts, and that the commands, options, events and pages that they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from peermem.cli import tool
from peermem.core.errors import Code, PeermemError
from tests.deploy.prometheus.files import ROOT, RUNBOOKS

PAGES = sorted(RUNBOOKS.iterdir())
HEADINGS = ["Who is hurt", "How to look", "How to mend it", "When it is false"]

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def spans(page: Path) -> list[str]:
    """Return what stands between backticks, on one line."""
    return re.findall(r"`([^`]+)`", " ".join(page.read_text().split()))


def command(words: list[str]) -> tuple[click.Command, list[str]]:
    """Return the command that words of a command line name, and the words behind its name."""
    found: click.Command = tool
    context = click.Context(tool)
    while isinstance(found, click.Group):
        inner = found.get_command(context, words[0])
        assert inner is not None, words
        found, words = inner, words[1:]
    return found, words


@pages
def test_a_page_has_its_parts(page: Path) -> None:
    text = page.read_text()
    assert text.startswith(f"# {page.stem}\n\n")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS
    assert all(part.strip() for part in re.split(r"^#.*$", text, flags=re.MULTILINE)[1:])
    assert max(map(len, text.splitlines())) <= 120


@pages
def test_commands_and_their_options_exist(page: Path) -> None:
    for span in spans(page):
        if not span.startswith("peermemctl "):
            continue
        asked, words = command(span.split()[1:])
        options = {word for option in asked.params for word in option.opts}
        assert {word for word in words if word.startswith("--")} <= options, span
        wanted = [each for each in asked.params if isinstance(each, click.Argument) and each.required]
        given = [word for word in words if not word.startswith("--")]
        assert len(given) >= len(wanted), span


@pages
def test_reasons_exist(page: Path) -> None:
    known = {*PeermemError.by_reason, *(code.name for code in Code), "LEGACY_PEER_MEMORY", "STAGED", "IPC_LOCK"}
    named = [span for span in spans(page) if re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+|STAGED", span)]
    assert [name for name in named if name not in known] == []


@pages
def test_options_of_the_configuration_exist(page: Path) -> None:
    options = set()
    table = ""
    for line in (ROOT / "deploy/peermem.toml").read_text().splitlines():
        if found := re.match(r"\[(\w+)\]$", line):
            table = found[1]
        elif found := re.match(r"(\w+) = ", line):
            options.add(f"{table}.{found[1]}")
    tables = {option.partition(".")[0] for option in options}
    named = {span for span in spans(page) if re.fullmatch(r"[a-z]+\.[a-z_]+", span)}
    assert {name for name in named if name.partition(".")[0] in tables} <= options


@pages
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pages
def test_log_events_exist(page: Path) -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "service/peermem").rglob("*.py"))
    events = [span for span in spans(page) if re.fullmatch(r"(policy|audit|rail|verbs)_[a-z_]+|_defect", span)]
    assert [event for event in events if f'{event}"' not in source] == []
