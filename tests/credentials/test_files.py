"""Credentials from files: read again when they change, refused when they don't pass."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from peermem.core.spiffe import Denied, NodePattern
from peermem.credentials.base import Credentials
from peermem.credentials.denied import follow_denied, read_denied
from peermem.credentials.files import CredentialFiles
from peermem.credentials.trial import BadPair
from peermem.credentials.watched import Watched
from tests.certificates import PATTERN, Authority, Certificate
from tests.descriptors import until

AUTHORITY = Authority()
Logs = list[MutableMapping[str, Any]]


@pytest.fixture
def source(tmp_path: Path) -> CredentialFiles:
    folder = AUTHORITY.node("a").write(tmp_path / "tls")
    cert, key, ca = (folder / f"{name}.pem" for name in ("cert", "key", "ca"))
    return CredentialFiles(cert, key, ca, every=0.01)


@asynccontextmanager
async def followed(source: CredentialFiles, denied: Path) -> AsyncIterator[tuple[Credentials, Logs]]:
    credentials = Credentials("a", NodePattern(PATTERN), await source.first(), read_denied(denied))
    with capture_logs() as logs:
        following = [
            asyncio.create_task(source.follow(credentials)),
            asyncio.create_task(follow_denied(denied, credentials, every=0.01)),
        ]
        yield credentials, logs
        for task in following:
            task.cancel()
        await asyncio.wait(following)


@pytest.fixture
def denied(tmp_path: Path) -> Path:
    file = tmp_path / "denied"
    file.write_text("spiffe://example.org/job/7\n")
    return file


def told(logs: Logs, event: str) -> Callable[[], bool]:
    return lambda: any(line["event"] == event for line in logs)


async def test_newer_ones_are_put_in_force(source: CredentialFiles, denied: Path) -> None:
    async with followed(source, denied) as (credentials, logs):
        assert credentials.now.denied.holds("spiffe://example.org/job/7", "")
        newer = AUTHORITY.node("a")
        newer.write(source.certificate.parent)
        await until(lambda: credentials.now.pair == newer.pair)
        await asyncio.to_thread(denied.write_text, "spiffe://example.org/job/8\n")
        await until(lambda: credentials.now.denied.holds("spiffe://example.org/job/8", ""))
        assert not credentials.now.denied.holds("spiffe://example.org/job/7", "")
        assert told(logs, "certificate_in_force")()


async def test_bad_ones_are_refused_and_told(source: CredentialFiles, denied: Path) -> None:
    async with followed(source, denied) as (credentials, logs):
        before = credentials.now
        for event, change in (
            ("certificate_refused", lambda: AUTHORITY.node("b").write(source.certificate.parent)),
            ("certificate_refused", source.key.unlink),
            ("certificate_refused", lambda: source.ca.write_bytes(b"x" * (1 << 20 | 1))),
            ("denied_refused", lambda: denied.write_text("job 7")),
        ):
            logs.clear()
            change()
            await until(told(logs, event))
            assert all("PRIVATE" not in str(line) for line in logs)
        assert credentials.now is before
        newer = AUTHORITY.node("a")
        newer.write(source.certificate.parent)
        await until(lambda: credentials.now.pair == newer.pair)


def test_a_file_that_may_be_read_now_is_another_than_before(tmp_path: Path) -> None:
    """Whoever was told that it can't be read mends that without writing it again."""
    key = tmp_path / "key.pem"
    key.touch(0o000)
    watched = Watched(key)
    assert not watched.changed()
    key.chmod(0o400)
    assert watched.changed()
    assert not watched.changed()


async def test_the_first_ones_must_pass(source: CredentialFiles) -> None:
    foreign = Authority("another authority").node("a")
    Certificate(foreign.pem, foreign.key, AUTHORITY).write(source.certificate.parent)
    with pytest.raises(BadPair, match="unable to get local issuer certificate"):
        Credentials("a", NodePattern(PATTERN), await source.first(), Denied())
    source.certificate.unlink()
    with pytest.raises(FileNotFoundError):
        await source.first()
