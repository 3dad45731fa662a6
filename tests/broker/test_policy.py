"""What a policy hides and refuses, and what ends when it changes, at the node that owns the region."""

from __future__ import annotations

import asyncio
import os

import pytest

from peermem.broker.regions import Region
from peermem.core import errors
from peermem.core.failpoints import turned_on
from peermem.core.grant import Wanted
from peermem.core.identity import ANONYMOUS, ROOT, Subject
from peermem.core.names import ChildName
from peermem.core.policy import OPEN, OWN, Action
from peermem.core.region import RegionRequest
from peermem.core.storage import Order
from peermem.core.transfer import State
from peermem.core.types import Rights
from tests.broker.conftest import hosts
from tests.broker.support import eventually, failure, outcome, start, whole
from tests.doubles import MIB, Host
from tests.policies import policy, rule

ANN, BEN, EVE = Subject("uid:1", ("gid:100",)), Subject("uid:2"), Subject("uid:3")
CREATE = rule("create", "uid:* uid:*@*", "create")


async def made(host: Host, subject: Subject, name: str, length: int = MIB, **labels: str) -> Region:
    return await host.broker.create_region(subject, None, RegionRequest(name, length, "bar0", "", labels, None))


def denials(host: Host, reason: str) -> str:
    page = host.metrics.render()[0].decode()
    return page.partition(f'peermem_authorization_denials_total{{reason="{reason}"}} ')[2].partition("\n")[0]


async def test_who_may_do_nothing_with_a_region_is_told_what_it_is_told_of_none(pair: list[Host]) -> None:
    a, _ = pair
    await a.broker.go_by(policy(CREATE + rule("readers", "uid:2", "read", "labels = { public = 'yes' }")))
    secret, public = await made(a, ANN, "secret"), await made(a, ANN, "public", public="yes")
    absent = ChildName("a", "regions", "absent")
    for subject, name in ((EVE, secret.name), (EVE, public.name), (BEN, secret.name), (ANONYMOUS, public.name)):
        told = []
        for each in (name, absent):
            for ask in (
                lambda: a.broker.seen_region(subject, each),  # noqa: B023
                lambda: a.broker.use_region(subject, each, Action.READ, 0, 1),  # noqa: B023
                lambda: a.broker.map_region(each, subject),  # noqa: B023
                lambda: a.broker.renew_leases(subject, [each]),  # noqa: B023
            ):
                with pytest.raises(errors.RegionNotFound) as caught:
                    ask()
                told.append((caught.value.message.replace(str(each), "it"), sorted(caught.value.metadata)))
            with pytest.raises(errors.RegionNotFound):
                await a.broker.delete_region(subject, each, force=True)
        assert len(set(map(str, told))) == 1
        assert name not in [region.name for region in a.broker.regions.page("", 10, {}, a.broker.eyes(subject))]
    assert denials(a, "region_hidden") == "20.0"
    assert a.broker.seen_region(BEN, public.name) is public
    with pytest.raises(errors.AccessDenied, match=r"belongs to uid:1; uid:2 may not write it. Ask as uid:1, or have"):
        a.broker.use_region(BEN, public.name, Action.WRITE, 0, 1)
    assert denials(a, "right_missing") == "1.0"
    assert len(a.broker.regions.page("", 10, {}, a.broker.eyes(ANN))) == 2
    assert len(a.broker.regions.page("", 10, {}, a.broker.eyes(ROOT))) == 2
    assert [each.name for each in a.broker.regions.page("", 10, {}, a.broker.eyes(BEN))] == [public.name]


async def test_what_may_be_made_and_where(pair: list[Host]) -> None:
    a, _ = pair
    await a.broker.go_by(policy(rule("r", "uid:1", "create", "devices = ['bar*']\nlabels = { team = 'a' }")))
    taken = await made(a, ANN, "taken", team="a")
    for subject, labels, told in (
        (EVE, {}, "uid:3 may not make regions on device bar0. Have the operator of nodes/a give it the right"),
        (ANN, {"team": "b"}, "uid:1 may not make regions labelled team=b on device bar0"),
    ):
        with pytest.raises(errors.AccessDenied, match=told):
            await made(a, subject, "taken", 4096, **labels)  # no word of the name that is taken
    with pytest.raises(errors.RegionExists):
        await made(a, ANN, "taken", 4096, team="a")
    assert denials(a, "device") == "2.0"
    assert taken.owner == "uid:1"


async def test_handed_in_memory_is_made_on_a_device_like_any_other(pair: list[Host]) -> None:
    a, _ = pair
    session = a.sessions.open(ANN, 1)
    for device, is_allowed in (("bar0", False), ("adopted", True)):
        await a.broker.go_by(policy(rule("r", "uid:1", "create", f"devices = ['{device}']")))
        fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
        os.truncate(fd, 4096)
        token = a.sessions.hand_in(session, fd)
        request = RegionRequest("x", 0, "", token, {}, None)
        if is_allowed:
            assert (await a.broker.create_region(ANN, session, request)).device.name == "adopted"
        else:
            with pytest.raises(errors.AccessDenied, match="on device adopted"):
                await a.broker.create_region(ANN, session, request)
            assert a.sessions.handed_in(session, token) == fd
    a.sessions.close(session)


async def test_the_owning_node_decides_for_the_client_of_another_one(pair: list[Host]) -> None:
    a, b = pair
    rules = CREATE + rule("r", "uid:1@a", "write", "owners = ['namesake']")
    for host in pair:
        await host.broker.go_by(policy(rules))
    mine, there, bens = await made(a, ANN, "x"), await made(b, ANN, "x"), await made(b, BEN, "y")
    assert (await outcome(await start(a, whole(mine, there), subject=ANN))).state is State.SUCCEEDED
    assert isinstance(await failure(await start(a, whole(mine, bens), subject=ANN)), errors.RegionNotFound)
    assert isinstance(await failure(await start(b, whole(there, mine), subject=ANN)), errors.RegionNotFound)
    link = next(iter(a.broker.links._links.values()))
    refusals: tuple[tuple[ChildName, Rights, type[errors.PeermemError] | None], ...] = (
        (there.name, Rights.WRITE, None),
        (there.name, Rights.READ, errors.AccessDenied),
        (bens.name, Rights.WRITE, errors.RegionNotFound),
    )
    for name, right, refusal in refusals:
        wanted = Wanted(name, right, ANN.vouched_for("a"), 0, 7)
        asked = b.broker.serving.acquire(link._link_id, b.broker.epoch, wanted)
        if refusal is None:
            assert (await asked).key.length == 7
        else:
            with pytest.raises(refusal):
                await asked


async def test_transfers_are_seen_by_their_owner_and_by_who_may_manage_them(pair: list[Host]) -> None:
    a, _ = pair
    await a.broker.go_by(policy(CREATE + rule("admins", "uid:2", "manage", "owners = ['uid:*']")))
    x, y = await made(a, ANN, "x"), await made(a, ANN, "y")
    a.local.hold = True
    running = await start(a, whole(x, y), subject=ANN)
    await eventually(lambda: a.local.held > 0)
    name = running.facts.name
    for subject in (ANN, BEN, ROOT):
        assert a.broker.seen_transfer(subject, name).owner == "uid:1"
    for subject in (EVE, ANONYMOUS, ANN.vouched_for("b")):
        with pytest.raises(errors.TransferNotFound, match="does not exist on nodes/a, or ended too long ago"):
            a.broker.seen_transfer(subject, name)
        with pytest.raises(errors.TransferNotFound):
            await a.broker.cancel_transfer(subject, name)
        assert not list(filter(a.broker.policy.sees_transfer(subject), a.broker.transfers.newest(running_only=False)))
    assert denials(a, "transfer_hidden") == "6.0"
    cancelling = asyncio.create_task(a.broker.cancel_transfer(BEN, name))
    await eventually(lambda: running.facts.state is State.FENCING)
    a.local.let_go()
    assert (await cancelling).state is State.CANCELLED


async def test_who_sees_all_transfers_may_not_cancel_them_all(pair: list[Host]) -> None:
    a, _ = pair
    x, y = await made(a, ANN, "x"), await made(a, ANN, "y")
    done = await outcome(await start(a, whole(x, y), subject=ANN))
    assert a.broker.seen_transfer(EVE, done.name) == done
    with pytest.raises(errors.AccessDenied, match="uid:3 may not manage it"):
        await a.broker.cancel_transfer(EVE, done.name)


async def test_a_new_policy_ends_the_grants_that_it_does_not_allow() -> None:
    async with hosts("a", "b") as (a, b):
        x, y = await made(a, ANONYMOUS, "x", 4 * MIB), await made(b, ANONYMOUS, "y", 4 * MIB)
        a.tcp.hold = True
        running = await start(a, whole(x, y))
        await eventually(lambda: a.tcp.held > 0)
        assert b.broker.serving.grant_count == 1
        await b.broker.go_by(OPEN)
        assert b.broker.serving.grant_count == 1
        await b.broker.go_by(OWN)
        assert b.broker.serving.grant_count == 0
        a.tcp.let_go()
        error = await failure(running)
        assert isinstance(error, errors.RegionDeleted)
        assert "the policy of its node hides it" in error.message
        await b.broker.go_by(OPEN)


async def test_a_grant_that_ends_slowly_keeps_no_other_one_open() -> None:
    async with hosts("a", "b") as (a, b):
        x, y = await made(a, ANONYMOUS, "x"), await made(b, ANONYMOUS, "y")
        await outcome(await start(a, whole(x, y)))
        link_id, serving = next(iter(a.broker.links))._link_id, b.broker.serving
        await eventually(lambda: serving.grant_count == 0)
        wanted = Wanted(y.name, Rights.READ, ANONYMOUS.vouched_for("a"), 0, 7)
        for _ in range(2):
            await serving.acquire(link_id, b.broker.epoch, wanted)
        gate, reached = asyncio.Event(), asyncio.Event()

        async def wait() -> None:
            reached.set()
            await gate.wait()

        with turned_on("grant.release", wait, times=1):
            going = asyncio.create_task(b.broker.go_by(OWN))
            await reached.wait()
            async with asyncio.timeout(5):
                await eventually(lambda: serving.grant_count == 1)
            assert not going.done()
            gate.set()
            await going
        assert serving.grant_count == 0


async def test_a_new_policy_ends_a_grant_that_is_being_made() -> None:
    async with hosts("a", "b") as (a, b):
        x, y = await made(a, ANONYMOUS, "x"), await made(b, ANONYMOUS, "y")
        gate, reached = asyncio.Event(), asyncio.Event()

        async def wait() -> None:
            reached.set()
            await gate.wait()

        with turned_on("grant.make", wait):
            running = await start(a, whole(x, y))
            await reached.wait()
            await b.broker.go_by(OWN)
            gate.set()
            assert type(await failure(running)) is errors.RegionNotFound
        assert b.broker.serving.grant_count == 0


async def test_a_new_policy_ends_what_uses_regions_of_this_node(pair: list[Host]) -> None:
    a, b = pair
    x, y = await made(a, ANONYMOUS, "x", 4 * MIB), await made(b, ANONYMOUS, "y", 4 * MIB)
    for host, (source, target) in ((a, (x, y)), (b, (x, y))):
        a.tcp.hold = b.tcp.hold = True
        running = await start(a, whole(source, target))
        await eventually(lambda: a.tcp.held > 0)
        await host.broker.go_by(policy(rule("r", "anonymous@* anonymous", "write" if host is a else "read")))
        a.tcp.let_go()
        assert isinstance(await failure(running), errors.AccessDenied)
        await host.broker.go_by(OPEN)


async def test_a_new_policy_ends_streams_of_bytes(pair: list[Host]) -> None:
    a, _ = pair
    x = await made(a, ANN, "x")
    with (
        a.broker.use_region(BEN, x.name, Action.READ, 0, 10) as theirs,
        a.broker.use_region(ANN, x.name, Action.READ, 0, 10) as mine,
    ):
        assert await theirs.read(0, 10) == bytes(10)
        await a.broker.go_by(OWN)
        with pytest.raises(errors.RegionNotFound):
            await theirs.read(0, 10)
        assert await mine.read(0, 10) == bytes(10)


async def test_only_the_files_of_a_rule_are_loaded(pair: list[Host]) -> None:
    a, _ = pair
    await a.broker.go_by(policy(rule("r", "uid:1", "load", "files = ['/data']")))
    for order, path in ((Order.LOAD, "/etc/passwd"), (Order.LOAD, "/data/../etc/passwd"), (Order.STORE, "/data/x")):
        with pytest.raises(errors.AccessDenied, match=f"uid:1 may not {order.value} "):
            a.broker.policy.check_file(ANN, order, path)
    a.broker.policy.check_file(ANN, Order.LOAD, "/data/x")
