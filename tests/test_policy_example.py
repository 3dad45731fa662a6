"""The policy that operators start from."""

from __future__ import annotations

from pathlib import Path

from peermem.core.identity import ANONYMOUS, Subject
from peermem.core.policy import Action, Traits
from peermem.policy_file import PolicyTable, RuleTable, TenantTable, read

EXAMPLE = Path(__file__).parents[1] / "deploy" / "policy.toml"
USER = Subject("uid:1000", ("gid:100",))


def test_it_does_what_it_says() -> None:
    rules = read(EXAMPLE)
    assert rules.decide(USER, Action.CREATE, Traits("uid:1000", "memfd0")).rule == "users-make-regions"
    assert not rules.decide(USER, Action.CREATE, Traits("uid:1000", "gpu0")).allowed
    assert not rules.decide(ANONYMOUS, Action.CREATE, Traits("anonymous", "memfd0")).allowed
    there = USER.vouched_for("b")
    assert rules.decide(there, Action.WRITE, Traits("uid:1000", "gpu0")).rule == "users-are-the-same-everywhere"
    assert not rules.decide(there, Action.WRITE, Traits("uid:1001", "gpu0")).allowed
    assert rules.decide(there, Action.READ, Traits("uid:1001", "gpu0", {"published": "yes"})).allowed
    assert rules.decide_file(USER, Action.LOAD, "/data/models/x").allowed
    assert rules.tenant(USER).key == "users/uid:1000"


def test_it_shows_every_key() -> None:
    text = EXAMPLE.read_text()
    for table in (PolicyTable, RuleTable, TenantTable):
        for key in table.__struct_encode_fields__:
            assert f"\n{key} = " in text or f"[[{key}]]" in text, key
