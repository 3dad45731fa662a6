"""What a program shows to a daemon, and how it knows the daemon."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import peermem
from peermem import errors
from peermem.cli import tool
from peermem.config import Kubernetes, ListenAddress
from peermem.config_values import FilePath, HttpsUrl
from tests.api_server import FakeApiServer, token
from tests.certificates import Authority
from tests.trusting import Node, free_ports, nodes

AUTHORITY = Authority()
JOB = AUTHORITY.issue("spiffe://example.org/job/7")


@pytest.fixture
async def api_server(tmp_path: Path) -> AsyncIterator[FakeApiServer]:
    async with FakeApiServer(tmp_path, AUTHORITY).serving() as server:
        yield server


@pytest.fixture
async def daemon(tmp_path: Path, api_server: FakeApiServer) -> AsyncIterator[tuple[Node, str]]:
    """A node, and the address for tokens."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    table = Kubernetes(
        api_server=HttpsUrl(api_server.url),
        ca=FilePath(str(api_server.folder / "ca.pem")),
        token=FilePath(str(api_server.folder / "own")),
    )
    async with nodes(tmp_path, ("a",), AUTHORITY, kubernetes=table, token_address=ListenAddress(address)) as (node,):
        yield node, address


def files(folder: Path, **changes: Any) -> peermem.Tls:
    names = {"ca": "ca", "certificate": "cert", "key": "key"}
    found = {name: str(folder / f"{file}.pem") for name, file in names.items()}
    return peermem.Tls(**found | {"server": "peermem.test"} | changes)


async def owner_sync(target: str, tls: peermem.Tls | None) -> str:
    def ask() -> str:
        with peermem.connect(target, attach=False, tls=tls) as node:
            return node.region(node.create_region(device="bar0", length=1).name).owner

    return await asyncio.to_thread(ask)


async def owner_aio(target: str, tls: peermem.Tls | None) -> str:
    async with await peermem.aio.connect(target, attach=False, tls=tls) as node:
        return await owner_at(node)


async def owner_at(node: peermem.aio.Node) -> str:
    made = await node.create_region(device="bar0", length=1)
    return (await node.region(made.name)).owner


Owner = Callable[[str, "peermem.Tls | None"], Any]


@pytest.mark.parametrize("owner", [owner_sync, owner_aio])
async def test_a_program_is_who_its_certificate_or_token_says(
    daemon: tuple[Node, str], api_server: FakeApiServer, tmp_path: Path, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, tokens = daemon
    job = JOB.write(tmp_path / "job")
    own = tmp_path / "token"
    own.write_text(api_server.knows(token()) + "\n")
    assert await owner(node.address, files(job)) == "spiffe://example.org/job/7"
    with_token = peermem.Tls(ca=job / "ca.pem", token_file=own, server="peermem.test")
    assert await owner(tokens, with_token) == "kubernetes:training/loader"
    assert await owner(node.target, peermem.Tls(token_file=own)) == "kubernetes:training/loader"
    for name, value in (("CA", job / "ca.pem"), ("TOKEN_FILE", own), ("SERVER", "peermem.test")):
        monkeypatch.setenv(f"PEERMEM_CLIENT_{name}", str(value))
    assert await owner(tokens, None) == "kubernetes:training/loader"


@pytest.mark.parametrize("owner", [owner_sync, owner_aio])
async def test_who_proves_nothing_or_is_proved_nothing_to_is_told_so(
    daemon: tuple[Node, str], tmp_path: Path, owner: Owner
) -> None:
    node, tokens = daemon
    job = JOB.write(tmp_path / "job")
    (tmp_path / "token").write_text(token(ends_in=-1))
    nothing = peermem.Tls(ca=job / "ca.pem", server="peermem.test")
    expired = replace(nothing, token_file=tmp_path / "token")
    another = Authority("another authority").issue("spiffe://example.org/job/7").write(tmp_path / "another")
    for target, tls, fault in (
        (tokens, nothing, errors.Unauthenticated),
        (tokens, expired, errors.Unauthenticated),
        (node.address, nothing, errors.NodeUnreachable),
        (node.address, None, errors.NodeUnreachable),
        (node.address, files(job, server=""), errors.NodeUnreachable),
        (node.address, files(job, ca=str(another / "ca.pem")), errors.NodeUnreachable),
        (node.address, files(another, ca=str(job / "ca.pem")), errors.NodeUnreachable),
        (node.address, files(job, ca=None), errors.InvalidField),
        (node.address, files(job, key=None), errors.InvalidField),
        (node.address, files(job, certificate=None), errors.InvalidField),
        (node.address, files(tmp_path / "none"), errors.InvalidField),
        (node.target, peermem.Tls(token_file=tmp_path / "none"), errors.InvalidField),
    ):
        with pytest.raises(fault):
            await owner(target, tls)


KEY = "-----BEGIN KEY-----\nc2VjcmV0\n-----END KEY-----\n"
NO_TOKENS = {"empty": "", "blank": "\n", "a key": KEY, "two": "a b", "binary": "c2VjcmV0\0", "too long": "x" * 12_001}


@pytest.mark.parametrize("owner", [owner_sync, owner_aio])
@pytest.mark.parametrize("held", NO_TOKENS.values(), ids=NO_TOKENS)
async def test_a_file_that_holds_no_token_is_refused_and_told_to_nobody(
    tmp_path: Path, owner: Owner, held: str
) -> None:
    (tmp_path / "token").write_text(held)
    with pytest.raises(errors.InvalidField, match=r"tls\.token_file names holds no token") as caught:
        await owner(f"unix://{tmp_path}/none.sock", peermem.Tls(token_file=tmp_path / "token"))
    assert "c2VjcmV0" not in str(caught.value)


async def test_a_token_that_is_just_being_written_leaves_the_one_before(
    daemon: tuple[Node, str], api_server: FakeApiServer, tmp_path: Path
) -> None:
    own = tmp_path / "token"
    own.write_text(api_server.knows(token()))
    async with await peermem.aio.connect(daemon[0].target, attach=False, tls=peermem.Tls(token_file=own)) as node:
        own.write_text("")
        assert await owner_at(node) == "kubernetes:training/loader"
        own.write_text(api_server.knows(token(jti="2"), user="system:serviceaccount:training:next"))
        assert await owner_at(node) == "kubernetes:training/next"


async def test_files_that_are_renewed_are_read_again(
    daemon: tuple[Node, str], api_server: FakeApiServer, tmp_path: Path
) -> None:
    node, _ = daemon
    job = JOB.write(tmp_path / "job")
    own = tmp_path / "token"
    own.write_text(api_server.knows(token(jti="1")))
    with_token = peermem.Tls(token_file=own)
    async with (
        await peermem.aio.connect(node.target, attach=False, tls=with_token) as local,
        await peermem.aio.connect(node.address, tls=files(job)) as remote,
    ):

        def both() -> list[str]:
            with (
                peermem.connect(node.target, attach=False, tls=with_token) as local,
                peermem.connect(node.address, tls=files(job)) as remote,
            ):
                owners: list[str] = []
                for turn in range(4):
                    renew(turn)
                    made = [(each, each.create_region(device="bar0", length=1).name) for each in (local, remote)]
                    owners += [each.region(name).owner for each, name in made]
                return owners

        def renew(turn: int) -> None:
            account = f"system:serviceaccount:training:loader-{turn}"
            own.write_text(api_server.knows(token(jti=f"turn {turn}"), user=account))
            AUTHORITY.issue(f"spiffe://example.org/job/{turn}").write(job)

        names = ("kubernetes:training/loader-{}", "spiffe://example.org/job/{}")
        expected = [name.format(turn) for turn in range(4) for name in names]
        assert await asyncio.to_thread(both) == expected
        owners = []
        for turn in range(4):
            renew(turn)
            owners += [await owner_at(local), await owner_at(remote)]
        assert owners == expected
        own.unlink()
        (job / "key.pem").unlink()
        for each, name in ((local, expected[-2]), (remote, expected[-1])):
            assert await owner_at(each) == name, "what was read before counts until there is something to read"


async def test_the_tool_shows_what_variables_name(daemon: tuple[Node, str], tmp_path: Path) -> None:
    job = JOB.write(tmp_path / "job")
    named = {"CA": "ca.pem", "CERTIFICATE": "cert.pem", "KEY": "key.pem"}
    variables = {f"PEERMEM_CLIENT_{name}": str(job / file) for name, file in named.items()}
    for server, code in (("peermem.test", 0), ("elsewhere.test", 3)):
        runner = CliRunner(env={**variables, "PEERMEM_CLIENT_SERVER": server})
        result = await asyncio.to_thread(runner.invoke, tool, ["node", "--target", daemon[0].address, "--json"])
        assert result.exit_code == code, result.output


def test_nothing_of_a_token_or_key_is_shown(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    assert "secret" not in repr(peermem.Tls(token_file=tmp_path / "token"))
    with pytest.raises(errors.InvalidField) as caught:
        peermem.connect(f"unix://{tmp_path}/none.sock", attach=False, tls=peermem.Tls(token_file="the.token.itself"))
    assert "the.token.itself" not in str(caught.value)
