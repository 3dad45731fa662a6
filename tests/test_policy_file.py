from __future__ import annotations

from pathlib import Path

import pytest

from peermem.core.identity import Subject
from peermem.core.policy import Action, Traits
from peermem.core.quota import Limits
from peermem.policy_file import read
from peermem.strict_toml import ConfigError

GOOD = """
root = false

[[rule]]
name = "team-a"
subjects = ["gid:100", "uid:1000@*"]
rights = ["read", "write", "create", "load"]
owners = ["mine", "uid:2000"]
labels = { team = "a" }
devices = ["gpu*"]
files = ["/data/models"]

[[tenant]]
name = "team-a"
subjects = ["gid:100"]
weight = 3
regions = 10
bytes = "1GiB"
transfers = 4
outstanding = "64MiB"
bytes_per_second = "100MiB"
requests_per_second = 50

[[tenant]]
name = "others"
subjects = ["anyone"]
each = true
"""
TENANT = """[[tenant]]
name = "t"
subjects = ["anyone"]
"""
RULE = '[[rule]]\nname = "r"\nsubjects = ["anyone"]\nrights = ["read"]\n'


def write(folder: Path, text: str) -> Path:
    file = folder / "policy.toml"
    file.write_text(text)
    return file


def problems(file: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(file)
    return [problem.removeprefix(f"{file}: ") for problem in caught.value.problems]


def test_a_policy_says_what_its_file_says(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    rules = read(file)
    assert (rules.root, rules.source) == (False, str(file))
    user = Subject("uid:7", ("gid:100",))
    traits = Traits("uid:2000", "gpu0", {"team": "a"})
    assert rules.decide(user, Action.READ, traits).rule == "team-a"
    assert not rules.decide(user, Action.MANAGE, traits).allowed
    assert not rules.decide(user, Action.READ, Traits("uid:2000", "gpu0")).allowed
    assert rules.decide_file(user, Action.LOAD, "/data/models/x").allowed
    mib = 1 << 20
    tenant = rules.tenant(user)
    assert (tenant.key, tenant.weight) == ("team-a", 3)
    assert tenant.limits == Limits(10, 1024 * mib, 4, 64 * mib, 100 * mib, 50)
    assert rules.tenant(Subject("uid:8")).key == "others/uid:8"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "rule is missing: a policy needs at least one [[rule]], else nobody could reach anything."),
        ("root = 1\n" + RULE, "root is 1: expected true or false."),
        ("rules = []\n" + RULE, "rules is no option; the nearest is rule."),
        (RULE + 'device = ["x"]', "rule[0].device is no option; the nearest is rule[0].devices."),
        (RULE + 'labels = "x"', "rule[0].labels is 'x': expected a table."),
        (RULE + "labels = { a = 1 }", "rule[0].labels.a is 1: expected a text."),
        (RULE + "owners = ['gid:7']", "rule[0].owners[0] is 'gid:7': expected \"mine\""),
        (RULE + "devices = ['GPU']", "rule[0].devices[0] is 'GPU': expected a device's name"),
        (RULE + "files = ['data']", "rule[0].files[0] is 'data': expected an absolute path"),
        (RULE.replace("read", "raed"), 'rule[0].rights[0] is \'raed\': expected one of "read", "write", "manage"'),
        (RULE.replace("anyone", "uid:x"), "rule[0].subjects[0] is 'uid:x': expected a subject: uid:NUMBER"),
        (RULE.replace('["anyone"]', '"anyone"'), "rule[0].subjects is 'anyone': expected a list, each a subject"),
        (RULE.replace('["anyone"]', "[]"), "rule[0].subjects is empty, so that it is for nobody. Name some subjects."),
        (RULE.replace('["read"]', "[]"), "rule[0].rights is empty, so that it gives nothing. Name some rights."),
        (RULE.replace('name = "r"', ""), "rule[0].name is missing: expected a name of 1 to 63"),
        (RULE.replace('"r"', '"a b"'), "rule[0].name is 'a b': expected a name of 1 to 63"),
        (RULE + RULE, 'rule has the name "r" more than once. Give each its own.'),
        (RULE.replace("read", "load"), 'rule[0].files is empty, while its rights have "load" or "store".'),
        (RULE + "files = ['/data']", 'rule[0].files is set, while its rights have neither "load" nor "store".'),
        (RULE + TENANT + "bytes = 'many'", "tenant[0].bytes is 'many': expected"),
        (RULE + TENANT + "bytes = true", "tenant[0].bytes is True: expected"),
        (
            RULE + TENANT + "bytes = '2000TiB'",
            "tenant[0].bytes is '2000TiB': exp",
        ),
        (
            RULE + TENANT + "bytes_per_second = 1",
            "tenant[0].bytes_per_second is 1: expected a size from 1MiB",
        ),
        (
            RULE + TENANT + "regions = -1",
            "tenant[0].regions is -1: expected a whole",
        ),
        (RULE + TENANT + "weight = 0", "tenant[0].weight is 0: expected a whole"),
        ("[[rule]\n", "line 1, column 7: this is not TOML: Expected ']]' at the end of"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    (problem,) = problems(write(tmp_path, text))
    assert problem.startswith(told)


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    assert len(problems(write(tmp_path, RULE.replace("read", "raed").replace("anyone", "uid:x")))) == 2


def test_a_file_that_is_none(tmp_path: Path) -> None:
    assert problems(tmp_path / "none") == ["there is no such file. Write the policy there, or name another file."]
    assert problems(tmp_path) == ["it can't be read: Is a directory."]
    assert problems(tmp_path / "none" / "x") == ["there is no such file. Write the policy there, or name another file."]
    binary = tmp_path / "binary"
    binary.write_bytes(b"a = \xff")
    assert problems(binary) == ["it is not UTF-8 text, from byte 4 on."]
    large = tmp_path / "large"
    large.write_text("#" * (1 << 21))
    assert problems(large)[0].startswith("it has more than 1048576 bytes")


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert problems(loop) == ["it can't be read: Too many levels of symbolic links."]
