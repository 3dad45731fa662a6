from __future__ import annotations

from ipaddress import IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peermem.core.gid import Gid, choose_gid

V1, V2 = "IB/RoCE v1", "RoCE v2"
LINK_LOCAL, OTHER_LINK_LOCAL = "fe80::1", "fe80::2"


def packed(text: str) -> bytes:
    return IPv6Address(text).packed


def table(*entries: tuple[str, str]) -> list[Gid]:
    return [Gid(index, packed(text), kind, "eth0") for index, (text, kind) in enumerate(entries)]


ROCE = table(
    (LINK_LOCAL, V1),
    (LINK_LOCAL, V2),
    ("::ffff:192.168.0.1", V1),
    ("::ffff:192.168.0.1", V2),
    ("2001:db8:1::10", V2),
    ("::ffff:10.0.0.1", V2),
    ("2001:db8:2::10", V2),
)


@pytest.mark.parametrize(
    ("remote", "index"),
    [
        (None, 3),
        ("::ffff:192.168.0.77", 3),
        ("::ffff:10.0.0.200", 5),
        ("::ffff:11.0.0.1", 5),
        ("2001:db8:1::99", 4),
        ("2001:db8:2::99", 6),
        (OTHER_LINK_LOCAL, 1),
    ],
)
def test_roce_takes_v2_of_the_remote_nodes_subnet(remote: str | None, index: int) -> None:
    assert choose_gid(ROCE, "Ethernet", packed(remote) if remote else None) == index


def test_roce_takes_v1_where_there_is_no_v2() -> None:
    assert choose_gid(ROCE[:1] + ROCE[2:3], "Ethernet") == 2
    assert choose_gid(ROCE[:1], "Ethernet") == 0


def test_ipv4_never_talks_to_ipv6() -> None:
    assert choose_gid(ROCE[:2], "Ethernet", packed("::ffff:10.0.0.2")) is None
    assert choose_gid(ROCE[2:4], "Ethernet", packed(OTHER_LINK_LOCAL)) is None


@pytest.mark.parametrize("text", ["::", "fe80::", "2001:db8:1::", "::ffff:0.0.0.0"])
@pytest.mark.parametrize("link_layer", ["Ethernet", "InfiniBand"])
def test_unset_addresses_are_not_used(text: str, link_layer: str) -> None:
    assert choose_gid(table((text, V2)), link_layer) is None
    assert choose_gid([], link_layer) is None


def test_infiniband_takes_the_subnet_of_the_remote_port() -> None:
    gids = table(("fe80::b83f:d203:12:3400", V1), ("fec0::1:b83f:d203:12:3400", V1))
    assert choose_gid(gids, "InfiniBand") == 0
    assert choose_gid(gids, "InfiniBand", packed("fe80::b83f:d203:12:9999")) == 0
    assert choose_gid(gids, "InfiniBand", packed("fec0::1:b83f:d203:12:9999")) == 1
    assert choose_gid(gids, "InfiniBand", packed("fec0::2:b83f:d203:12:9999")) == 0


@pytest.mark.parametrize(
    ("address", "text"),
    [("::ffff:10.0.0.1", "::ffff:10.0.0.1"), ("fe80::1", "fe80::1"), ("::ffff:0:0", "::ffff:0.0.0.0")],
)
def test_addresses_are_shown_as_people_write_them(address: str, text: str) -> None:
    assert str(Gid(0, packed(address), V2)) == text


@given(
    st.lists(st.tuples(st.binary(min_size=16, max_size=16), st.sampled_from([V1, V2, ""]))),
    st.sampled_from(["Ethernet", "InfiniBand", ""]),
    st.none() | st.binary(max_size=20),
)
def test_any_table_gives_one_of_its_own_indexes_or_none(
    entries: list[tuple[bytes, str]], link_layer: str, remote: bytes | None
) -> None:
    gids = [Gid(7 * number, value, kind) for number, (value, kind) in enumerate(entries)]
    index = choose_gid(gids, link_layer, remote)
    assert index is None or any(gid.index == index and any(gid.value[8:]) for gid in gids)
