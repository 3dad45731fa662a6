"""The commands about policy files, without a daemon."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from peermem.cli import tool
from tests.policies import rule, tenant

POLICY = (
    rule("team-a", "gid:100 uid:1000@*", "read write", "owners = ['mine', 'uid:2000']\ndevices = ['gpu*']")
    + rule("models", "identified", "load", "files = ['/data/models']")
    + tenant("team-a", "gid:100", "regions = 4\nbytes = '64GiB'")
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "policy.toml"
    file.write_text(POLICY)
    return file


def run(*words: object) -> Result:
    return CliRunner().invoke(tool, list(map(str, words)), env={"PEERMEM_TARGET": "unix:///nowhere"})


def test_a_file_that_is_right(file: Path) -> None:
    done = run("policy", "check", file)
    assert done.exit_code == 0
    assert [line.split(":", 1)[1].strip() for line in done.stdout.splitlines()] == [
        str(file),
        "team-a,models",
        "team-a",
        "everything",
    ]
    assert json.loads(run("policy", "check", file, "--json").stdout) == {
        "file": str(file),
        "valid": True,
        "problems": [],
        "rules": ["team-a", "models"],
        "tenants": ["team-a"],
    }


def test_a_file_that_is_wrong(file: Path) -> None:
    file.write_text(POLICY.replace("gid:100", "gid:all") + "[other]\n")
    done = run("policy", "check", file)
    assert (done.exit_code, done.stdout) == (1, "")
    problems = done.stderr.splitlines()
    assert len(problems) == 3
    assert problems[0] == f"error: {file}: other is no option; the nearest is root."
    assert problems[1].startswith(f"error: {file}: rule[0].subjects[0] is 'gid:all': expected a subject: uid:NUMBER")
    done = run("policy", "check", file, "--json")
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert (told["valid"], len(told["problems"])) == (False, 3)
    assert run("policy", "check", file.parent).exit_code == 1


@pytest.mark.parametrize(
    ("words", "allowed", "decided_by"),
    [
        ("uid:7,gid:100 read --owner uid:2000 --device gpu0", True, "team-a"),
        ("uid:7,gid:100 read --owner uid:2000 --device memfd0", False, "built-in:deny"),
        ("uid:7,gid:100 manage --device memfd0", True, "built-in:owner"),
        ("uid:1000@b write --owner uid:2000 --device gpu0", True, "team-a"),
        ("uid:1000 write --owner uid:2000 --device gpu0", False, "built-in:deny"),
        ("uid:7 load --path /data/models/x", True, "models"),
        ("anonymous load --path /data/models/x", False, "built-in:deny"),
        ("uid:0 create --device gpu0 --label team=a", True, "built-in:root"),
    ],
)
def test_which_rule_decides(file: Path, words: str, allowed: bool, decided_by: str) -> None:
    done = run("policy", "explain", *words.split(), "--file", file, "--json")
    told = json.loads(done.stdout)
    assert (told["subject"], told["action"]) == tuple(words.split()[:2])
    assert (told["allowed"], told["rule"], done.exit_code) == (allowed, decided_by, 0 if allowed else 5)


def test_whose_limits_hold(file: Path) -> None:
    done = run("policy", "explain", "uid:7,gid:100", "create", "--device", "gpu0", "--file", file)
    assert done.exit_code == 5
    told = dict(line.split(":", 1) for line in done.stdout.splitlines())
    assert {key: value.strip() for key, value in told.items()} == {
        "subject": "uid:7,gid:100",
        "action": "create",
        "allowed": "no",
        "rule": "built-in:deny",
        "tenant": "team-a",
        "limits": "regions=4,bytes=64GiB",
    }


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("gid:100 read", "'gid:100' is no subject"),
        ("uid:* read", "'uid:*' is no subject"),
        ("root read", "'root' is no subject, such as uid:1000,gid:100 or uid:1000@b."),
        ("uid:7 see", "'see' is not one of"),
        ("uid:7 load", "A load or store needs --path, and nothing else takes it."),
        ("uid:7 read --path /x", "A load or store needs --path, and nothing else takes it."),
        ("uid:7 read --label x", "must be KEY=VALUE, each key once."),
    ],
)
def test_a_wrong_command_line_is_2(file: Path, words: str, told: str) -> None:
    done = run("policy", "explain", *words.split(), "--file", file)
    assert done.exit_code == 2
    assert told in done.stderr


def test_a_wrong_file_is_told(tmp_path: Path) -> None:
    done = run("policy", "explain", "uid:7", "read", "--file", tmp_path / "none")
    assert done.exit_code == 2
    assert "there is no such file" in done.stderr


def test_a_region_is_asked_of_the_daemon(file: Path) -> None:
    assert run("policy", "explain", "uid:7", "read", "nodes/a/regions/x", "--file", file).exit_code == 3


def test_completion_offers_commands_and_actions() -> None:
    def complete(line: str) -> str:
        words = {"_PEERMEMCTL_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        return CliRunner().invoke(tool, prog_name="peermemctl", env=words).output

    assert "plain,check\nplain,explain" in complete("peermemctl policy ")
    assert "plain,manage" in complete("peermemctl policy explain uid:7 m")
    assert "file," in complete("peermemctl policy check x")
