"""A certificate, its key and the authorities are tried before they count."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from peermem.core.spiffe import Denied, NodePattern
from peermem.credentials.base import Credentials
from peermem.credentials.trial import BadPair, Pair, try_pair
from tests.certificates import HOUR, NOW, PATTERN, Authority, Certificate

ID = "spiffe://example.org/peermem/a"
AUTHORITY = Authority()
OTHER = Authority("another authority")
GOOD = AUTHORITY.node("a")


def test_what_others_see_of_a_good_one() -> None:
    shown = try_pair(GOOD.pair)
    assert (shown.spiffe_id, shown.name, shown.fingerprint) == (ID, "peermem.test", GOOD.fingerprint)
    assert x509.load_pem_x509_certificate(shown.pem) == x509.load_pem_x509_certificate(GOOD.pem)
    assert shown.not_after.endswith("GMT")


@pytest.mark.parametrize(
    ("certificate", "name"),
    [
        (AUTHORITY.issue(ID, dns=None, ip="10.0.0.1"), "10.0.0.1"),
        (AUTHORITY.issue(ID, dns=None, ip="fd00::1"), "[fd00::1]"),
        (AUTHORITY.issue(ID, dns=None, common="node a"), "node a"),
        (AUTHORITY.issue(ID, dns="*.peermem.test"), ""),
        (AUTHORITY.issue(ID, dns=None), ""),
    ],
)
def test_the_name_that_grpc_insists_on(certificate: Certificate, name: str) -> None:
    assert try_pair(certificate.pair).name == name


@pytest.mark.parametrize("ids", [(), (ID, "spiffe://example.org/else"), ("https://example.org/x",)])
def test_a_certificate_without_a_single_spiffe_id_has_none(ids: tuple[str, ...]) -> None:
    assert try_pair(AUTHORITY.issue(*ids).pair).spiffe_id == ""


def locked(certificate: Certificate) -> bytes:
    key = serialization.load_pem_private_key(certificate.key, None)
    locked = serialization.BestAvailableEncryption(b"secret")
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)


@pytest.mark.parametrize(
    ("pair", "cause"),
    [
        (replace(GOOD.pair, key=AUTHORITY.node("a").key), "certificate and key are no pair .*MISMATCH"),
        (replace(GOOD.pair, key=b"nonsense"), "certificate and key are no pair"),
        (replace(GOOD.pair, key=locked(GOOD)), "locked with a password"),
        (replace(GOOD.pair, certificate=b""), "certificate and key are no pair"),
        (replace(GOOD.pair, roots=b""), "the authorities are no certificates"),
        (replace(GOOD.pair, roots=b"\xff"), "the authorities are no certificates"),
        (replace(GOOD.pair, roots=OTHER.pem), "unable to get local issuer certificate"),
        (AUTHORITY.issue(ID, begin=NOW - 2 * HOUR, end=NOW - HOUR).pair, "certificate has expired"),
        (AUTHORITY.issue(ID, begin=NOW + HOUR).pair, "certificate is not yet valid"),
        (AUTHORITY.issue(ID, server=False).pair, "(?i)purpose"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_its_cause(pair: Pair, cause: str) -> None:
    with pytest.raises(BadPair, match=cause):
        try_pair(pair)


def test_keys_are_in_no_repr() -> None:
    credentials = Credentials("a", NodePattern(PATTERN), GOOD.pair, Denied())
    assert "PRIVATE" not in repr(GOOD.pair) + repr(credentials.now)


@pytest.mark.parametrize(
    ("certificate", "cause"),
    [
        (AUTHORITY.node("b"), "its SPIFFE ID is spiffe://example.org/peermem/b, and this node's is .*/a"),
        (AUTHORITY.issue(), "its SPIFFE ID is missing"),
        (AUTHORITY.issue(ID, dns=None), "no DNS name, IP address or common name"),
    ],
)
def test_another_nodes_certificate_is_refused_and_the_old_one_stays(certificate: Certificate, cause: str) -> None:
    credentials = Credentials("a", NodePattern(PATTERN), GOOD.pair, Denied())
    with pytest.raises(BadPair, match=cause):
        credentials.offer(certificate.pair)
    assert (credentials.now.pair, credentials.now.generation) == (GOOD.pair, 1)
    credentials.offer(GOOD.pair)
    assert credentials.now.generation == 1, "nothing is new"
    newer = AUTHORITY.node("a")
    credentials.offer(newer.pair)
    assert (credentials.now.pair, credentials.now.generation) == (newer.pair, 2)
