"""Any certificate, key and authorities: put in force or refused, and what was in force before stays there."""

from __future__ import annotations

import ssl

from hypothesis import given
from hypothesis import strategies as st

from peermem.core.spiffe import Denied, NodePattern, is_spiffe_id
from peermem.credentials.base import Credentials
from peermem.credentials.trial import BadPair, Pair, try_pair
from tests.certificates import HOUR, NOW, PATTERN, Authority
from tests.fuzzing import fuzz, tried

AUTHORITY, OTHER = Authority(), Authority("another authority")
GOOD = AUTHORITY.node("a")
ANOTHER = AUTHORITY.node("b")
PIECES = (
    *(GOOD.pem, GOOD.key, AUTHORITY.pem, OTHER.pem, OTHER.node("a").pem, ANOTHER.pem, ANOTHER.key),
    *(
        AUTHORITY.issue(PATTERN.format(node="a"), end=NOW - HOUR, begin=NOW - 2 * HOUR).pem,
        b"-----BEGIN CERTIFICATE-----\n",
    ),
    *(b"-----END CERTIFICATE-----\n", b"", b"\0", b"\xff", b"# a comment\n"),
)


def changed(data: bytes) -> st.SearchStrategy[bytes]:
    """Bytes with some replaced, left out or put in."""

    def change(edits: list[tuple[int, int, bytes]]) -> bytes:
        whole = data
        for position, length, new in edits:
            at = position % len(whole) if whole else 0
            whole = whole[:at] + new + whole[at + length :]
        return whole

    edit = st.tuples(st.integers(0, 1 << 16), st.integers(0, 3), st.binary(max_size=3))
    return st.lists(edit, min_size=1, max_size=3).map(change)


pieces = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=4).map(b"".join), changed(GOOD.pem), st.binary(max_size=200)
)
pairs = st.one_of(
    st.builds(Pair, pieces, st.just(GOOD.key), st.just(AUTHORITY.pem)),
    st.builds(Pair, st.just(GOOD.pem), st.one_of(pieces, changed(GOOD.key)), st.just(AUTHORITY.pem)),
    st.builds(Pair, st.just(GOOD.pem), st.just(GOOD.key), st.one_of(pieces, changed(AUTHORITY.pem))),
    st.builds(Pair, pieces, pieces, pieces),
)


@fuzz(100)
@given(pair=pairs)
def test_any_files_are_put_in_force_or_refused(pair: Pair) -> None:
    tried("certificates (PEM)")
    offer(pair)


@fuzz(100)
@given(der=changed(ssl.PEM_cert_to_DER_cert(GOOD.pem.decode())), as_root=st.booleans())
def test_any_certificate_is_put_in_force_or_refused(der: bytes, as_root: bool) -> None:
    tried("certificates (DER)")
    pem = ssl.DER_cert_to_PEM_cert(der).encode()
    offer(Pair(GOOD.pem, GOOD.key, pem) if as_root else Pair(pem, GOOD.key, AUTHORITY.pem))


def offer(pair: Pair) -> None:
    credentials = Credentials("a", NodePattern(PATTERN), GOOD.pair, Denied())
    try:
        credentials.offer(pair)
    except BadPair:
        assert credentials.now.pair == GOOD.pair
    assert credentials.now.shown.spiffe_id == PATTERN.format(node="a")


_WORDS = st.sampled_from(("spiffe://", "example.org", "/peermem/", "a", "b", "//", "..", "%2e", "@", ":", "", "A", " "))
_ODD = st.one_of(
    st.lists(_WORDS, max_size=8).map("".join),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60).map("spiffe://".__add__),
)


@fuzz(60)
@given(ids=st.lists(_ODD, max_size=3), node=st.booleans())
def test_any_spiffe_id_is_a_subjects_or_none(ids: list[str], node: bool) -> None:
    tried("SPIFFE IDs")
    named = [*ids, PATTERN.format(node="a")] if node else ids
    shown = try_pair(AUTHORITY.issue(*named).pair).spiffe_id
    assert shown == "" or (is_spiffe_id(shown) and shown in named)
    spiffe = [each for each in named if each.startswith("spiffe:")]
    assert len(spiffe) == 1 or not shown
    assert NodePattern(PATTERN).node(shown) in (None, shown.removeprefix("spiffe://example.org/peermem/"))


@fuzz(100)
@given(text=st.one_of(st.lists(_ODD, max_size=4).map("\n".join), st.text(max_size=100)))
def test_any_list_of_what_is_denied_is_taken_whole_or_refused(text: str) -> None:
    tried("denied lists")
    try:
        denied = Denied.parse(text)
    except ValueError:
        return
    assert denied == Denied.parse("\n".join(sorted(denied.entries)))
