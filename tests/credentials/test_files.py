"""Credentials from files: read again when they change, refused when they don't pass."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from peermem.core.spiffe import NodePattern
from peermem.credentials.base import Credentials
from peermem.credentials.files import CredentialFiles
from peermem.credentials.trial import BadPair
from tests.certificates import PATTERN, Authority, Certificate
from tests.descriptors import until

AUTHORITY = Authority()
Logs = list[MutableMapping[str, Any]]


@pytest.fixture
def source(tmp_path: Path) -> CredentialFiles:
    folder = AUTHORITY.node("a").write(tmp_path / "tls")
    denied = tmp_path / "denied"
    denied.write_text("spiffe://example.org/job/7\n")
    cert, key, ca = (folder / f"{name}.pem" for name in ("cert", "key", "ca"))
    return CredentialFiles("a", NodePattern(PATTERN), cert, key, ca, denied, every=0.01)


@asynccontextmanager
async def followed(source: CredentialFiles) -> AsyncIterator[tuple[Credentials, Logs]]:
    credentials = await source.open()
    with capture_logs() as logs:
        following = asyncio.create_task(source.follow(credentials))
        await asyncio.sleep(0)  # it has looked at the files as they are
        yield credentials, logs
        following.cancel()
        await asyncio.wait([following])


def told(logs: Logs, event: str) -> Callable[[], bool]:
    return lambda: any(line["event"] == event for line in logs)


async def test_newer_ones_are_put_in_force(source: CredentialFiles) -> None:
    async with followed(source) as (credentials, logs):
        assert credentials.now.denied.holds("spiffe://example.org/job/7", "")
        newer = AUTHORITY.node("a")
        newer.write(source.certificate.parent)
        await until(lambda: credentials.now.pair == newer.pair)
        assert source.denied is not None
        source.denied.write_text("spiffe://example.org/job/8\n")
        await until(lambda: credentials.now.denied.holds("spiffe://example.org/job/8", ""))
        assert not credentials.now.denied.holds("spiffe://example.org/job/7", "")
        assert told(logs, "certificate_in_force")()


async def test_bad_ones_are_refused_and_told(source: CredentialFiles) -> None:
    async with followed(source) as (credentials, logs):
        before = credentials.now
        for event, change in (
            ("certificate_refused", lambda: AUTHORITY.node("b").write(source.certificate.parent)),
            ("certificate_refused", source.key.unlink),
            ("certificate_refused", lambda: source.ca.write_bytes(b"x" * (1 << 20 | 1))),
            ("denied_refused", lambda: replace(source).denied.write_text("job 7")),  # type: ignore[union-attr]
        ):
            logs.clear()
            change()
            await until(told(logs, event))
            assert all("PRIVATE" not in str(line) for line in logs)
        assert credentials.now is before
        newer = AUTHORITY.node("a")
        newer.write(source.certificate.parent)
        await until(lambda: credentials.now.pair == newer.pair)


async def test_the_first_ones_must_pass(source: CredentialFiles) -> None:
    foreign = Authority("another authority").node("a")
    Certificate(foreign.pem, foreign.key, AUTHORITY).write(source.certificate.parent)
    with pytest.raises(BadPair, match="unable to get local issuer certificate"):
        await source.open()
    source.certificate.unlink()
    with pytest.raises(FileNotFoundError):
        await source.open()
