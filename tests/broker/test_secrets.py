"""Keys, and what names a link: in no repr, log, metric or error."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import pkgutil
import re
from collections.abc import Iterator

import pytest

import peermem
from peermem.core import errors
from peermem.core.failpoints import turned_on
from peermem.core.types import FabricKind, KeyPart, LinkAttributes, Ranges, RemoteKey
from peermem.fabric.base import Opcode, Status, WorkRequest
from tests.broker.conftest import hosts
from tests.broker.support import eventually, outcome, region, start, whole
from tests.doubles import MIB, Host

SECRETS = {"rkey", "secret", "token", "link_id"}
"""Fields that are named so are in no repr."""
NUMBER, ADDRESS = 0x5EC12E7_0F_2A11, 0xADD12E55_0F_2A11


def classes() -> Iterator[type]:
    """Every dataclass of the package."""
    for module in pkgutil.walk_packages(peermem.__path__, "peermem."):
        if not module.name.startswith("peermem.v1") and not module.name.endswith("__main__"):
            for thing in vars(importlib.import_module(module.name)).values():
                if isinstance(thing, type) and dataclasses.is_dataclass(thing) and thing.__module__ == module.name:
                    yield thing


def test_no_field_of_a_secrets_name_is_in_a_repr() -> None:
    found = [(cls, each) for cls in classes() for each in dataclasses.fields(cls) if each.name in SECRETS]
    assert len(found) >= 5, "the classes are there"
    shown = [(cls, each.name) for cls, each in found if each.repr and not re.search("Path|File", str(each.type))]
    assert shown == [], "where a secret is, as a path, may be told"


def spelled(number: int) -> set[str]:
    return {str(number), f"{number:x}", f"{number:X}"}


def is_in(text: str, secrets: set[str]) -> bool:
    return any(secret in text for secret in secrets)


def test_what_holds_a_key_does_not_show_it() -> None:
    key = RemoteKey(NUMBER, 4096, ((KeyPart(NUMBER, ADDRESS, 4096),),))
    attributes = LinkAttributes(FabricKind.TCP, 1, b"i" * 16, "a:1", b"s" * 32)
    request = WorkRequest(1, Opcode.READ, None, key, Ranges.single(0, 0, 1))  # type: ignore[arg-type]
    for thing in (key, request, attributes):
        assert not is_in(repr(thing), spelled(NUMBER) | spelled(ADDRESS) | {"iiii", "ssss"})


def secrets_of(host: Host) -> set[str]:
    """How the keys and links of a host's grants would be written."""
    found: set[str] = set()
    for grant in host.broker.serving._grants.values():
        found |= spelled(grant.key.rkey) | {grant.link_id.hex(), repr(grant.link_id)}
        assert not is_in(repr(grant), found)
    return found


def refuse() -> None:
    raise errors.NodeUnreachable("The failpoint says so.")


@pytest.mark.parametrize(
    "fault",
    [None, Status.REM_ACCESS_ERR, Status.REM_OP_ERR, Status.REM_INV_REQ_ERR, Status.WR_FLUSH_ERR, "slice.mend"],
)
async def test_nothing_that_a_transfer_says_shows_a_key(
    fault: Status | str | None, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    async with hosts("a", "b", retry_for=0.0) as (a, b):
        source, sink = await region(a, 2 * MIB), await region(b, 2 * MIB)
        a.tcp.hold = True
        transfer = await start(a, whole(source, sink), checksum=True)
        await eventually(lambda: a.tcp.held == 2)
        secrets = secrets_of(b)
        said += [repr(held) for link in a.broker.links._links.values() for held in link._held]
        if isinstance(fault, Status):
            a.tcp.statuses = [fault] * 4
        elif fault is not None:
            a.tcp.statuses = [Status.WR_FLUSH_ERR]
        with turned_on(fault if isinstance(fault, str) else "slice.mend", refuse, times=1):
            a.tcp.let_go()
            facts = await outcome(transfer)
        assert (facts.error is None) is (fault is None)
        said += [repr(facts), str(facts.error), repr(facts.error and facts.error.metadata)]
        said += [host.metrics.render()[0].decode() for host in (a, b)]
    said += [caplog.text, *capsys.readouterr()]
    assert not is_in("".join(said), secrets)
