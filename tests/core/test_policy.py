from __future__ import annotations

from peermem.core.identity import ANONYMOUS, ROOT, Subject
from peermem.core.patterns import DevicePattern, Folder, OwnerPattern, SubjectPattern
from peermem.core.policy import OPEN, OWN, Action, Decision, Rule, Rules, TenantRule, Traits
from peermem.core.quota import Limits

USER, OTHER = Subject("uid:1000", ("gid:100",)), Subject("uid:2000")
HIS = Traits("uid:1000", "memfd0", {"team": "a"})
DENIED = Decision(False, "built-in:deny")


def rule(name: str, *subjects: str, rights: str, **selectors: object) -> Rule:
    return Rule(
        name,
        tuple(map(SubjectPattern, subjects)),
        frozenset(map(Action, rights.split())),
        **selectors,  # type: ignore[arg-type]
    )


def test_nothing_is_allowed_but_what_is_ones_own() -> None:
    empty = Rules(())
    for action in (Action.READ, Action.WRITE, Action.MANAGE):
        assert empty.decide(USER, action, HIS) == Decision(True, "built-in:owner")
        assert empty.decide(OTHER, action, HIS) == DENIED
        assert empty.decide(USER.vouched_for("b"), action, HIS) == DENIED
        assert empty.decide(ANONYMOUS, action, Traits("anonymous", "memfd0")) == DENIED
    assert empty.decide(USER, Action.CREATE, HIS) == DENIED
    assert empty.decide_file(USER, Action.LOAD, "/data") == DENIED


def test_root_of_this_host_alone_may_do_everything_unless_the_policy_says_otherwise() -> None:
    assert Rules(()).decide(ROOT, Action.CREATE, HIS) == Decision(True, "built-in:root")
    assert Rules(()).decide_file(ROOT, Action.STORE, "/data").allowed
    assert not Rules(()).decide(ROOT.vouched_for("b"), Action.READ, HIS).allowed
    assert not Rules((), root=False).decide(ROOT, Action.READ, HIS).allowed


def test_the_first_rule_that_allows_is_named() -> None:
    rules = Rules(
        (
            rule("others", "uid:2000", rights="read write"),
            rule("first", "gid:100", rights="read"),
            rule("second", "uid:*", rights="read write"),
        )
    )
    assert rules.decide(USER, Action.READ, Traits("uid:3", "memfd0")) == Decision(True, "first")
    assert rules.decide(USER, Action.WRITE, Traits("uid:3", "memfd0")) == Decision(True, "second")


def test_a_rule_covers_regions_by_owner_labels_and_device() -> None:
    owners, devices = (OwnerPattern("uid:1000"),), (DevicePattern("memfd*"),)
    rules = Rules((rule("r", "uid:2000", rights="read", owners=owners, devices=devices, labels={"team": "a"}),))
    assert rules.decide(OTHER, Action.READ, HIS).allowed
    assert not rules.decide(OTHER, Action.WRITE, HIS).allowed
    assert not rules.decide(OTHER, Action.READ, Traits("uid:7", "memfd0", {"team": "a"})).allowed
    assert not rules.decide(OTHER, Action.READ, Traits("uid:1000", "gpu0", {"team": "a"})).allowed
    assert not rules.decide(OTHER, Action.READ, Traits("uid:1000", "memfd0", {"team": "b"})).allowed
    assert not rules.decide(OTHER, Action.READ, Traits("uid:1000", "memfd0")).allowed


def test_a_transfer_has_neither_device_nor_labels() -> None:
    transfer = Traits("uid:1000")
    on_devices = rule("r", "uid:2000", rights="manage", devices=(DevicePattern("*"),))
    labelled = rule("r", "uid:2000", rights="manage", labels={"team": "a"})
    assert not Rules((on_devices, labelled)).watched(OTHER)(transfer)
    admin = Rules((rule("r", "uid:2000", rights="manage", owners=(OwnerPattern("uid:*"),)),))
    assert admin.watched(OTHER)(transfer)
    assert not admin.watched(OTHER)(Traits("anonymous"))
    assert admin.watched(USER)(transfer)
    assert admin.watched(ANONYMOUS)(Traits("anonymous"))
    assert not Rules((rule("r", "uid:2000", rights="read write"),)).watched(OTHER)(transfer)


def test_who_may_do_anything_with_a_region_sees_it() -> None:
    rules = Rules((rule("r", "uid:2000", rights="write", labels={"team": "a"}), rule("c", "uid:3000", rights="create")))
    assert rules.eyes(OTHER)(HIS)
    assert rules.eyes(USER)(HIS)
    assert rules.eyes(ROOT)(HIS)
    assert not rules.eyes(Subject("uid:3000"))(HIS)
    assert not rules.eyes(OTHER)(Traits("uid:1000", "memfd0"))


def test_files_are_a_right_of_their_own() -> None:
    rules = Rules((rule("models", "uid:1000", rights="load read", files=(Folder("/data/models"),)),))
    assert rules.decide_file(USER, Action.LOAD, "/data/models/x") == Decision(True, "models")
    assert not rules.decide_file(USER, Action.STORE, "/data/models/x").allowed
    assert not rules.decide_file(USER, Action.LOAD, "/data/other").allowed
    assert not rules.decide_file(OTHER, Action.LOAD, "/data/models/x").allowed


def test_a_subject_falls_under_the_first_tenant_that_names_it() -> None:
    limits, each = Limits(regions=1), Limits(regions=2)
    rules = Rules(
        (),
        (
            TenantRule("team-a", (SubjectPattern("gid:100"),), limits, weight=3),
            TenantRule("users", (SubjectPattern("uid:*"),), each, each=True),
        ),
    )
    mine = rules.tenant(USER)
    assert (mine.key, mine.limits, mine.weight) == ("team-a", limits, 3)
    assert rules.tenant(USER) is mine
    assert (rules.tenant(OTHER).key, rules.tenant(OTHER).limits) == ("users/uid:2000", each)
    assert (rules.tenant(ANONYMOUS).key, rules.tenant(ANONYMOUS).limits) == ("anonymous", Limits())
    assert rules.tenant(USER.vouched_for("b")).key == "uid:1000@b"


def test_tenants_of_strangers_are_not_remembered_without_end() -> None:
    rules = Rules(())
    for number in range(10_000):
        rules.tenant(Subject(f"uid:{number}"))
    assert len(rules._known) <= 4096


def test_open_is_todays_rule() -> None:
    nobodys = Traits("anonymous", "memfd0")
    for subject in (ANONYMOUS, USER, ANONYMOUS.vouched_for("b"), USER.vouched_for("b")):
        for action in (Action.READ, Action.WRITE, Action.CREATE):
            assert OPEN.decide(subject, action, HIS).allowed
        assert OPEN.decide(subject, Action.MANAGE, nobodys).allowed
        assert OPEN.decide(subject, Action.MANAGE, HIS).allowed is (subject == USER)
        assert OPEN.decide_file(subject, Action.STORE, "/data").allowed
        assert OPEN.watched(subject)(Traits("uid:3"))


def test_where_it_is_not_open_everybody_has_ones_own() -> None:
    assert OWN.decide(USER, Action.CREATE, HIS) == Decision(True, "built-in:own")
    assert OWN.decide(USER, Action.WRITE, HIS) == Decision(True, "built-in:owner")
    assert not OWN.decide(OTHER, Action.READ, HIS).allowed
    assert not OWN.decide(ANONYMOUS, Action.CREATE, Traits("anonymous", "memfd0")).allowed
    assert not OWN.decide_file(USER, Action.LOAD, "/data").allowed
