"""What the tool does without a daemon; with one, see tests/e2e."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from peermem.cli import tool


def run(*words: str) -> Result:
    return CliRunner().invoke(tool, words)


@pytest.fixture
def nowhere(tmp_path: Path) -> str:
    return f"unix://{tmp_path}/none.sock"


def test_help_lists_the_exit_codes() -> None:
    done = run("--help")
    assert done.exit_code == 0
    for line in ("3    the node can't be reached, or is shutting down", "130  interrupted"):
        assert line in done.output
        assert line in (import_module("peermem.cli").__doc__ or "")


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["regions", "create", "--device", "bar0", "--length", "64MB"],
        ["regions", "create", "--device", "bar0", "--length", "1", "--lease", "session"],
        ["regions", "list", "--label", "novalue"],
        ["transfer", "x:1", "y"],
        ["node", "--target", "nope"],
        ["node", "--timeout", "soon"],
        ["regions", "put", "/no/such/file", "x"],
    ],
)
def test_a_wrong_command_line_is_2(words: list[str]) -> None:
    assert run(*words).exit_code == 2


def test_a_daemon_that_is_not_there_is_3(nowhere: str) -> None:
    done = run("node", "--target", nowhere)
    assert (done.exit_code, done.stdout) == (3, "")
    assert done.stderr.startswith("error: The daemon at ")
    assert done.stderr.endswith("(NODE_UNREACHABLE)\n")


@pytest.mark.parametrize("before", [True, False])
def test_common_options_stand_before_or_after_the_command(nowhere: str, before: bool) -> None:
    common = ("--json", "--target", nowhere, "--timeout", "1s")
    done = run(*common, "regions", "list") if before else run("regions", "list", *common)
    assert done.exit_code == 3
    assert json.loads(done.stderr)["error"]["reason"] == "NODE_UNREACHABLE"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    done = run("completion", shell)
    assert done.exit_code == 0
    assert "_PEERMEMCTL_COMPLETE" in done.output


def test_completion_without_a_daemon_offers_nothing(nowhere: str) -> None:
    words = {"_PEERMEMCTL_COMPLETE": "bash_complete", "COMP_WORDS": f"peermemctl --target {nowhere} regions show n"}
    done = CliRunner().invoke(tool, prog_name="peermemctl", env={**words, "COMP_CWORD": "5"})
    assert (done.exit_code, done.output.strip(), done.stderr) == (0, "", "")


def test_version() -> None:
    done = run("version", "--json")
    assert list(json.loads(done.output)) == ["version"]
